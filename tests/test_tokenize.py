"""Codes are added to every picture, once, by one tokenizer; an interrupted run goes on and ends with the same bytes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_tokenizer_training import ImageTraining, train_image_tokenizer
from data_pipeline.image_tokens import ImageTokenizer
from data_pipeline.schema import Document
from data_pipeline.shards import Manifest, ShardWriter
from data_pipeline.split import Split
from data_pipeline.tokenize import tokenize
from tests.test_schema import make_document
from uvlm.cli import main

NUM_DOCUMENTS = 11
SHARDS = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]


def png(value: int) -> bytes:
    picture = np.full((16, 16, 3), 240, np.uint8)
    picture[4:12, 4:12] = (value, 0, 255 - value)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def interleaved(key: int, first: bytes, second: bytes) -> Document:
    """A document of two pictures with a text between them."""
    return Document(
        key=f"{key:06d}",
        texts=(None, " and then", None),
        images=("0.png", None, "1.png"),
        task="interleave",
        loss=(False, True, True),
        source="squares",
        meta={"id": key},
        image_bytes={"0.png": first, "1.png": second},
        codes={},
    )


def write_shards(folder: Path, documents: list[Document]) -> Path:
    with ShardWriter(folder, 4) as writer:
        for document in documents:
            writer.write(document)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [interleaved(i, png(20 * i), png(20 * i + 10)) for i in range(NUM_DOCUMENTS)]
    return write_shards(tmp_path_factory.mktemp("data") / "shards", documents)


def make_tokenizer(folder: Path, seed: int) -> Path:
    settings = ImageTraining(steps=2, image_size=16, num_codes=16, batch_size=2, seed=seed)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    train_image_tokenizer(pictures, pictures, folder / "image", settings)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), seed=0)


def run(shards: Path, out: Path, tokenizer: Path, **options: object) -> dict[str, object]:
    """The gate is open: these tokenizers are hardly trained."""
    return vars(tokenize(shards, out, tokenizer, **{"batch_size": 3, "min_psnr": 0.0, **options}))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the folder; a folder inside, which a finished run does not leave, is an error."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(shards: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of `shards`."""
    out = tmp_path_factory.mktemp("whole")
    run(shards, out, tokenizer)
    return contents(out)


