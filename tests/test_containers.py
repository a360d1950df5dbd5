"""Every container gives its records in order, whatever is wrong with some of them."""

import csv
import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.convert import tables
from data_pipeline.convert.chunk import Files
from data_pipeline.convert.containers import cut, digest, find, read
from data_pipeline.schema import Rejected

EVERY = ("jsonl", "json", "csv", "parquet", "tar", "folder")


def records(source: Path, num_records: int = 2) -> list[Any]:
    """Records, and the categories of those that are rejected."""
    container, files = find(source, EVERY)
    found = []
    for chunk in cut(container, files, num_records):
        part = list(read(chunk))
        assert len(part) == chunk.num_records <= num_records
        found += part
    assert [key for key, _ in found] == [f"{number:09d}" for number in range(len(found))]
    return [record.category if isinstance(record, Rejected) else record for _, record in found]


def write_tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar of (name, content); a content that is text is the target of a symlink."""
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_csv(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def test_lines_that_are_not_objects_are_rejected_and_the_others_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{\n"\xff"\n[1]\n' + b"[" * 100_000 + b'\n{"a": 2}')
    broken = ["record is not JSON"] * 2 + ["record is not a JSON object", "record is not JSON"]
    assert records(source) == [{"a": 1}, *broken, {"a": 2}]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_cut_at_its_elements_and_not_inside_their_strings(tmp_path: Path, indent: int | None) -> None:
    source = tmp_path / "a.json"
    elements: list[Any] = [{"text": f'é{i}, "], [' + "\u0085"} for i in range(5)]
    source.write_text(json.dumps([*elements[:3], 7, *elements[3:]], ensure_ascii=indent is None, indent=indent))
    assert records(source) == [*elements[:3], "record is not a JSON object", *elements[3:]]


def test_a_number_that_python_refuses_costs_its_element_only(tmp_path: Path) -> None:
    elements = ['{"a": 1}', '{"a": ' + "9" * 5000 + "}", '{"a": 2.5}']
    (tmp_path / "a.json").write_text("[" + ", ".join(elements) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(elements))
    for name in ("a.json", "a.jsonl"):
        assert records(tmp_path / name) == [{"a": 1}, "record is not JSON", {"a": 2.5}]


def test_an_array_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    for content in ('[{"a": 1}, {"a": 2}, {"a": ', '[{"a": 1}, {"a": 2}] nonsense', '[{"a": 1}, {"a": 2}; {"a": 3}]'):
        source.write_text(content)
        assert records(source, 1) == records(source, 9) == [{"a": 1}, {"a": 2}, "record is not JSON"]
    source.write_text('{"a": 1}\n{"a": 2}\n')  # lines under the name of an array
    assert records(source) == [{"a": 1}, {"a": 2}]
    source.write_text(" [] \n")
    assert records(source) == []


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_row_may_span_lines(tmp_path: Path, name: str) -> None:
    rows = [["a,\tb\n\nc", '"d"'], ["", "e"], ["f", "g\r\nh"]]
    source = write_csv(tmp_path / name, ["one", " two"], *rows)
    assert records(source) == [{"one": one, "two": two} for one, two in rows]


def test_rows_that_do_not_fit_the_header_are_rejected(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    long = b'"' + b"x" * (17 << 20) + b'"'
    source.write_bytes(b"\xef\xbb\xbfone,two\n1,2\n3\n\n4,5,6\n\xff,7\n" + long + b",9\n8,9\n")
    misfit = "row does not have the fields of the header"
    assert records(source)[:4] == [{"one": "1", "two": "2"}, misfit, misfit, "row is not UTF-8"]
    assert records(source)[4:] == records(source, 100)[4:] == [misfit, {"one": "8", "two": "9"}]


def test_parquet_rows_come_in_order_over_row_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"row {i}", "image": {"bytes": bytes([i]), "path": None}} for i in range(11)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    for num_records in (1, 3, 4, 100):
        assert records(tmp_path / "a.parquet", num_records) == rows


def test_a_damaged_parquet_file_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in "abc":
        pq.write_table(pa.table({"text": [name * 50, name]}), tmp_path / f"{name}.parquet", compression="zstd")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    unreadable = "parquet file cannot be read"
    assert records(tmp_path) == [unreadable, unreadable, unreadable, {"text": "c" * 50}, {"text": "c"}]


def test_a_damaged_footer_costs_its_file_only(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"] * 50}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    unreadable = 0
    for position in range(start, len(content) - 8, 7):
        for byte in (b"\x00", b"\xff"):
            (tmp_path / "a.parquet").write_bytes(content[:position] + byte + content[position + 1 :])
            unreadable += records(tmp_path / "a.parquet", 50)[:1] == ["parquet file cannot be read"]
    assert unreadable > 50


def write_parquet(path: Path, num_rows: int) -> list[dict[str, Any]]:
    """One row group, several pages and batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"row {i} " * 20} for i in range(num_rows)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", data_page_size=1000, use_dictionary=False)
    return rows


