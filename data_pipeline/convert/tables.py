"""Tables: .csv and .tsv with a header, parquet.

A csv is cut at the ends of its rows, which may span lines. A worker decodes a row group of a parquet file once for all
the chunks of it that come its way, because rows inside a group cannot be reached without the ones before; only a few
rows are in memory at a time. Of a file of 200 MB in one row group that is 150 MB instead of 700, all told (run).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.convert.chunk import READ_RETRY_SECONDS, Chunk, Files, Sample, grouped, read_bytes
from data_pipeline.convert.fields import is_encodable
from data_pipeline.shards import PIECE

MAX_CSV_FIELD = 16 << 20  # characters; a lost quotation mark must not swallow all memory
PARQUET_BUFFER = 1 << 20  # bytes of a column read at once, so that a row group is never in memory as a whole
ROWS_AT_ONCE = 64  # decoded together; they may hold images

T = TypeVar("T")


# csv: a record is a row, which may span lines


def scan_csv(path: Path, num_records: int, check_columns: Callable[[list[str]], None] | None) -> Iterator[Chunk]:
    with path.open("rb") as file:
        rows = _rows(file, path)
        header = next(rows, None)
        if header is None:
            return
        columns = [] if header[2] is None else [name.strip() for name in header[2]]
        _check(check_columns, columns, path)
        spans = ((start, end) for start, end, _ in rows)
        yield from grouped("csv", path, num_records, spans, columns=tuple(columns))


def _rows(file: Any, path: Path) -> Iterator[tuple[int, int, list[str] | None]]:
    """(first byte, end, fields) of each row that is not empty; None for fields that are not CSV."""
    csv.field_size_limit(MAX_CSV_FIELD)
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            text = line.decode("utf-8", "surrogateescape")
            text = text.removeprefix("\ufeff") if position == 0 else text
            position += len(line)
            yield text

    source = lines()
    while True:
        start = position
        try:
            for row in csv.reader(source, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
                if row:
                    yield start, position, row
                start = position
            return
        except csv.Error:
            yield start, position, None


def read_csv(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    content = read_bytes(chunk.path, *chunk.span)
    for _, _, row in _rows(io.BytesIO(content), chunk.path):
        if row is None or len(row) != len(chunk.columns):
            yield "row does not have the fields of the header"
        elif not all(map(is_encodable, row)):
            yield "row is not UTF-8"
        else:
            yield dict(zip(chunk.columns, row, strict=True))


# parquet: a record is a row


class _DamagedError(Exception):
    """A file whose content is not what it should be; never leaves this module."""


def scan_parquet(path: Path, num_records: int, check_columns: Callable[[list[str]], None] | None) -> Iterator[Chunk]:
    identity = _identity(path)
    try:
        columns, sizes = _layout(path, identity)
    except _DamagedError as error:
        yield Chunk("damaged", path, 0, 1, samples=(Sample(path.stem, (), str(error)),))
        return
    _check(check_columns, list(columns), path)
    num_rows = sum(sizes)
    sha256 = _sha256(path, identity[0])  # once for all chunks, because the bytes of one cannot be told from the others
    for start in range(0, num_rows, num_records):
        stop = min(start + num_records, num_rows)
        yield Chunk("parquet", path, 0, stop - start, (start, stop), sha256=sha256)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _attempt(work: Callable[[], T]) -> T:
    """The result of `work` on a parquet file. An I/O error is tried again, then raised; _DamagedError for anything
    else: pyarrow raises OSError for damage too, but only the operating system's have a number."""
    import pyarrow as pa

    for seconds in (*READ_RETRY_SECONDS, None):
        try:
            return work()
        except OSError as error:
            if error.errno is None:
                raise _DamagedError(f"parquet file cannot be read: {_one_line(error)}") from None
            if seconds is None:
                raise
            time.sleep(seconds)
        except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
            raise _DamagedError(f"parquet file cannot be read: {_one_line(error)}") from None
    raise AssertionError("not reached")


