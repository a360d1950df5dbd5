"""Published layouts of each format become the documents they mean."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.convert import FORMATS, Options, convert
from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.split import Split
from tests.test_containers import write_csv, write_tar
from tests.test_convert import PNG, documents, write_lines
from tests.test_convert_images import picture


# JourneyDB: lines with "prompt" and "img_path" like "./000/<name>.jpg" below imgs/; "Task2" holds a generated caption.
# https://huggingface.co/datasets/JourneyDB/JourneyDB (data/train/train_anno_realease_repath.jsonl)
def test_journeydb_lines_become_pairs(tmp_path: Path) -> None:
    (tmp_path / "imgs/000").mkdir(parents=True)
    (tmp_path / "imgs/000/x.jpg").write_bytes(picture("JPEG"))
    line = {"img_path": "./000/x.jpg", "prompt": "a fox, ink --ar 3:2", "Task1": {}, "Task2": {"Caption": "A fox."}}
    source = write_lines(tmp_path, line)
    convert("pairs", source, tmp_path / "out", options=Options(image_root=tmp_path / "imgs"))
    (document,) = documents(tmp_path / "out")
    assert (document.texts, document.images) == (("a fox, ink --ar 3:2", None), (None, "0.jpg"))
    assert document.image_bytes == {"0.jpg": picture("JPEG")}


# img2dataset, output_format webdataset: members <key>.jpg, <key>.txt and <key>.json with "caption" and "url", beside
# each tar a parquet table and <n>_stats.json. https://github.com/rom1504/img2dataset (README, "Output format choice")
# LAION's own: "txt" the caption, "json" metadata. https://github.com/LAION-AI/dataset-spec
def test_img2dataset_tars_become_pairs(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    about = json.dumps({"caption": "from json", "url": "http://127.0.0.1:1/a.jpg", "key": "000000001"}).encode()
    members = [("000000000.jpg", PNG), ("000000000.txt", "é".encode()), ("000000000.json", about)]
    write_tar(source / "00000.tar", *members, ("000000001.jpg", PNG), ("000000001.json", about), ("000000002.jpg", PNG))
    write_tar(
        source / "00001.tar", ("000000000.WEBP", PNG), ("000000000.txt", b"\xff"), ("a.v2.jpg", PNG), ("a.txt", b"c")
    )
    (source / "00000_stats.json").write_text("{}")
    (source / "00000.parquet").write_bytes(b"PAR1")
    report = convert("pairs", source, tmp_path / "out")
    expected = {"caption is missing or empty": 1, "caption is not UTF-8": 1, "key holds a dot": 1}
    assert (report.documents_in, report.rejected) == (5, expected)
    found = [(document.key, document.texts[0], document.meta) for document in documents(tmp_path / "out")]
    assert found == [("000000000", "é", {"id": "000000000"}), ("000000001", "from json", {"id": "000000001"})]


# Hugging Face ImageFolder: metadata.csv or metadata.jsonl with "file_name" relative to it and any column of text.
# https://huggingface.co/docs/datasets/image_dataset
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv"])
def test_an_image_folder_with_a_table_becomes_pairs(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.png").write_bytes(PNG)
    write_csv(source / name, ["file_name", "caption"], ["0.png", 'two lines,\n"quoted"'], ["1.png", "gone"])
    report = convert("pairs", source, tmp_path / "out")
    assert report.rejected == {"image is missing": 1}
    assert [document.texts[0] for document in documents(tmp_path / "out")] == ['two lines,\n"quoted"']


# Hugging Face Image feature in parquet: struct<bytes: binary, path: string>. https://huggingface.co/docs/hub/datasets-image
def test_a_parquet_file_of_image_structs_becomes_pairs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "b.png").write_bytes(PNG)
    rows = [
        {"image": {"bytes": PNG, "path": "a.png"}, "text": "inline"},
        {"image": {"bytes": None, "path": "b.png"}, "text": "beside"},
        {"image": None, "text": "none"},
        {"image": {"bytes": PNG, "path": None}, "text": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    report = convert("pairs", tmp_path / "a.parquet", tmp_path / "out")
    assert report.rejected == {"image path is missing": 1}
    assert [document.texts for document in documents(tmp_path / "out")] == [("inline", None), ("beside", None), (None,)]


def test_parquet_columns_of_other_types_are_rejected_row_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [1, 2], "caption": [1.5, 2.5]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"caption is missing or empty \(2\)"):
        convert("pairs", tmp_path / "a.parquet", tmp_path / "out")


def test_a_table_without_the_column_is_refused_with_the_columns_it_has(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ["picture", "words"], ["a.PNG", "c"])
    with pytest.raises(ValueError, match=r"a\.csv has no image column .*\(picture, words\).*--image-column"):
        convert("pairs", source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no column 'word' among its columns \(picture, words\).*--text-column"):
        convert("pairs", source, tmp_path / "out", options=Options(image_column="picture", text_column="word"))
    (tmp_path / "a.PNG").write_bytes(PNG)
    convert("pairs", source, tmp_path / "out", options=Options(image_column="picture", text_column="words"))
    assert next(documents(tmp_path / "out")).texts == ("c", None)


def test_a_folder_of_images_with_captions_becomes_pairs(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name, content in (("a.JPG", PNG), ("a.txt", b"one\n"), ("b.jpg", b""), ("b.txt", b"two"), ("c.jpg", PNG)):
        (source / name).write_bytes(content)
    report = convert("pairs", source, tmp_path / "out")
    assert report.rejected == {"image is empty": 1, "caption is missing or empty": 1}
    (document,) = documents(tmp_path / "out")
    assert (document.texts, document.source, document.meta) == (("one", None), "in", {"id": "a"})


def test_texts_have_loss_on_all_of_them(tmp_path: Path) -> None:
    source = write_lines(tmp_path, {"text": "a story", "id": 7}, {"text": " "}, {"content": "also"}, {"text": 3})
    report = convert("text", source, tmp_path / "out")
    assert report.rejected == {"text is missing or empty": 2}
    first, second = documents(tmp_path / "out")
    assert (first.texts, first.task, first.loss, first.meta) == (("a story",), "text", (True,), {"id": 7})
    assert second.texts == ("also",)


def canonical(key: str, **changes: Any) -> Document:
    """A document with bytes and codes."""
    fields: dict[str, Any] = {
        "key": key,
        "texts": ("a", None),
        "images": (None, "0.png"),
        "task": "interleave",
        "loss": (True, False),
        "source": "theirs",
        "meta": {"x": 1},
        "image_bytes": {"0.png": PNG},
        "codes": {"0.npy": np.ones((2, 2), "<u2")},
    }
    return Document(**(fields | changes))


@pytest.mark.parametrize("image_tokenizer", ["abc", None])
def test_shards_are_cut_anew_and_documents_stay_what_they_are(tmp_path: Path, image_tokenizer: str | None) -> None:
    with ShardWriter(tmp_path / "in", 2, image_tokenizer) as writer:
        for i in range(5):
            writer.write(canonical(f"key{i % 3}"))  # a key comes again in another shard
    report = convert("webdataset", tmp_path / "in", tmp_path / "out", samples_per_shard=10)
    assert (report.documents_out, Split.open(tmp_path / "out").manifest.image_tokenizer) == (5, image_tokenizer)
    found = list(documents(tmp_path / "out"))
    assert [document.key for document in found] == ["key0", "key1", "key2", "key0-000000003", "key1-000000004"]
    for document in found:
        assert document.to_members()["json"] == canonical("x").to_members()["json"]
        assert document.image_bytes == {"0.png": PNG}
        assert list(document.codes) == (["0.npy"] if image_tokenizer else [])


def test_a_key_made_unique_never_meets_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    about, made = canonical("x").to_members()["json"], "a-000000001"
    for number, keys in enumerate((["a"], ["a", made], [made, f"{made}-000000003"])):
        members = [member for key in keys for member in ((f"{key}.json", about), (f"{key}.0.png", PNG))]
        write_tar(tmp_path / f"in/{number}.tar", *members)
    report = convert("webdataset", tmp_path / "in", tmp_path / "out", num_processes=1)
    assert report.documents_out == 5
    assert len({document.key for document in documents(tmp_path / "out")}) == 5


def test_foreign_shards_are_checked_document_by_document(tmp_path: Path) -> None:
    about = canonical("x").to_members()["json"]
    upper = about.replace(b"0.png", b"0.PNG")
    write_tar(
        tmp_path / "a.tar",
        *[
            ("1.json", about),
            ("1.0.png", PNG),
            ("2.json", upper),
            ("2.0.PNG", PNG),
            ("3.json", about),
            ("4.json", b"[]"),
        ],
        *[
            ("5.json", about),
            ("5.0.npy", canonical("x").to_members()["0.npy"]),
            ("6/x.json", about),
            ("6/x.0.png", PNG),
        ],
    )
    report = convert("webdataset", tmp_path / "a.tar", tmp_path / "out")
    image_lost = "image has neither bytes nor codes"  # 5 had codes only, of a tokenizer that nobody names
    assert report.rejected == {
        image_lost: 2,
        "record is not a JSON object": 1,
        "key is empty or holds a dot or a slash": 1,
    }
    assert [document.key for document in documents(tmp_path / "out")] == ["1", "2"]


def test_a_meta_that_json_cannot_hold_rejects_its_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.convert import text

    original = text.draft

    def with_bytes(key: str, record: dict[str, Any], options: Options) -> Any:
        draft: Any = original(key, record, options)
        return dataclasses.replace(draft, meta={"x": b"1"} if key.endswith("0") else {})

    monkeypatch.setattr(text, "draft", with_bytes)
    report = convert("text", write_lines(tmp_path, {"text": "a"}, {"text": "b"}), tmp_path / "out")
    assert report.rejected == {"meta cannot be written as JSON": 1}


def test_another_chat_template_under_the_same_name_makes_the_shards_again(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    source = write_lines(tmp_path, {"image": "a.PNG", "conversations": turns})
    template = tmp_path / "chat.jinja"
    kept = []
    for user in ("User", "User", "Human"):
        text = "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% endif %}: {{ m.content }}\n{% endfor %}"
        template.write_text(text)
        kept.append(convert("chat", source, tmp_path / "out", options=Options(chat_template=template)).shards_kept)
    assert kept == [0, 1, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_the_contract(name: str) -> None:
    module = importlib.import_module(f"data_pipeline.convert.{name}")
    assert set(module.CONTAINERS) <= {"jsonl", "json", "csv", "parquet", "tar", "folder"}
    assert callable(module.draft)
