"""Foreign data into our shards. A format is a function from a path to documents; this file writes what it yields.

A folder with a manifest is a finished conversion (`Split.open` knows); any other is simply made again from the start.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.convert.pairs import read_pairs
from data_pipeline.convert.vqa import read_vqa
from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import ShardWriter

FORMATS: dict[str, Callable[[Path], Iterator[Document | Rejected]]] = {"pairs": read_pairs, "vqa": read_vqa}


@dataclass(frozen=True)
class ConvertReport:
    documents_in: int
    documents_out: int
    rejected: dict[str, int]  # category -> documents


def convert(
    format_name: str,
    source: Path | str,
    out: Path | str,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Writes `source` as shards to the folder `out`. `progress` is called with the number of documents read so far.

    ValueError for an unknown format, FileNotFoundError for a missing source, ValueError if no document could be used.
    """
    if format_name not in FORMATS:
        nearest = difflib.get_close_matches(format_name, FORMATS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known formats are {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {format_name!r}; {hint}")
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing or not a file; format {format_name!r} reads a .jsonl file")
    rejected: Counter[str] = Counter()
    num_in = 0

    def usable() -> Iterator[Document]:
        nonlocal num_in
        for document in FORMATS[format_name](source):
            num_in += 1
            if progress is not None:
                progress(num_in)
            if isinstance(document, Rejected):
                rejected[document.category] += 1
            else:
                yield document

    documents = usable()
    first = next(documents, None)  # before the writer, which takes away what a finished folder has
    if first is None:
        reasons = ", ".join(f"{category} ({count})" for category, count in rejected.items()) or "it is empty"
        raise ValueError(f"{source} holds no document that can be used: {reasons}")
    if Path(out).is_file():
        raise ValueError(f"{out} is a file; give the path of a folder for the shards")
    with ShardWriter(out, samples_per_shard) as writer:
        writer.write(first)
        for document in documents:
            writer.write(document)
    return ConvertReport(num_in, num_in - sum(rejected.values()), dict(rejected))
