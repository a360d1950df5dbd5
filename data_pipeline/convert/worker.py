"""One chunk of the input into one shard: what a worker process does."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType

from data_pipeline.convert.chunk import Chunk
from data_pipeline.convert.containers import digest, read
from data_pipeline.convert.draft import Draft
from data_pipeline.convert.images import resolve
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected
from data_pipeline.shard_record import ShardRecord, kept
from data_pipeline.shards import write_shard

CODE_VERSION = 1  # raise it where the same input becomes other documents, so that earlier shards are made again
MAX_REASON = 500  # characters


@dataclass(frozen=True)
class Job:
    format_name: str
    chunk: Chunk
    name: str  # of the shard
    out: Path  # where an earlier run's shard and record lie
    staging: Path  # where a new shard goes; the main process moves it to `out`
    source: str  # the documents' source
    origin: str  # path of the whole input
    image_folder: Path  # relative image paths are below it
    image_tokenizer: str | None  # codes are kept only where it is known
    template: str | None  # digest of the chat template
    options: Options
    retry: bool = False  # make the shard again where an image could not be had


@dataclass(frozen=True)
class Outcome:
    """`record.facts`: format and source (the path of the whole input); input (the file's name), num_in, rejected and
    left_out, the latter two as [key, reason] each."""

    name: str
    record: ShardRecord
    is_kept: bool


def run(job: Job) -> Outcome:
    """Makes the shard in `staging`, or finds that the one in `out` is what would be made."""
    chunk = dataclasses.replace(job.chunk, samples=())
    facts = dataclasses.replace(job, out=Path(), staging=Path(), retry=False, chunk=chunk)
    identity = f"{CODE_VERSION} {facts!r} {digest(job.chunk)}"
    made_from = hashlib.sha256(identity.encode(errors="backslashreplace")).hexdigest()
    earlier = kept(job.out, job.name, made_from)
    if earlier is not None and not (job.retry and lacks_images(earlier)):
        return Outcome(job.name, earlier, is_kept=True)
    rejected: list[tuple[str, str]] = []
    left_out: list[tuple[str, str]] = []
    documents = _documents(job, rejected, left_out)
    first = next(documents, None)
    info = None if first is None else write_shard(job.staging / job.name, chain([first], documents))
    found = {
        "format": job.format_name,
        "source": job.origin,
        "input": job.chunk.path.name,
        "num_in": job.chunk.num_records,
        "rejected": rejected,
        "left_out": left_out,
    }
    return Outcome(job.name, ShardRecord(made_from, info, found), is_kept=False)


def lacks_images(record: ShardRecord) -> bool:
    """Whether an image of the shard was not there or not served, which may be different another time."""
    reasons = [reason for _, reason in [*record.facts["rejected"], *record.facts["left_out"]]]
    return any(reason.startswith(("image is missing", "image URL failed")) for reason in reasons)


def _documents(job: Job, rejected: list[tuple[str, str]], left_out: list[tuple[str, str]]) -> Iterator[Document]:
    module = importlib.import_module(f"data_pipeline.convert.{job.format_name}")
    drafts = _drafts(module, job)
    for number, (result, reasons) in enumerate(
        resolve(drafts, job.image_folder, job.source, job.options), job.chunk.first
    ):
        key = f"{number:09d}"
        left_out += [(key, reason[:MAX_REASON]) for reason in reasons]
        checked = result if isinstance(result, Rejected) else _checked(result, key, job.image_tokenizer)
        if isinstance(checked, Rejected):
            rejected.append((key, checked.reason[:MAX_REASON]))
        else:
            yield checked


def _drafts(module: ModuleType, job: Job) -> Iterator[tuple[str, Draft | Document | Rejected]]:
    for key, record in read(job.chunk):
        yield key, record if isinstance(record, Rejected) else module.draft(key, record, job.options)


def _checked(document: Document, key: str, image_tokenizer: str | None) -> Document | Rejected:
    """The document, if it will be read back. Codes of an unknown tokenizer are dropped."""
    if document.codes and image_tokenizer is None:
        document = dataclasses.replace(document, codes={})
    try:
        members = document.to_members()
    except (TypeError, ValueError, RecursionError) as error:  # such as a date of a parquet file as meta
        return Rejected(key, f"meta cannot be written as JSON: {error}")
    again = Document.from_members(document.key, members)
    return again if isinstance(again, Rejected) else document