def test_every_picture_gets_its_codes_and_nothing_else_changes(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    report = run(shards, tmp_path, tokenizer)
    assert (report["documents"], report["images"], report["rejected"]) == (NUM_DOCUMENTS, 2 * NUM_DOCUMENTS, {})
    images = ImageTokenizer.load(tokenizer / "image")
    before, after = Split.open(shards), Split.open(tmp_path, images.fingerprint)
    assert after.shard_sizes == before.shard_sizes
    for sample in range(NUM_DOCUMENTS):
        old, new = before.read(sample), after.read(sample)
        assert isinstance(old, Document)
        assert isinstance(new, Document)
        members = new.to_members()
        assert members.pop("0.npy") != b""
        assert members.pop("1.npy") != b""
        assert members == old.to_members()
        for stem in ("0", "1"):
            picture = images.preprocess(old.image_bytes[f"{stem}.png"])
            assert np.array_equal(new.codes[f"{stem}.npy"], images.encode(picture[None])[0])


def interrupt_at(documents: int) -> object:
    def progress(stage: str, done: int, total: int) -> None:
        if done >= documents:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_keeps_finished_shards_and_ends_with_the_same_bytes(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "cut", tokenizer, progress=interrupt_at(6))  # in the middle of the second shard
    assert not (tmp_path / "cut" / "manifest.json").exists()
    kept = (tmp_path / "cut" / SHARDS[0]).stat()
    report = run(shards, tmp_path / "cut", tokenizer)
    assert (report["shards_kept"], report["shards_written"]) == (1, 2)
    assert (tmp_path / "cut" / SHARDS[0]).stat().st_ino == kept.st_ino
    assert (report["documents"], report["images"]) == (NUM_DOCUMENTS, 2 * NUM_DOCUMENTS)
    run(shards, tmp_path / "whole", tokenizer)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_second_run_writes_nothing_new(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    run(shards, tmp_path, tokenizer)
    before = contents(tmp_path)
    report = run(shards, tmp_path, tokenizer)
    assert (report["shards_kept"], report["shards_written"], report["documents"]) == (3, 0, NUM_DOCUMENTS)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [SHARDS[1], SHARDS[1] + ".idx", SHARDS[1] + ".done.json"])
@pytest.mark.parametrize("damage", ["byte", "missing"])
def test_a_damaged_shard_is_made_again(shards: Path, tokenizer: Path, tmp_path: Path, name: str, damage: str) -> None:
    run(shards, tmp_path, tokenizer)
    whole = contents(tmp_path)
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        content = bytearray(whole[name])
        content[5] ^= 255
        (tmp_path / name).write_bytes(content)
    report = run(shards, tmp_path, tokenizer)
    assert (report["shards_kept"], report["shards_written"]) == (2, 1)
    assert contents(tmp_path) == whole


def test_another_tokenizer_or_other_shards_leave_no_old_codes(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(shards, out, tokenizer)
    other = make_tokenizer(tmp_path / "other", seed=1)
    assert run(shards, out, other)["shards_written"] == 3
    assert Manifest.load(out).image_tokenizer == ImageTokenizer.load(other / "image").fingerprint
    fewer = write_shards(tmp_path / "fewer", [interleaved(0, png(1), png(2))])
    assert run(fewer, out, other)["shards_written"] == 1
    assert {path.name for path in out.iterdir()} == {
        SHARDS[0],
        SHARDS[0] + ".idx",
        SHARDS[0] + ".done.json",
        "manifest.json",
    }


def test_a_document_with_an_unreadable_picture_is_left_out_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    documents = [interleaved(i, png(i), png(i) if i not in (1, 4, 5) else b"no picture") for i in range(6)]
    shards = write_shards(tmp_path / "shards", documents)  # the second shard holds documents 4 and 5 alone
    report = run(shards, tmp_path / "out", tokenizer)
    assert (report["documents"], report["images"]) == (3, 6)
    assert report["rejected"] == {"image cannot be decoded": 3}
    split = Split.open(tmp_path / "out")
    kept = [split.read(sample) for sample in range(len(split))]
    assert [document.key for document in kept] == ["000000", "000002", "000003"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(each["shard"], each["key"]) for each in listed] == [
        (SHARDS[0], "000001"),
        (SHARDS[1], "000004"),
        (SHARDS[1], "000005"),
    ]
    assert listed[0]["reason"] == "image cannot be decoded: it is of no known format (1.png)"
    again = run(shards, tmp_path / "out", tokenizer)
    assert (again["shards_kept"], again["rejected"]) == (2, report["rejected"])
    better = write_shards(tmp_path / "better", documents[:1])
    assert run(better, tmp_path / "out", tokenizer)["rejected"] == {}
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_shards_without_any_readable_picture_are_an_error(tokenizer: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [interleaved(0, b"no picture", b"")])
    with pytest.raises(ValueError, match="1 x image cannot be decoded"):
        run(shards, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tokenizer_that_does_not_know_such_pictures_is_refused_before_anything_is_written(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"PSNR of .* dB, below 18.*uvlm tokenizer train"):
        tokenize(shards, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_shards_to_read_are_never_the_place_to_write(shards: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="another folder"):
        run(shards, shards, tokenizer)
    assert Split.open(shards).manifest.image_tokenizer is None


def test_codes_are_not_written_to_a_url(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^s3://bucket/tokens is a URL.* local folder"):
        tokenize(shards, "s3://bucket/tokens", tokenizer)
    arguments = ["uvlm", "data", "tokenize", str(shards), "s3://bucket/tokens", "--tokenizer", str(tokenizer)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("error: s3://bucket/tokens is a URL")
    assert not list(tmp_path.iterdir())


def test_codes_of_an_earlier_version_of_this_program_are_made_again(
    shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shards, tmp_path, tokenizer)
    monkeypatch.setattr("data_pipeline.tokenize.CODE_VERSION", 1000)
    assert run(shards, tmp_path, tokenizer)["shards_written"] == 3
    assert run(shards, tmp_path, tokenizer)["shards_kept"] == 3


def test_texts_without_pictures_pass_unchanged(tokenizer: Path, tmp_path: Path) -> None:
    document = Document("000000", ("only words",), (None,), "text", (True,), "s", {}, {}, {})
    shards = write_shards(tmp_path / "shards", [document])
    report = run(shards, tmp_path / "out", tokenizer)
    assert (report["documents"], report["images"], report["psnr"]) == (1, 0, None)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert record["image_tokenizer"] == ImageTokenizer.load(tokenizer / "image").fingerprint


def test_codes_without_pictures_are_the_same_codes(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run(shards, tmp_path, tokenizer)
    report = run(shards, tmp_path, tokenizer, keep_images=False)
    assert report["shards_written"] == 3  # what lay there had pictures
    fingerprint = ImageTokenizer.load(tokenizer / "image").fingerprint
    without = Split.open(tmp_path, fingerprint)
    pictures = Split.open(shards)
    for sample in range(NUM_DOCUMENTS):
        document, original = without.read(sample), pictures.read(sample)
        assert isinstance(document, Document)
        assert isinstance(original, Document)
        assert document.image_bytes == {}
        assert sorted(document.codes) == ["0.npy", "1.npy"]
        assert (document.texts, document.images, document.meta) == (original.texts, original.images, original.meta)
    assert run(shards, tmp_path, tokenizer)["shards_written"] == 3
    assert contents(tmp_path) == whole


def test_shards_without_pictures_cannot_be_tokenized_again(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "codes", tokenizer, keep_images=False)
    with pytest.raises(ValueError, match=f"{NUM_DOCUMENTS} x image has codes but no bytes"):
        run(tmp_path / "codes", tmp_path / "out", tokenizer)


def test_shards_of_another_command_are_not_overwritten(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("in", "other"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write(make_document(name))
    with pytest.raises(ValueError, match="other holds shards of another origin; name another folder"):
        tokenize(tmp_path / "in", tmp_path / "other", tokenizer, min_psnr=0)
    assert Manifest.load(tmp_path / "other").image_tokenizer is None
