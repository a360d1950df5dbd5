"""Tables: .csv and .tsv with a header, parquet.

A csv is cut at the ends of its rows, which may span lines. A worker decodes a row group of a parquet file once for all
the chunks of it that come its way, because rows inside a group cannot be reached without the ones before.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.convert.chunk import Chunk, Sample, grouped, read_bytes
from data_pipeline.convert.fields import is_encodable

MAX_CSV_FIELD = 16 << 20  # characters; a lost quotation mark must not swallow all memory


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


# parquet: a record is a row; a worker decodes a row group once for the chunks that it gets of it


def scan_parquet(path: Path, num_records: int, check_columns: Callable[[list[str]], None] | None) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            num_rows, columns = file.metadata.num_rows, file.schema_arrow.names
    except pa.ArrowException as error:
        reason = f"parquet file cannot be read: {_one_line(error)}"
        yield Chunk("tar", path, 0, 1, samples=(Sample(path.stem, (), reason),))
        return
    _check(check_columns, columns, path)
    for start in range(0, num_rows, num_records):
        stop = min(start + num_records, num_rows)
        yield Chunk("parquet", path, 0, stop - start, (start, stop))


def _row_groups(chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """(row group, first row, end) inside each row group that the chunk touches."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(chunk.path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    end = 0
    for group, size in enumerate(sizes):
        start, end = end, end + size
        first, last = max(chunk.span[0], start), min(chunk.span[1], end)
        if first < last:
            yield group, first - start, last - start


def row_group_bytes(chunk: Chunk) -> Iterator[tuple[int, int]]:
    import pyarrow.parquet as pq

    groups = [group for group, _, _ in _row_groups(chunk)]
    with pq.ParquetFile(chunk.path) as file:
        for group in groups:
            metadata = file.metadata.row_group(group)
            columns = [metadata.column(i) for i in range(metadata.num_columns)]
            starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
            ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
            yield min(starts), max(ends)


@functools.lru_cache(maxsize=1)
def _table(path: Path, group: int, identity: tuple[int, int]) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, use_threads=False)


def read_parquet(chunk: Chunk) -> Iterator[dict[str, Any] | str]:
    import pyarrow as pa

    status = chunk.path.stat()
    for group, start, stop in _row_groups(chunk):
        try:
            table = _table(chunk.path, group, (status.st_size, status.st_mtime_ns))
        except (pa.ArrowException, OSError) as error:  # its bytes could be read, for the digest: it is the content
            yield from [f"parquet file cannot be read: {_one_line(error)}"] * (stop - start)
            continue
        for row in range(start, stop):
            try:
                yield table.slice(row, 1).to_pylist()[0]
            except (pa.ArrowException, ValueError, OverflowError) as error:
                yield f"row cannot be read: {_one_line(error)}"


def _check(check_columns: Callable[[list[str]], None] | None, columns: list[str], path: Path) -> None:
    if check_columns is not None:
        try:
            check_columns(columns)
        except ValueError as error:
            raise ValueError(f"{path} has {error}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
