"""Foreign files become shards; bad lines are counted, never a crash."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.convert import Options, convert
from data_pipeline.schema import Document
from data_pipeline.split import Split
from tests.test_containers import write_tar
from tests.test_convert_images import picture

PNG = picture()


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
        "record is not JSON": [b"{", b'"\xff"', b"[" * 100_000],
        "record is not a JSON object": [[1], "text"],
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
    source = write_lines(tmp_path, *lines)
    report = convert(name, source, tmp_path / "out", samples_per_shard=4, num_processes=1, progress=progress.append)
    assert report.rejected == {category: len(broken) for category, broken in bad.items()}
    assert (report.documents_in, report.documents_out) == (len(lines) - 1, 2)
    assert progress == [*range(4, len(lines) - 1, 4), len(lines) - 1]
    listed = [
        json.loads(line)["reason"].partition(":")[0]
        for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    ]
    assert sorted(listed) == sorted(category for category, broken in bad.items() for _ in broken)
    assert len(list(documents(tmp_path / "out"))) == 2


def test_an_unknown_format_or_source_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'pairs'"):
        convert("pair", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="known formats are pairs, vqa, obelics, mmc4, webdataset, chat, text"):
        convert("zzz", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        convert("vqa", tmp_path / "none.jsonl", tmp_path / "out")


def test_a_source_without_one_good_line_is_an_error_and_leaves_nothing_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record is not JSON \(1\)"):
        convert("vqa", write_lines(tmp_path, b"{"), tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        Split.open(tmp_path / "out")


def test_a_conversion_that_finds_nothing_leaves_a_finished_folder_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path, {"image": "a.PNG", "caption": "a circle"})
    convert("pairs", source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    source.write_text("no json\n")
    with pytest.raises(ValueError, match="no document that can be used"):
        convert("pairs", source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def write_captions(folder: Path, num_documents: int) -> Path:
    return write_lines(folder, *[{"image": "a.PNG", "caption": f"number {i}"} for i in range(num_documents)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_equal_whoever_makes_them(tmp_path: Path) -> None:
    source = write_captions(tmp_path, 9)
    for num_processes in (1, 2):
        convert("pairs", source, tmp_path / f"{num_processes}", samples_per_shard=2, num_processes=num_processes)
    assert Split.open(tmp_path / "1").shard_sizes == [2, 2, 2, 2, 1]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert [document.texts[0] for document in documents(tmp_path / "1")] == [f"number {i}" for i in range(9)]


def test_an_interrupted_conversion_keeps_its_finished_shards_and_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    source = write_captions(tmp_path, 5)

    def interrupt(num_documents: int) -> None:
        if num_documents == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("pairs", source, tmp_path / "out", samples_per_shard=2, num_processes=1, progress=interrupt)
    with pytest.raises(FileNotFoundError):
        Split.open(tmp_path / "out")
    report = convert("pairs", source, tmp_path / "out", samples_per_shard=2, num_processes=1)
    assert (report.shards_kept, report.shards_written, report.documents_out) == (2, 1, 5)
    convert("pairs", source, tmp_path / "whole", samples_per_shard=2, num_processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_only_shards_whose_input_options_or_bytes_changed_are_made_again(tmp_path: Path) -> None:
    source = write_captions(tmp_path, 6)
    out = tmp_path / "out"

    def kept(**options: Any) -> int:
        return convert("pairs", source, out, samples_per_shard=2, num_processes=1, **options).shards_kept

    assert [kept(), kept()] == [0, 3]
    os.utime(source, (1, 1))
    assert kept() == 3
    source.write_bytes(source.read_bytes().replace(b"number 3", b"numbre 3"))
    assert kept() == 2
    (out / "shard-000002.tar").write_bytes(b"x")
    (out / "shard-000000.tar.done.json").write_text("{")
    assert kept() == 1
    assert kept(options=Options(text_column="caption")) == 0
    assert [document.texts[0] for document in documents(out)][2:4] == ["number 2", "numbre 3"]


def test_a_finished_folder_is_unfinished_from_its_first_changed_shard_on(tmp_path: Path) -> None:
    def interrupt(num_documents: int) -> None:
        raise KeyboardInterrupt

    source = write_captions(tmp_path, 4)
    convert("pairs", source, tmp_path / "out", samples_per_shard=2, num_processes=1)
    for change, is_finished in (("number 0", True), ("changed", False)):
        source.write_bytes(source.read_bytes().replace(b"number 0", change.encode()))
        with pytest.raises(KeyboardInterrupt):
            convert("pairs", source, tmp_path / "out", samples_per_shard=2, num_processes=1, progress=interrupt)
        assert (tmp_path / "out/manifest.json").exists() == is_finished


def test_an_input_that_shrank_leaves_no_shard_or_record_of_before(tmp_path: Path) -> None:
    convert("pairs", write_captions(tmp_path, 6), tmp_path / "out", samples_per_shard=2, num_processes=1)
    (tmp_path / "out/mine.txt").write_text("stays")
    convert("pairs", write_captions(tmp_path, 1), tmp_path / "out", samples_per_shard=2, num_processes=1)
    shard = [f"shard-000000.tar{suffix}" for suffix in ("", ".done.json", ".idx")]
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", "mine.txt", "rejected.jsonl", *shard]


def test_a_chunk_without_one_usable_document_has_a_record_and_no_shard(tmp_path: Path) -> None:
    good = {"image": "a.PNG", "caption": "c"}
    source = write_lines(tmp_path, b"{", b"[]", good, good, b"{", b"{")
    for shards_kept in (0, 3):
        report = convert("pairs", source, tmp_path / "out", samples_per_shard=2, num_processes=1)
        assert (report.documents_in, report.documents_out, report.shards_kept) == (6, 2, shards_kept)
        assert report.rejected == {"record is not JSON": 3, "record is not a JSON object": 1}
        assert [shard.name for shard in Split.open(tmp_path / "out").manifest.shards] == ["shard-000001.tar"]
        listed = [json.loads(line)["key"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
        assert listed == ["000000000", "000000001", "000000004", "000000005"]


def test_an_empty_input_is_told_and_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no document that can be used: it is empty"):
        convert("pairs", tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_not_written_where_they_would_be_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("1.jpg", PNG), ("1.txt", b"c"))
    for source, out in ((tmp_path, tmp_path), (tmp_path, tmp_path / "sub/out"), (tmp_path / "a.tar", tmp_path)):
        with pytest.raises(ValueError, match="would be read again"):
            convert("pairs", source, out)
    assert sorted(contents(tmp_path)) == ["a.tar"]
    with pytest.raises(ValueError, match="is a file"):
        convert("pairs", tmp_path, tmp_path / "a.tar")


def test_two_conversions_never_write_one_folder_at_once(tmp_path: Path) -> None:
    source, out = write_captions(tmp_path, 4), tmp_path / "out"

    def try_another(num_documents: int) -> None:
        with pytest.raises(
            ValueError, match=r"another conversion is writing .*out; wait for it or name another folder"
        ):
            convert("pairs", source, out, num_processes=1)

    report = convert("pairs", source, out, samples_per_shard=2, num_processes=1, progress=try_another)
    assert (report.documents_out, report.shards_written) == (4, 2)
    assert convert("pairs", source, out, samples_per_shard=2, num_processes=1).shards_kept == 2
    assert not list(out.glob("*lock*"))


def test_a_file_system_without_locks_is_written_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert convert("pairs", write_captions(tmp_path, 1), tmp_path / "out").documents_out == 1


def test_finished_shards_of_another_corpus_are_not_replaced(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}", "caption": "c", "image": "a.PNG"}}\n')
    convert("text", tmp_path / "a.jsonl", tmp_path / "out")
    before = contents(tmp_path / "out")
    for format_name, name in (("text", "b.jsonl"), ("pairs", "a.jsonl")):
        with pytest.raises(ValueError, match=r"out holds shards made from .*a\.jsonl as text; name another"):
            convert(format_name, tmp_path / name, tmp_path / "out")
    (tmp_path / "out/shard-000000.tar.done.json").unlink()
    with pytest.raises(ValueError, match="of another origin"):
        convert("text", tmp_path / "a.jsonl", tmp_path / "out")
    (tmp_path / "out/shard-000000.tar.done.json").write_bytes(before["shard-000000.tar.done.json"])
    assert contents(tmp_path / "out") == before
    (tmp_path / "link").symlink_to(".")
    assert convert("text", tmp_path / "link/a.jsonl", tmp_path / "out").documents_out == 1, "the same file"


def test_urls_are_refused_as_source_and_as_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uvlm.cli import app

    monkeypatch.chdir(tmp_path)
    source = write_captions(tmp_path, 1)
    for places in ((str(source), "s3://bucket/shards"), ("https://host/a.jsonl", "out")):
        result = CliRunner().invoke(app, ["data", "convert", "pairs", *places])
        assert "is a URL" in str(result.exception)
    assert sorted(contents(tmp_path)) == ["a.PNG", "easy.jsonl"]


@pytest.mark.parametrize("name", ["samples_per_shard", "num_processes"])
def test_counts_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        convert("pairs", write_captions(tmp_path, 1), tmp_path / "out", **{name: 0})  # type: ignore[arg-type]


def test_a_missing_image_root_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image root .*none is missing"):
        convert("pairs", write_captions(tmp_path, 1), tmp_path / "out", options=Options(image_root=tmp_path / "none"))


def test_a_worker_that_dies_is_told_and_the_run_goes_on_later(tmp_path: Path) -> None:
    source = write_captions(tmp_path, 6)
    chunk_of_death = _Death(os.getpid())

    def chunks(*args: Any) -> Iterator[Any]:
        for chunk in original(*args):
            yield dataclasses.replace(chunk, columns=(chunk_of_death,)) if chunk.first == 4 else chunk

    import data_pipeline.convert.conversion as package

    original = package.cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "cut", chunks)
        with pytest.raises(ValueError, match="a worker process has died"):
            convert("pairs", source, tmp_path / "out", samples_per_shard=1, num_processes=2)
    assert convert("pairs", source, tmp_path / "out", samples_per_shard=1, num_processes=2).documents_out == 6


class _Death(str):
    """Kills the process that unpickles it."""

    def __new__(cls, parent: int) -> "_Death":
        return super().__new__(cls, "death")

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_ctrl_c_ends_every_process_and_leaves_no_manifest(tmp_path: Path) -> None:
    source = write_captions(tmp_path, 100)
    code = (
        "import signal, sys, time; from data_pipeline.convert import convert\n"
        "def tell(n):\n"
        "    print(n, flush=True)\n"
        "    for _ in range(1200): time.sleep(0.05)  # short: a signal just before a sleep does not end it\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it\n"
        "    try: convert('pairs', sys.argv[1], sys.argv[2], samples_per_shard=10, num_processes=2, progress=tell)\n"
        "    except KeyboardInterrupt: print('stopped')\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, all of which the terminal's Ctrl-C would reach
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)  # ends only when every process that holds the pipe has ended
    assert (output.splitlines()[-1], errors, process.returncode) == ("stopped", "", 0)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not (tmp_path / "out/.converting").exists()
    report = convert("pairs", source, tmp_path / "out", samples_per_shard=10, num_processes=2)
    assert report.documents_out == 100
    assert 0 < report.shards_kept < 10


def test_a_folder_with_shards_of_others_is_left_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path, {"text": "a"})
    for name in ("shard-000007.tar", "manifest.json"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_bytes(b"precious")
        with pytest.raises(ValueError, match="of another origin; name another folder"):
            convert("text", source, out)
        assert (out / name).read_bytes() == b"precious"


def test_images_that_come_later_are_asked_for_where_that_is_wanted(tmp_path: Path) -> None:
    lines = [{"image": f"{name}.png", "caption": name} for name in ("here", "late")]
    (tmp_path / "here.png").write_bytes(PNG)
    source = write_lines(tmp_path, *lines)
    assert convert("pairs", source, tmp_path / "out").rejected == {"image is missing": 1}
    (tmp_path / "late.png").write_bytes(PNG)
    again = convert("pairs", source, tmp_path / "out")
    assert (again.documents_out, again.shards_kept, again.lacking_images) == (1, 1, 1)
    retried = convert("pairs", source, tmp_path / "out", retry_images=True)
    assert (retried.documents_out, retried.rejected, retried.lacking_images) == (2, {}, 0)
    assert convert("pairs", source, tmp_path / "out", retry_images=True).shards_kept == 1


def test_what_of_a_folder_is_not_read_is_told(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "README.md"):
        (folder / name).write_text('{"text": "a"}\n')
    (folder / "part").symlink_to(elsewhere)
    report = convert("text", folder, tmp_path / "out")
    assert report.documents_out == 1
    assert report.not_read == {".gz": 1, ".csv": 1, "links to folders": 1}


def test_the_list_of_rejected_documents_names_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "b.jsonl").write_text('{"text": ""}\n')
    convert("text", folder, tmp_path / "out")
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"input": "b.jsonl", "key": "000000001", "reason": "text is missing or empty"}