class Reads:
    """What reading parquet files does: the rows that are decoded, and the errors of a disk in place of some batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import pyarrow.parquet as pq

        self.num_rows = 0
        self.errors: list[int | None] = []  # of the next batches
        original = pq.ParquetFile.iter_batches

        def iter_batches(file: Any, *args: Any, **keywords: Any) -> Iterator[Any]:
            for batch in original(file, *args, **keywords):
                number = self.errors.pop(0) if self.errors else None
                if number is not None:
                    raise OSError(number, "Input/output error")
                self.num_rows += batch.num_rows
                yield batch

        monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
        monkeypatch.setattr(tables, "READ_RETRY_SECONDS", (0, 0))
        monkeypatch.setattr(tables, "ROWS_AT_ONCE", 8)


def test_a_disk_that_fails_is_tried_again_then_told_and_never_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, reads = write_parquet(tmp_path / "a.parquet", 100), Reads(monkeypatch)
    for at in range(5):
        reads.errors = [None] * at + [errno.EIO, errno.EIO]
        assert records(tmp_path / "a.parquet", 30) == rows
        os.utime(tmp_path / "a.parquet", (at, at))
    reads.errors = [errno.EIO] * 3
    with pytest.raises(OSError, match="Input/output error"):
        records(tmp_path / "a.parquet")


def test_a_row_group_of_many_chunks_is_read_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, reads = write_parquet(tmp_path / "a.parquet", 1000), Reads(monkeypatch)
    num_bytes = 0
    original = Files.read

    def read_counted(*args: Any) -> bytes:
        nonlocal num_bytes
        content = original(*args)
        num_bytes += len(content)
        return content

    monkeypatch.setattr(Files, "read", read_counted)
    chunks = list(cut("parquet", [tmp_path / "a.parquet"], 10))
    assert len({digest(chunk) for chunk in chunks}) == 100
    assert [record for chunk in chunks for _, record in read(chunk)] == rows
    assert num_bytes == (tmp_path / "a.parquet").stat().st_size
    assert reads.num_rows == 1000
    assert [record for _, record in read(chunks[3])] == rows[30:40], "and back again"


def test_rows_before_a_damaged_page_are_kept_whatever_the_chunks(tmp_path: Path) -> None:
    rows = write_parquet(tmp_path / "a.parquet", 1000)
    content = (tmp_path / "a.parquet").read_bytes()
    middle = content.index(b"row 500 ") - 40
    (tmp_path / "a.parquet").write_bytes(content[:middle] + b"\xff" * 40 + content[middle + 40 :])
    found = records(tmp_path / "a.parquet", 30)
    num_kept = found.index("parquet file cannot be read")
    assert 400 < num_kept < 500
    assert found == [*rows[:num_kept], *["parquet file cannot be read"] * (1000 - num_kept)]
    assert records(tmp_path / "a.parquet", 1000) == found


def test_members_of_a_tar_sample_are_found_wherever_they_lie(tmp_path: Path) -> None:
    # webdataset's rule (https://github.com/webdataset/webdataset, "The WebDataset Format"): the key ends at the first
    # dot of the file name and includes the folder.
    write_tar(
        tmp_path / "a.tar",
        *[("./x/1.JPG", b"one"), ("2.json", b"{}"), ("x/1.TXT", b"text"), ("2.0.jpg", b"two"), ("x/1.cls", b"")],
    )
    first = {"__key__": "x/1", "jpg": b"one", "txt": b"text", "cls": b""}
    assert records(tmp_path) == [first, {"__key__": "2", "json": b"{}", "0.jpg": b"two"}]


@pytest.mark.parametrize(
    ("member", "category"),
    [
        (("../x.jpg", b"1"), "tar member climbs out of the archive"),
        (("/x.jpg", b"1"), "tar member climbs out of the archive"),
        (("x.jpg", "/etc/passwd"), "tar member is not an ordinary file"),
        (("README", b"1"), "tar member has no name of a key, a dot and a suffix"),
        (("._a.jpg", b"1"), "tar member has no name of a key, a dot and a suffix"),
    ],
)
def test_a_hostile_member_costs_its_sample_only(tmp_path: Path, member: tuple[str, Any], category: str) -> None:
    write_tar(tmp_path / "a.tar", ("a.jpg", b"1"), member, ("b.jpg", b"2"))
    good = [{"__key__": "a", "jpg": b"1"}, {"__key__": "b", "jpg": b"2"}]
    assert records(tmp_path) == [good[0], category, good[1]]


def test_a_sample_with_one_bad_member_is_rejected_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("a.jpg", b"1"), ("a.txt", "b.txt"), ("b.jpg", b"2"), ("b.JPG", b"3"), ("b.txt", b""))
    assert records(tmp_path) == ["tar member is not an ordinary file", "tar member comes twice"]


def test_a_tar_cut_anywhere_keeps_exactly_the_samples_that_are_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", *((f"{i}.{kind}", b"x" * 600) for i in range(3) for kind in ("jpg", "txt")))
    content = path.read_bytes()
    sample = 2 * (512 + 1024)
    whole = [{"__key__": str(i), "jpg": b"x" * 600, "txt": b"x" * 600} for i in range(3)]
    for end in range(sample, 3 * sample + 1, 256):
        path.write_bytes(content[:end])
        found = records(path)
        num_touched = -(-end // sample)  # the last of these may be incomplete, and there is no end mark to tell
        if end % sample and end % sample < 512:
            num_touched -= 1  # its first header is cut, so nothing of it is known; the one before is the last
        assert found == [*whole[: num_touched - 1], "tar is cut"], end


def test_files_that_are_no_tar_or_joined_ones_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))
    content = path.read_bytes()
    path.write_bytes(content + content.replace(b"a.jpg", b"b.jpg"))
    assert records(path) == [{"__key__": "a", "jpg": b"1"}, "tar cannot be read"]
    path.write_bytes(b"\x1f\x8b" + b"x" * 5000)
    assert records(path) == ["tar cannot be read"]
    write_tar(path)
    assert records(path) == []


def test_a_folder_of_images_is_read_with_its_captions_by_stem(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for name in (
        "b/2.v1.PNG",
        "b/2.v1.txt",
        "a.jpg",
        "a.json",
        "lone.gif",
        "notes.txt",
        ".hidden.jpg",
        "c.jpg",
        "c.png",
    ):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "outside.jpg").write_bytes(b"1")
    (folder / "link.jpg").symlink_to("../outside.jpg")
    assert records(folder) == [
        {"__key__": "a", "jpg": b"a.jpg", "json": b"a.json"},
        {"__key__": "b/2.v1", "png": b"b/2.v1.PNG", "txt": b"b/2.v1.txt"},
        "several files have the same stem",
        "image path leaves the image root",
        {"__key__": "lone", "gif": b"lone.gif"},
    ]


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("1.jpg", "1.txt", "2.txt"):
        (tmp_path / name).write_bytes(name.encode())
    os.mkfifo(tmp_path / "2.jpg")
    assert records(tmp_path) == [{"__key__": "1", "jpg": b"1.jpg", "txt": b"1.txt"}, "file is not an ordinary file"]
    assert _digests(tmp_path, "folder")
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is no ordinary file"):
        find(tmp_path, ("jsonl",))


def test_files_of_a_folder_are_read_in_sorted_order_and_side_files_left(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(f'{{"name": "{name}"}}\n')
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / "picture.jpg").write_bytes(b"1")
    assert records(tmp_path) == [{"name": "a.jsonl"}, {"name": "sub/b.jsonl"}]


def test_what_a_format_does_not_read_is_an_error_that_says_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.zip is of no type .*\.jsonl, \.ndjson"):
        find(tmp_path / "a.zip", ("jsonl",))
    with pytest.raises(FileNotFoundError, match=r"holds no file that this format reads: \.tar"):
        find(tmp_path, ("tar",))
    (tmp_path / "a.jpg").write_bytes(b"1")
    with pytest.raises(ValueError, match="no caption beside any"):
        find(tmp_path, EVERY)


@pytest.mark.parametrize("container", ["jsonl", "csv", "json", "tar", "folder", "parquet"])
def test_the_digest_of_a_chunk_tells_a_changed_byte_from_a_touched_file(tmp_path: Path, container: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    _write_any(source, container, b"first")
    before = _digests(source, container)
    _write_any(source, container, b"first")
    assert _digests(source, container) == before
    _write_any(source, container, b"other")
    assert all(a != b for a, b in zip(_digests(source, container), before, strict=True))


def _digests(source: Path, container: str) -> list[str]:
    found, files = find(source, EVERY)
    assert found == container
    return [digest(chunk) for chunk in cut(container, files, 100)]


def _write_any(folder: Path, container: str, word: bytes) -> None:
    if container == "tar":
        write_tar(folder / "a.tar", ("1.jpg", word))
    elif container == "folder":
        (folder / "1.jpg").write_bytes(word)
        (folder / "1.txt").write_bytes(b"x")
    elif container == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": [word]})
        pq.write_table(table, folder / "a.parquet", write_statistics=False, compression="none")
    else:
        text = word.decode()
        content = {"jsonl": f'{{"a": "{text}"}}\n', "json": f'[{{"a": "{text}"}}]', "csv": f"a\n{text}\n"}[container]
        (folder / f"a.{container}").write_text(content)


def test_a_column_that_python_cannot_hold_costs_no_document(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipeline.convert import convert

    times = pa.array([1_700_000_000_000_000_001] * 3, pa.timestamp("ns"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "crawled": times}), tmp_path / "t.parquet")
    report = convert("text", tmp_path / "t.parquet", tmp_path / "out")
    assert (report.documents_out, report.rejected) == (3, {})
