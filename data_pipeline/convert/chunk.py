"""A part of an input that one worker process reads, and the one door to the bytes of input files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

READ_RETRY_SECONDS = (0.5, 2.0)


@dataclass(frozen=True)
class Member:
    suffix: str  # lower case
    offset: int = 0
    size: int | None = None  # None: the whole file
    file: str = ""  # below the chunk's folder; "" is the tar itself


@dataclass(frozen=True)
class Sample:
    key: str
    members: tuple[Member, ...]
    reason: str | None = None  # why it is rejected


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file (or of one folder of images). Small, so that it can go to another process."""

    container: str
    path: Path
    first: int  # number of its first record in the whole input
    num_records: int
    span: tuple[int, int] = (0, 0)  # bytes, of a parquet file rows
    columns: tuple[str, ...] = ()  # of a csv file
    sha256: str = ""  # of a whole parquet file
    samples: tuple[Sample, ...] = ()  # of a tar or a folder


class Files:
    """Ranges of input files, for the `with` block; the last file stays open, because opening one can cost a round trip
    to a file server."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._path = self._file = None

    def read(self, path: Path, start: int = 0, end: int | None = None) -> bytes:
        """An I/O error is tried again, then raised."""
        for seconds in (*READ_RETRY_SECONDS, None):
            try:
                if self._file is None or path != self._path:
                    self.__exit__()
                    self._path, self._file = path, path.open("rb")
                self._file.seek(start)
                return self._file.read(-1 if end is None else end - start)
            except OSError:
                self.__exit__()  # a stale handle of a network file system is opened anew
                if seconds is None:
                    raise
                time.sleep(seconds)
        raise AssertionError("not reached")


def read_bytes(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """A range of one file."""
    with Files() as files:
        return files.read(path, start, end)


def grouped(
    container: str, path: Path, num_records: int, spans: Iterator[tuple[int, int]], **fields: Any
) -> Iterator[Chunk]:
    start, end, count = 0, 0, 0
    for span_start, span_end in spans:
        if count == 0:
            start = span_start
        end, count = span_end, count + 1
        if count == num_records:
            yield Chunk(container, path, 0, count, (start, end), **fields)
            count = 0
    if count:
        yield Chunk(container, path, 0, count, (start, end), **fields)
