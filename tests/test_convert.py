"""Foreign files become shards; bad lines are counted, never a crash."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.convert import FORMATS, convert
from data_pipeline.schema import Document, Rejected
from data_pipeline.split import Split

PNG = b"\x89PNG not decoded here"


def write_lines(folder: Path, *lines: Any) -> Path:
    """A .jsonl of objects, or of raw bytes as they are; one image beside it."""
    (folder / "a.PNG").write_bytes(PNG)
    source = folder / "easy.jsonl"
    source.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return source


def documents(folder: Path) -> Iterator[Document]:
    split = Split.open(folder)
    for i in range(len(split)):
        document = split.read(i)
        assert isinstance(document, Document), document
        yield document


def test_vqa_has_loss_exactly_on_the_answers(tmp_path: Path) -> None:
    questions = [["what color?", "blue"], ["is it a circle? ", " no"]]
    source = write_lines(tmp_path, {"image": "a.PNG", "questions": questions, "id": "x.1"})
    report = convert("vqa", source, tmp_path / "out")
    assert (report.documents_in, report.documents_out, report.rejected) == (1, 1, {})
    (document,) = documents(tmp_path / "out")
    assert document.texts == (None, "what color?", " blue", "is it a circle? ", " no")
    assert document.images == ("0.png", None, None, None, None)
    assert document.loss == (False, False, True, False, True)
    assert (document.task, document.source, document.meta) == ("understand", "easy", {"id": "x.1"})
    assert document.image_bytes == {"0.png": PNG}


def test_pairs_have_loss_on_the_image(tmp_path: Path) -> None:
    source = write_lines(tmp_path, {"image": str(tmp_path / "a.PNG"), "caption": "a blue rectangle"})
    convert("pairs", source, tmp_path / "out")
    (document,) = documents(tmp_path / "out")
    assert (document.texts, document.images) == (("a blue rectangle", None), (None, "0.png"))
    assert (document.task, document.loss, document.image_bytes) == ("generate", (False, True), {"0.png": PNG})


@pytest.mark.parametrize("name", ["vqa", "pairs"])
def test_bad_lines_are_counted_by_reason_and_good_ones_kept(tmp_path: Path, name: str) -> None:
    good = {"image": "a.PNG", "caption": "a circle", "questions": [["what?", "blue"]]}
    bad: dict[str, list[Any]] = {
        "line is not JSON": [b"{", b'"\xff"', b"[" * 100_000],
        "line is not a JSON object": [[1], "text"],
        "image is missing": [{**good, "image": "b.png"}],
        "image is of an unknown type": [{**good, "image": "easy.jsonl"}, {**good, "image": "."}],
        "image path is missing": [{**good, "image": None}, {**good, "image": ""}, {**good, "image": "a\0.png"}],
    }
    if name == "vqa":
        broken = [None, [], "ab", [["what?"]], [["what?", ""]], [[" ", "a"]], [["a", 1]], [["a", "\ud800"]]]
        bad["questions are not a list of question and answer, at least one"] = [
            {**good, "questions": questions} for questions in broken
        ]
    else:
        bad["caption is missing or empty"] = [{**good, "caption": caption} for caption in (" ", 3, "\ud800")]
    lines = [good, *(line for broken in bad.values() for line in broken), b"", {**good, "id": "\ud800"}]
    progress: list[int] = []
    report = convert(name, write_lines(tmp_path, *lines), tmp_path / "out", progress=progress.append)
    assert report.rejected == {category: len(broken) for category, broken in bad.items()}
    assert (report.documents_in, report.documents_out) == (len(lines) - 1, 2)
    assert progress == list(range(1, len(lines)))
    assert len(list(documents(tmp_path / "out"))) == 2


def test_shards_roll_over_and_are_equal_when_made_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path, *[{"image": "a.PNG", "caption": f"number {i}"} for i in range(5)])
    for out in ("a", "b"):
        convert("pairs", source, tmp_path / out, samples_per_shard=2)
    split = Split.open(tmp_path / "a")
    assert split.shard_sizes == [2, 2, 1]
    assert split.manifest == Split.open(tmp_path / "b").manifest


def test_an_interrupted_conversion_is_not_taken_for_finished(tmp_path: Path) -> None:
    source = write_lines(tmp_path, *[{"image": "a.PNG", "caption": f"number {i}"} for i in range(5)])

    def interrupt(num_documents: int) -> None:
        if num_documents == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("pairs", source, tmp_path / "out", samples_per_shard=2, progress=interrupt)
    with pytest.raises(FileNotFoundError):
        Split.open(tmp_path / "out")
    convert("pairs", source, tmp_path / "out", samples_per_shard=2)
    assert len(Split.open(tmp_path / "out")) == 5


def test_an_unknown_format_or_source_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'pairs'"):
        convert("pair", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="known formats are pairs, vqa"):
        convert("zzz", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        convert("vqa", tmp_path / "none.jsonl", tmp_path / "out")


def test_a_source_without_one_good_line_is_an_error_and_leaves_nothing_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line is not JSON \(1\)"):
        convert("vqa", write_lines(tmp_path, b"{"), tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        Split.open(tmp_path / "out")


def test_every_format_yields_documents_or_rejections(tmp_path: Path) -> None:
    source = write_lines(tmp_path, {"image": "a.PNG"}, {"image": "a.PNG", "caption": "c", "questions": [["q", "a"]]})
    for read in FORMATS.values():
        assert [type(item) for item in read(source)] == [Rejected, Document]


def test_a_conversion_that_finds_nothing_leaves_a_finished_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "a.PNG").write_bytes(b"png")
    source = write_lines(tmp_path, {"image": "a.PNG", "caption": "a circle"})
    convert("pairs", source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    source.write_text("no json\n")
    with pytest.raises(ValueError, match="no document that can be used"):
        convert("pairs", source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
