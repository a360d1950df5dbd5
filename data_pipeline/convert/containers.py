"""Where records lie: files and folders, cut into chunks that worker processes read on their own.

    jsonl            one object a line                       a chunk is a range of bytes
    json             one array of objects                    a range of bytes
    csv, parquet     .csv and .tsv with a header; rows       a range of bytes, of rows (`tables.py`)
    tar, folder      samples of several members or files     a list of them (`samples.py`)

The main process only looks for the ends of records; decoding them is the workers' part. A chunk never crosses a file,
and chunk k becomes shard k, so what a shard holds depends on the input alone and not on who made it. A record's key is
its number in the whole input.

Cost (run), us a record to cut and to read: jsonl 0.4 and 1.8, json 1.1 and 3.0, csv 0.7 and 1.8, parquet 0.1 and 5.6.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.convert.chunk import Chunk, Files, grouped, read_bytes
from data_pipeline.convert.fields import IMAGE_SUFFIXES, UTF8_MARK, json_object
from data_pipeline.convert.samples import has_captioned_image, sample_record, scan_folder, scan_tar
from data_pipeline.convert.tables import read_csv, read_parquet, scan_csv, scan_parquet
from data_pipeline.schema import Rejected

SUFFIXES = {
    "tar": (".tar",),
    "folder": (),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "json": (".json",),
}  # in a folder that holds several, the first that the format reads is taken: the others are its side files
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tgz")
WHITESPACE = re.compile(r"[ \t\r\n]*")


def find(source: Path, containers: tuple[str, ...]) -> tuple[str, list[Path]]:
    """(container, its files in order) of a file or folder; FileNotFoundError or ValueError says what is missing."""
    suffixes = [suffix for container in containers for suffix in SUFFIXES[container]]
    readable = ", ".join(suffixes) + (" or a folder of images with captions" if "folder" in containers else "")
    if source.is_file():
        for container in containers:
            if source.suffix.lower() in SUFFIXES[container]:
                return container, [source]
        raise ValueError(f"{source} is of no type that this format reads: {readable}; unpack or rename it")
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is missing; give a file or a folder of files: {readable}")
    names = _names(source)
    for container, endings in SUFFIXES.items():
        if container not in containers:
            continue
        if container == "folder" and has_captioned_image(names):
            return container, [source]
        found = [source / name for name in names if name.suffix.lower() in endings]
        if found:
            odd = next((path for path in found if not path.is_file()), None)
            if odd is not None:  # a pipe would be waited for without an end
                raise ValueError(f"{odd} is no ordinary file or a broken link; remove it from the folder")
            return container, found
    if "folder" in containers and any(name.suffix[1:].lower() in IMAGE_SUFFIXES for name in names):
        raise ValueError(f"{source} holds images but no caption beside any; put 0001.txt beside 0001.jpg")
    raise FileNotFoundError(f"{source} holds no file that this format reads: {readable}")


def not_read(source: Path, files: list[Path]) -> dict[str, int]:
    """What a folder holds besides `files` that might be part of the corpus: suffix -> how many, or links to folders."""
    if not source.is_dir():
        return {}
    wanted = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
    if files == [source]:  # images with captions, which a .json may hold
        wanted -= set(SUFFIXES["json"])
    taken = set(files)
    others = [source / name for name in _names(source)]
    found = Counter(path.suffix.lower() for path in others if path not in taken)
    left = {suffix: count for suffix, count in found.items() if suffix in wanted or suffix in PACKED}
    links = sum(Path(folder, name).is_symlink() for folder, names, _ in os.walk(source) for name in names)
    return {**left, **({"links to folders": links} if links else {})}


def _names(source: Path) -> list[Path]:
    """Files below a folder, relative to it, sorted. OSError where a folder cannot be looked into."""

    def refuse(error: OSError) -> None:
        raise error

    return sorted(
        Path(folder, name).relative_to(source)
        for folder, _, names in os.walk(source, onerror=refuse)
        for name in names
        if not name.startswith(".")
    )


def cut(
    container: str, files: list[Path], num_records: int, check_columns: Callable[[list[str]], None] | None = None
) -> Iterator[Chunk]:
    """The chunks of an input, each of at most `num_records` records. ValueError from `check_columns` names the file."""
    first = 0
    for path in files:
        for chunk in _SCANS[container](path, num_records, check_columns):
            yield replace(chunk, first=first)
            first += chunk.num_records


def read(chunk: Chunk) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """(key, record) of each record of a chunk: exactly `num_records`. I/O errors are tried again, then raised."""
    records = _READS[chunk.container](chunk)
    number = chunk.first - 1
    for number, record in enumerate(records, chunk.first):
        key = f"{number:09d}"
        yield key, Rejected(key, record) if isinstance(record, str) else record
    if number + 1 - chunk.first != chunk.num_records:
        raise OSError(f"{chunk.path} has changed while it was read; start again")


def digest(chunk: Chunk) -> str:
    """SHA-256 over the chunk's place and the raw bytes that it is read from, in hex. A parquet chunk brings the one of
    its file along."""
    sha256 = hashlib.sha256(repr(chunk).encode(errors="backslashreplace"))
    with Files() as files:
        for path, start, end in _ranges(chunk):
            sha256.update(files.read(path, start, end))
    return sha256.hexdigest()


def _ranges(chunk: Chunk) -> Iterator[tuple[Path, int, int | None]]:
    if chunk.sha256:
        return
    if chunk.samples:
        for sample in chunk.samples:
            for member in sample.members if sample.reason is None else ():  # what is rejected may be a pipe
                yield (
                    chunk.path / member.file,
                    member.offset,
                    None if member.size is None else member.offset + member.size,
                )
    else:
        yield chunk.path, *chunk.span


# jsonl: a record is a line that is not blank


def _scan_jsonl(path: Path, num_records: int, _: Any) -> Iterator[Chunk]:
    with path.open("rb") as file:
        yield from grouped("jsonl", path, num_records, ((start, end) for start, end, _ in _lines(file)))


def _lines(file: Any) -> Iterator[tuple[int, int, bytes]]:
    end = 0
    for line in file:
        start, end = end, end + len(line)
        if line.strip():
            yield start, end, line


def _read_jsonl(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    content = read_bytes(chunk.path, *chunk.span)
    for _, _, line in _lines(io.BytesIO(content)):
        yield json_object(line)


# json: a record is an element of the array


def _scan_json(path: Path, num_records: int, _: Any) -> Iterator[Chunk]:
    text = read_bytes(path).decode("latin-1")  # a character is a byte; JSON's own characters are ASCII
    yield from grouped("json", path, num_records, _elements(text, is_file=True))


def _elements(text: str, is_file: bool = False) -> Iterator[tuple[int, int]]:
    """Where the values of a JSON array (or of a part of one, or of objects one after the other) begin and end. What
    cannot be understood is one more value up to the end."""
    decoder = json.JSONDecoder(parse_int=str)  # Python refuses to make a number of more than 4,300 digits

    def skip(position: int) -> int:
        match = WHITESPACE.match(text, position)
        assert match is not None
        return match.end()

    position = skip(len(UTF8_MARK) if is_file and text.startswith(UTF8_MARK.decode("latin-1")) else 0)
    is_array = is_file and text.startswith("[", position)
    position = skip(position + 1) if is_array else position
    while position < len(text) and not (is_array and text[position] == "]"):
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = len(text)
        yield position, end
        position = skip(end)
        position = skip(position + 1) if text.startswith(",", position) else position
    if position < len(text) and skip(position + 1) != len(text):
        yield position, len(text)  # something follows the array: counted as one record that is not JSON


def _read_json(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    content = read_bytes(chunk.path, *chunk.span)
    for start, end in _elements(content.decode("latin-1")):
        yield json_object(content[start:end])


# tar and folder


def _scan_samples(container: str) -> Callable[..., Iterator[Chunk]]:
    def scan(path: Path, num_records: int, _: Any) -> Iterator[Chunk]:
        samples = scan_tar(path) if container == "tar" else scan_folder(path)
        for start in range(0, len(samples), num_records):
            part = tuple(samples[start : start + num_records])
            yield Chunk(container, path, 0, len(part), samples=part)

    return scan


def _read_samples(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    with Files() as files:
        for sample in chunk.samples:
            yield sample_record(chunk.path, sample, files)


_SCANS: dict[str, Callable[..., Iterator[Chunk]]] = {
    "jsonl": _scan_jsonl,
    "json": _scan_json,
    "csv": scan_csv,
    "parquet": scan_parquet,
    "tar": _scan_samples("tar"),
    "folder": _scan_samples("folder"),
}
_READS: dict[str, Callable[[Chunk], Iterator[dict[str, Any] | str]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "tar": _read_samples,
    "folder": _read_samples,
    "damaged": _read_samples,  # a file that cannot be read at all: one sample that has only a reason
}
