"""Foreign data into our shards: `convert` cuts an input into chunks, worker processes make a shard of each.

A format is a module here with `CONTAINERS` (what it reads, see `containers.py`) and `draft` (a record to a `Draft`);
it may have `check_columns` for tables. `images.py` brings in the images that a draft names.

Shard k comes from chunk k alone, so any number of processes gives equal bytes. A worker writes into `.converting`, and
the main process moves a whole shard into place, then its record. The manifest is taken away before the first shard
changes and written last: a folder with one is finished, and a run that finds nothing leaves an earlier one alone. An
interrupted run started again keeps the shards whose input and own bytes are still what their records say; images
named by path or URL are not looked at again.

Cost (run, one core, images of 20 kB): 0.22 to 0.36 ms a document, nearly all of it for writing; 15 us to keep one from
a table, 93 us from a tar of two members. Worker processes share one import of webdataset and its torch, 1.4 s.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from data_pipeline.convert.chunk import Chunk
from data_pipeline.convert.containers import cut, find, not_read
from data_pipeline.convert.options import Options
from data_pipeline.convert.processes import outcomes_of
from data_pipeline.convert.worker import Job, Outcome, lacks_images
from data_pipeline.schema import Rejected
from data_pipeline.shard_record import check_own, remove_leftovers
from data_pipeline.shards import MANIFEST_NAME, SHARD_NAME, Manifest, ShardInfo, write_manifest

FORMATS = ("pairs", "vqa", "obelics", "mmc4", "webdataset", "chat", "text")
STAGING = ".converting"
LOCK_NAME = ".converting.lock"
REJECTED_NAME = "rejected.jsonl"


@dataclass
class ConvertReport:
    """What a run did: documents_in == documents_out + the sum of `rejected`."""

    documents_in: int = 0
    documents_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # category -> documents
    left_out: dict[str, int] = field(default_factory=dict)  # category -> images left out of documents that were kept
    shards_written: int = 0
    shards_kept: int = 0  # of an earlier run
    lacking_images: int = 0  # shards that were kept although an image of theirs could not be had
    not_read: dict[str, int] = field(default_factory=dict)  # kinds of files of the input folder that were passed over


def convert(
    format_name: str,
    source: Path | str,
    out: Path | str,
    *,
    options: Options | None = None,
    samples_per_shard: int = 1000,
    num_processes: int | None = None,
    retry_images: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Writes `source`, a file or a folder of files, as shards to the folder `out`.

    `num_processes` is the number of CPUs that this process may use, if None. `retry_images` makes shards of an earlier
    run again where an image was missing or its URL failed. `progress` is called with the number of
    documents read so far. Every document that was rejected is a line of `out`/rejected.jsonl. ValueError for an unknown
    format, an input that cannot be used or holds no usable document; FileNotFoundError for one that is missing.
    """
    if format_name not in FORMATS:
        nearest = difflib.get_close_matches(format_name, FORMATS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known formats are {', '.join(FORMATS)}"
        raise ValueError(f"unknown format {format_name!r}; {hint}")
    for name, value in (("samples_per_shard", samples_per_shard), ("num_processes", num_processes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for place in (source, out):
        if "://" in str(place):
            raise ValueError(f"{place} is a URL, and a conversion reads and writes local files; copy to or from them")
    source, out, options = Path(source).absolute(), Path(out).absolute(), options or Options()
    if options.image_root is not None:
        options = replace(options, image_root=options.image_root.absolute())
    if options.chat_template is not None:
        options = replace(options, chat_template=options.chat_template.absolute())
    image_tokenizer = _image_tokenizer(source) if format_name == "webdataset" else None
    jobs, passed_over = _jobs(format_name, source, out, options, samples_per_shard, image_tokenizer, retry_images)
    _check_out(source, out)
    is_new = not out.exists()
    try:
        with _held(out):
            check_own(out, {"format": format_name, "source": _name_of(source)}, STAGING)
            staging = out / STAGING
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
            try:
                staging.mkdir()
                num_processes = num_processes or len(os.sched_getaffinity(0))
                report = _write(jobs, out, num_processes, image_tokenizer, progress, source)
                report.not_read = passed_over
                return report
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # where nothing came of it


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the folder for this process: two conversions into one would mix their shards. It is the kernel's lock, so it
    ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK_NAME
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            is_ours = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # or the file system has no locks
        if not is_ours:
            raise ValueError(f"another conversion is writing {out}; wait for it or name another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held; whoever has opened it by now sees that it is gone


def _name_of(source: Path) -> str:
    """Where it lies, as JSON and UTF-8 can hold it."""
    return str(source.resolve()).encode(errors="backslashreplace").decode()


def _check_out(source: Path, out: Path) -> None:
    if out.is_file():
        raise ValueError(f"{out} is a file; give the path of a folder for the shards")
    source, out = source.resolve(), out.resolve()
    if out.is_relative_to(source) or (source.suffix == ".tar" and source.parent == out):
        raise ValueError(f"{out} is part of the input {source}, which would be read again; name a folder outside of it")


def _image_tokenizer(source: Path) -> str | None:
    has_manifest = source.is_dir() and (source / MANIFEST_NAME).is_file()
    return Manifest.load(source).image_tokenizer if has_manifest else None


def _jobs(
    format_name: str,
    source: Path,
    out: Path,
    options: Options,
    samples_per_shard: int,
    image_tokenizer: str | None,
    retry: bool,
) -> tuple[Iterator[Job], dict[str, int]]:
    """The jobs, and what of the input none of them reads."""
    module = importlib.import_module(f"data_pipeline.convert.{format_name}")
    if options.image_root is not None and not options.image_root.is_dir():
        raise FileNotFoundError(f"image root {options.image_root} is missing or not a folder")
    container, files = find(source, module.CONTAINERS)
    check_columns: Callable[[list[str], Options], None] | None = getattr(module, "check_columns", None)
    check = None if check_columns is None else lambda columns: check_columns(columns, options)
    name = source.stem if source.is_file() else source.resolve().name
    template = _digest_of_template(options.chat_template)

    def jobs() -> Iterator[Job]:
        seen: set[int] = set()
        for number, chunk in enumerate(cut(container, files, samples_per_shard, check)):
            if format_name == "webdataset":
                chunk = _with_unique_keys(chunk, seen)
            yield Job(
                format_name=format_name,
                chunk=chunk,
                name=SHARD_NAME.format(number),
                out=out,
                staging=out / STAGING,
                source=name.encode(errors="replace").decode(),
                origin=_name_of(source),
                image_folder=chunk.path.parent,
                image_tokenizer=image_tokenizer,
                template=template,
                options=options,
                retry=retry,
            )

    return jobs(), not_read(source, files)


def _digest_of_template(path: Path | None) -> str | None:
    """So that another template under the same name makes other shards. Of a tokenizer's folder, its text files."""
    if path is None:
        return None
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    texts = [file for file in files if file.suffix in (".json", ".jinja") or file == path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in texts if file.is_file())).hexdigest()


def _with_unique_keys(chunk: Chunk, seen: set[int]) -> Chunk:
    """Keys that the documents will keep. `seen` holds 8 bytes of hash for each, about 70 in all (run)."""
    samples = []
    for number, sample in enumerate(chunk.samples, chunk.first):
        key = sample.key
        while (hashed := _hash(key)) in seen:  # again where another document already goes by the name made here
            key = f"{key}-{number:09d}"
        seen.add(hashed)
        samples.append(replace(sample, key=key))
    return replace(chunk, samples=tuple(samples))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest())


def _write(
    jobs: Iterator[Job],
    out: Path,
    num_processes: int,
    image_tokenizer: str | None,
    progress: Callable[[int], None] | None,
    source: Path,
) -> ConvertReport:
    report = ConvertReport()
    rejected: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    names: list[str] = []
    written: list[ShardInfo] = []
    held: list[Outcome] = []  # without documents, before the first that has some: until then nothing in `out` changes
    with (
        contextlib.closing(outcomes_of(jobs, num_processes)) as outcomes,
        (out / STAGING / REJECTED_NAME).open("w", encoding="utf-8", errors="backslashreplace") as listing,
    ):
        for outcome in outcomes:
            names.append(outcome.name)
            facts = outcome.record.facts
            report.documents_in += facts["num_in"]
            rejected.update(Rejected(key, reason).category for key, reason in facts["rejected"])
            left_out.update(Rejected(key, reason).category for key, reason in facts["left_out"])
            _list_rejected(listing, outcome)
            report.shards_kept += outcome.is_kept
            report.lacking_images += outcome.is_kept and lacks_images(outcome.record)
            report.shards_written += not outcome.is_kept and outcome.record.info is not None
            held.append(outcome)
            if outcome.record.info is not None:
                written.append(outcome.record.info)
            if written:
                for each in held:
                    _put_in_place(out, each)
                held = []
            if progress is not None:
                progress(report.documents_in)
    if not written:
        reasons = ", ".join(f"{category} ({count})" for category, count in rejected.items()) or "it is empty"
        told = [reason for outcome in held for _, reason in outcome.record.facts["rejected"]]
        first = f"; the first: {told[0]}" if told else ""
        raise ValueError(f"{source} holds no document that can be used: {reasons}{first}")
    (out / STAGING / REJECTED_NAME).replace(out / REJECTED_NAME)
    remove_leftovers(out, names, [info.name for info in written])
    write_manifest(out, written, image_tokenizer)
    report.documents_out = sum(info.samples for info in written)
    report.rejected, report.left_out = dict(rejected), dict(left_out)
    assert report.documents_in == report.documents_out + sum(rejected.values())
    return report


def _put_in_place(out: Path, outcome: Outcome) -> None:
    """A finished shard from the staging folder, then its record."""
    if outcome.is_kept:
        return
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    if outcome.record.info is not None:
        for name in (outcome.name, outcome.name + ".idx"):
            (out / STAGING / name).replace(out / name)
    outcome.record.save(out, outcome.name)


def _list_rejected(listing: IO[str], outcome: Outcome) -> None:
    for kind in ("rejected", "left_out"):
        for key, reason in outcome.record.facts[kind]:
            entry = {"input": outcome.record.facts["input"], "key": key, "reason": reason}
            entry |= {"left_out": "image"} if kind == "left_out" else {}
            listing.write(json.dumps(entry, ensure_ascii=False) + "\n")