@functools.lru_cache(maxsize=4)
def _layout(path: Path, identity: tuple[int, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Columns and the rows of each row group, from the footer; _DamagedError where it cannot be understood. No more is
    asked for, because pyarrow ends the process where it shows the details of a damaged column."""
    import pyarrow.parquet as pq

    def read() -> tuple[tuple[str, ...], tuple[int, ...]]:
        with pq.ParquetFile(path) as file:
            metadata, columns = file.metadata, tuple(file.schema_arrow.names)
        sizes = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        if sum(sizes) != metadata.num_rows or min(sizes, default=0) < 0:
            raise ValueError("its footer contradicts itself about the number of rows")
        return columns, sizes

    return _attempt(read)


def _touched(chunk: Chunk, identity: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(row group, first row, end) inside each row group that the chunk touches."""
    end = 0
    for number, size in enumerate(_layout(chunk.path, identity)[1]):
        start, end = end, end + size
        first, last = max(chunk.span[0], start), min(chunk.span[1], end)
        if first < last:
            yield number, first - start, last - start


def _sha256(path: Path, size: int) -> str:
    sha256 = hashlib.sha256()
    with Files() as files:
        for start in range(0, size, PIECE):
            sha256.update(files.read(path, start, min(start + PIECE, size)))
    return sha256.hexdigest()


class _Rows:
    """The rows of one row group, read from the first on: what lies before a row must be decoded to reach it. One is
    kept in each worker, because the chunks of a group come its way in their order."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self._damage: tuple[int, str] | None = None  # first row that cannot be reached, and why
        self._restart()

    def _restart(self) -> None:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=PARQUET_BUFFER)
        self._batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[self.number], use_threads=False)
        self._batch: Any = None
        self._start = self._end = 0  # rows of the batch

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | str]:
        import pyarrow as pa

        for row in range(start, stop):
            if self._damage is not None and row >= self._damage[0]:
                yield self._damage[1]
                continue
            try:
                batch, position = _attempt(functools.partial(self._find, row))
            except _DamagedError as error:
                self._damage = row, str(error)
                yield str(error)
                continue
            try:
                yield batch.slice(position, 1).to_pylist()[0]
            except (pa.ArrowException, ValueError, OverflowError):
                yield {name: _cell(batch, name, position) for name in batch.schema.names}

    def _find(self, row: int) -> tuple[Any, int]:
        """The batch that holds a row, and its place there."""
        if self._start <= row < self._end:
            return self._batch, row - self._start
        try:
            if row < self._start:
                self._restart()
            while row >= self._end:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    raise ValueError("it has fewer rows than its footer says")
                self._start, self._end = self._end, self._end + self._batch.num_rows
        except BaseException:
            self._start = self._end = sys.maxsize  # so that another try starts anew
            raise
        return self._batch, row - self._start


def _cell(batch: Any, name: str, position: int) -> Any:
    """One value; None where Python has none for it, such as a time in nanoseconds: most columns are not needed."""
    import pyarrow as pa

    try:
        return batch.column(name).slice(position, 1).to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError):
        return None


@functools.lru_cache(maxsize=1)
def _rows_of_group(path: Path, number: int, identity: tuple[int, int]) -> _Rows:
    return _attempt(lambda: _Rows(path, number))


def read_parquet(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    identity = _identity(chunk.path)
    try:
        touched = list(_touched(chunk, identity))
    except _DamagedError:
        raise OSError(f"{chunk.path} has changed while it was read; start again") from None
    for number, start, stop in touched:
        try:
            rows = _rows_of_group(chunk.path, number, identity)
        except _DamagedError as error:
            yield from [str(error)] * (stop - start)
        else:
            yield from rows.read(start, stop)


def _check(check_columns: Callable[[list[str]], None] | None, columns: list[str], path: Path) -> None:
    if check_columns is not None:
        try:
            check_columns(columns)
        except ValueError as error:
            raise ValueError(f"{path} has {error}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
