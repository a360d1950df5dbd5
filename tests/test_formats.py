"""Every format from a sample in its publisher's schema to ten steps of training, by the command line.

The schemas, as their publishers document them:
JourneyDB     https://huggingface.co/datasets/JourneyDB/JourneyDB (.jsonl: img_path, prompt, Task2, Task3)
LAION         https://laion.ai/blog/laion-5b (parquet: URL, TEXT, WIDTH, HEIGHT)
img2dataset   https://github.com/rom1504/img2dataset#output-format (webdataset: 000000000.jpg, .txt, .json)
OBELICS       https://huggingface.co/datasets/HuggingFaceM4/OBELICS (images, texts, metadata, general_metadata)
mmc4          https://github.com/allenai/mmc4 (text_list, image_info, similarity_matrix)
OpenFlamingo  https://github.com/mlfoundations/open_flamingo (scripts/convert_mmc4_to_wds.py: image_base64)
LLaVA         https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md (conversations)
C4            https://huggingface.co/datasets/allenai/c4 (text, timestamp, url)
The layouts of `vqa` and of canonical shards are ours: data_pipeline/convert/vqa.py, data_pipeline/schema.py.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.schema import Document
from data_pipeline.shards import Manifest
from data_pipeline.split import Split
from tests.corpus import launch, write_corpus
from uvlm.cli import app

NUM = 24  # documents of each sample; one more is bad
COLORS = ("red", "green", "blue")
Sample = tuple[Path, list[str]]  # source, options


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (24, 24), COLORS[number % 3])
    image.putpixel((number % 24, number // 24), (255, 255, 255))
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_images(folder: Path, suffix: str = ".jpg") -> Path:
    folder.mkdir(parents=True)
    for number in range(NUM):
        (folder / f"{number}{suffix}").write_bytes(jpeg(number))
    return folder


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def caption(number: int) -> str:
    return f"a {COLORS[number % 3]} square, number {number}"


def pairs_journeydb(folder: Path) -> Sample:
    write_images(folder / "imgs" / "000")
    lines: list[dict[str, Any]] = [
        {"img_path": f"./000/{i}.jpg", "prompt": caption(i), "Task2": {"Caption": caption(i)}, "Task3": {}}
        for i in range(NUM)
    ]
    lines.append({"img_path": "./000/gone.jpg", "prompt": "an image that is missing"})
    return write_jsonl(folder / "train_anno.jsonl", lines), [f"--image-root={folder / 'imgs'}"]


def pairs_csv(folder: Path) -> Sample:
    write_images(folder / "images")
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "note"])
        rows.writerows([f"images/{i}.jpg", f"{caption(i)},\nin two lines", "x"] for i in range(NUM))
        rows.writerow(["images/0.jpg", "  ", "no caption"])
    return folder / "captions.csv", []


def pairs_parquet(folder: Path) -> Sample:
    """Inline bytes as Hugging Face's `datasets` writes its Image feature."""
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(NUM)] + [{"bytes": b"no image", "path": None}]
    table = pa.table({"image": images, "text": [caption(i) for i in range(NUM + 1)]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=7)
    return folder, []


def pairs_folder(folder: Path) -> Sample:
    images = write_images(folder / "images")
    for number in range(NUM):
        (images / f"{number}.txt").write_text(caption(number))
    (images / "bad.jpg").write_bytes(b"")
    (images / "bad.txt").write_text("a file without a byte")
    return images, []


def pairs_tar(folder: Path) -> Sample:
    samples = [
        (f"{i:09d}", {"jpg": jpeg(i), "txt": caption(i).encode(), "json": json.dumps({"key": i}).encode()})
        for i in range(NUM)
    ]
    write_tar(folder / "00000.tar", [*samples, ("000000099", {"txt": b"its image could not be downloaded"})])
    return folder, []


def vqa(folder: Path) -> Sample:
    write_images(folder / "images")
    lines: list[dict[str, Any]] = [
        {"image": f"images/{i}.jpg", "questions": [["what color?", COLORS[i % 3]], ["a square?", "yes"]], "id": str(i)}
        for i in range(NUM)
    ]
    return write_jsonl(folder / "questions.jsonl", [*lines, {"image": "images/0.jpg", "questions": []}]), []


def obelics_documents() -> list[dict[str, Any]]:
    texts = [[f"Page {i} begins.", None, f"It showed {caption(i)}."] for i in range(NUM)]
    images = [[None, f"{i}.jpg", None] for i in range(NUM)]
    metadata = json.dumps([None, {"alt_text": "a square", "format": "jpeg"}, None])
    general = json.dumps({"url": "https://example.org/page"})
    documents = [
        {"texts": text, "images": image, "metadata": metadata, "general_metadata": general}
        for text, image in zip(texts, images, strict=True)
    ]
    return [*documents, {**documents[0], "images": [None, "0.jpg"]}]


def obelics_parquet(folder: Path) -> Sample:
    write_images(folder / "images")
    pq.write_table(pa.Table.from_pylist(obelics_documents()), folder / "train-00000.parquet", row_group_size=10)
    return folder / "train-00000.parquet", [f"--image-root={folder / 'images'}"]


def obelics_jsonl(folder: Path) -> Sample:
    write_images(folder / "images")
    lines = [{"text_list": each["texts"], "image_list": each["images"]} for each in obelics_documents()]
    return write_jsonl(folder / "docs.jsonl", lines), [f"--image-root={folder / 'images'}"]


def mmc4_documents(image: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    documents = [
        {
            "text_list": ["A page.", f"Here is {caption(i)}.", "The end."],
            "image_info": [{"matched_text_index": 1, "matched_sim": 0.3, **image(i)}],
            "similarity_matrix": [[0.1, 0.3, 0.2]],
            "url": "https://example.org",
            "could_have_url_duplicate": 0,
        }
        for i in range(NUM)
    ]
    return [*documents, {**documents[0], "text_list": None}]


def mmc4(folder: Path) -> Sample:
    write_images(folder / "images")
    lines = mmc4_documents(lambda i: {"image_name": f"{i}.jpg", "raw_url": f"https://example.org/{i}.jpg"})
    return write_jsonl(folder / "docs_shard_0_v2.jsonl", lines), [f"--image-root={folder / 'images'}"]


def mmc4_openflamingo(folder: Path) -> Sample:
    documents = mmc4_documents(lambda i: {"image_name": f"{i}.jpg", "image_base64": base64.b64encode(jpeg(i)).decode()})
    write_tar(folder / "000000.tar", [(f"{i:09d}", {"json": json.dumps(d).encode()}) for i, d in enumerate(documents)])
    return folder, []


def chat(folder: Path) -> Sample:
    write_images(folder / "images")
    turns = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": "It is red."}]
    records = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(NUM)]
    broken = {"id": "x", "conversations": turns}  # an <image> and no image
    (folder / "llava.json").write_text(json.dumps([*records, broken]))
    return folder / "llava.json", [f"--image-root={folder / 'images'}"]


def text(folder: Path) -> Sample:
    lines = [{"text": f"The story of {caption(i)}.", "timestamp": "2019-04-25", "url": "http://a"} for i in range(NUM)]
    return write_jsonl(folder / "c4-train.00000.jsonl", [*lines, {"text": "", "url": "http://b"}]), []


def webdataset(folder: Path) -> Sample:
    good = {"texts": ["a square", None], "images": [None, "0.jpg"], "task": "generate"}
    samples = [(f"{i:09d}", {"json": json.dumps(good).encode(), "0.jpg": jpeg(i)}) for i in range(NUM)]
    bad = {"json": json.dumps({**good, "task": "unheard of"}).encode(), "0.jpg": jpeg(0)}
    write_tar(folder / "old.tar", [*samples, ("000000999", bad)])
    return folder / "old.tar", []


SAMPLES = {
    "pairs": [pairs_journeydb, pairs_csv, pairs_parquet, pairs_folder, pairs_tar],
    "vqa": [vqa],
    "obelics": [obelics_parquet, obelics_jsonl],
    "mmc4": [mmc4, mmc4_openflamingo],
    "chat": [chat],
    "text": [text],
    "webdataset": [webdataset],
}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_name", "make"), [(name, make) for name, all_makes in SAMPLES.items() for make in all_makes]
)
def test_a_published_sample_is_converted_verified_tokenized_and_trained_on(
    config: Path, tmp_path: Path, format_name: str, make: Callable[[Path], Sample]
) -> None:
    (tmp_path / "in").mkdir()
    source, options = make(tmp_path / "in")
    shards, tokens, tokenizer = tmp_path / "shards", tmp_path / "tokens", config.parent / "tokenizer"

    told = run("data", "convert", format_name, str(source), str(shards), "--samples-per-shard=10", *options)
    assert f"{NUM + 1} documents in, {NUM} out" in told
    assert "rejected 1: " in told
    assert len((shards / "rejected.jsonl").read_text().splitlines()) == 1
    documents = [Split.open(shards).read(i) for i in range(NUM)]
    kept = {content for each in documents if isinstance(each, Document) for content in each.image_bytes.values()}
    assert kept == (set() if format_name == "text" else {jpeg(i) for i in range(NUM)})

    run("data", "verify", str(shards))
    run("data", "tokenize", str(shards), str(tokens), f"--tokenizer={tokenizer}", "--min-psnr=0", "--drop-images")
    assert f"{NUM} documents" in run("data", "verify", str(tokens), f"--tokenizer={tokenizer}")
    assert Manifest.load(tokens).samples == NUM
    launch(config, 1, f"data.train=[{{path: {tokens}}}]", "data.valid=[]", "optim.steps=10", f"run={tmp_path / 'run'}")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert records[-1]["data/rejected_documents"] == 0
