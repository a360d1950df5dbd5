"""Adds image codes to every document of a folder of shards: `0.jpg` gets a `0.npy` beside it.

One shard in, one shard of the same name out. Next to each finished shard lies `<name>.done.json` with its checksum,
what it was made from and who was left out; a shard whose record still holds is kept, so an interrupted run is simply
started again. Codes are never trusted from before: all images are encoded anew.

Ranks share the work by shard: rank r of n takes the shards r, r + n, ..., on one machine or as a Slurm array, and
whoever finds all records complete writes `rejected.jsonl` and the manifest, which makes the folder count as finished.
No rank waits for another, any may start late or run twice: each writes in a folder of its own and renames. A manifest
never stands beside a shard that is being made again. Who makes one takes away first its record, then the manifest; who
writes the manifest looks at all records once more afterwards. So one of the two sees the other, in any order.

Before the long run the first pictures make a round trip through the tokenizer. A tokenizer that was trained on other
pictures, or is damaged, shows there and costs seconds instead of a training run on meaningless codes.
Cost (run, one core, 64x64 pictures): 3,800 documents in 7 s; 0.2 s where all is kept. A 500 x 375 JPEG takes 0.7 ms to
decode, 1.1 to scale and 0.5 to encode, so a pool decodes beside the encoding: 330 images/s on two busy cores, 290
without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.image_tokens import ImageTokenizer, Progress, psnr
from data_pipeline.schema import Document, Rejected, codes_name
from data_pipeline.shard_record import ShardRecord, check_own, kept, record_path, remove_leftovers
from data_pipeline.shards import MANIFEST_NAME, ShardInfo, index_path, write_manifest, write_shard
from data_pipeline.split import Split

CODE_VERSION = 1  # raise it where the same pictures become other codes, so that earlier shards are made again
MIN_PSNR = 18.0  # dB; a one-coloured guess at easy-vqa's pictures reaches 13, a trained tokenizer 27 and more
NUM_GATE_IMAGES = 64
REJECTED_NAME = "rejected.jsonl"
MADE_BY = {"made_by": "tokenize"}  # in every record, so that the shards of others are known
OWN_FOLDER_PREFIX = ".making-"
OWN_FOLDER_SECONDS = 24 * 3600  # one in which nothing was written for so long is what a killed process left

_Pictured = tuple[Document, list[np.ndarray]]  # uint8 [H, W, 3], one for each image of the document


@dataclass
class TokenizeReport:
    """What this process did, over its own shards; with local ranks, what all did.

    `rejected` counts documents left out by reason; `psnr` in dB, None where no picture was read. `shards_missing`
    counts shards of the folder that nobody has finished: other ranks are still at them or have yet to start, and the
    last one writes the manifest.
    """

    documents: int = 0
    images: int = 0
    shards_written: int = 0
    shards_kept: int = 0
    shards_missing: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    psnr: float | None = None
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the whole folder has its manifest."""
        return self.shards_missing == 0


@dataclass(frozen=True)
class _Job:
    split: Split
    out: Path
    tokenizer: ImageTokenizer
    batch_size: int
    keep_images: bool
    pool: ThreadPoolExecutor

    def made_from(self, source: ShardInfo) -> str:
        """What the shard of `source` in `out` depends on."""
        images = "with" if self.keep_images else "without"
        return f"{CODE_VERSION} {source.sha256} {self.tokenizer.fingerprint} {images} images"

    def kept(self, source: ShardInfo, *, checksum: bool) -> ShardRecord | None:
        record = kept(self.out, source.name, self.made_from(source), checksum=checksum)
        if record is None or set(record.facts) != {*MADE_BY, "images", "rejected"}:
            return None
        return record


def tokenize(
    shards: Path | str,
    out: Path | str,
    tokenizer: Path | str,
    *,
    batch_size: int = 64,
    min_psnr: float = MIN_PSNR,
    keep_images: bool = True,
    rank: int | None = None,
    num_ranks: int = 1,
    progress: Progress | None = None,
) -> TokenizeReport:
    """Writes the documents of `shards` with codes to `out`; `tokenizer` is a tokenizer folder (its `image/` is used).

    `keep_images=False` leaves the pictures themselves out: training reads codes alone. With `rank`, does that rank's
    part of `num_ranks`; without, and several ranks, starts them all here and finishes.

    A document with an image that cannot be decoded is left out, counted, and listed in `out`/rejected.jsonl.
    ValueError where the tokenizer does not fit the pictures, where `out` is `shards` or a URL, and where no document is
    left.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if num_ranks < 1 or (rank is not None and not 0 <= rank < num_ranks):
        raise ValueError(f"rank {rank} of {num_ranks}: ranks count from 0, so use 0 to {max(num_ranks, 1) - 1}")
    if "://" in str(out):
        raise ValueError(f"{out} is a URL, and codes are written to a local folder; name one and copy it there")
    if "://" not in str(shards) and Path(out).resolve() == Path(shards).resolve():
        raise ValueError(f"{out} holds the shards to read; name another folder for the shards with codes")
    options: dict[str, Any] = {"batch_size": batch_size, "min_psnr": min_psnr, "keep_images": keep_images}
    if rank is None and num_ranks > 1:
        from data_pipeline.tokenize_ranks import tokenize_with_local_ranks

        return tokenize_with_local_ranks(num_ranks, shards, out, tokenizer, options, progress)
    num_threads = len(os.sched_getaffinity(0))
    return tokenize_rank(shards, Path(out), tokenizer, rank or 0, num_ranks, num_threads, progress=progress, **options)


def tokenize_rank(
    shards: Path | str,
    out: Path,
    tokenizer: Path | str,
    rank: int,
    num_ranks: int,
    num_threads: int,
    *,
    batch_size: int,
    min_psnr: float,
    keep_images: bool,
    progress: Progress | None,
) -> TokenizeReport:
    """One rank's part; the arguments are those of `tokenize`. `num_threads` decode pictures."""
    started = time.monotonic()
    split = Split.open(shards)
    image_tokenizer = ImageTokenizer.load(Path(tokenizer) / "image")
    report = TokenizeReport(psnr=round_trip_gate(split, image_tokenizer, min_psnr))
    out.mkdir(parents=True, exist_ok=True)
    check_own(out, MADE_BY, OWN_FOLDER_PREFIX + "*")

    sources = split.manifest.shards
    firsts = [0, *itertools.accumulate(split.shard_sizes)]
    mine = range(rank, len(sources), num_ranks)
    total, done = sum(sources[index].samples for index in mine), 0
    rejected: Counter[str] = Counter()
    pool = ThreadPoolExecutor(num_threads)
    try:
        job = _Job(split, out, image_tokenizer, batch_size, keep_images, pool)
        for index in mine:

            def advance(within: int, done: int = done) -> None:
                if progress is not None:
                    progress("tokenize", done + within, total)

            advance(0)
            record = job.kept(sources[index], checksum=True)
            report.shards_kept += record is not None
            if record is None:
                record = _tokenize_shard(job, sources[index], firsts[index], advance)
                report.shards_written += 1
            report.documents += record.info.samples if record.info is not None else 0
            report.images += record.facts["images"]
            rejected.update(_categories(record))
            done += sources[index].samples
        report.shards_missing = _finish(job)
    finally:
        pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress("tokenize", total, total)
    report.rejected = dict(rejected)
    report.seconds = time.monotonic() - started
    return report


def round_trip_gate(split: Split, tokenizer: ImageTokenizer, min_psnr: float) -> float | None:
    """Mean PSNR in dB of the first pictures after encode and decode; ValueError where it is below `min_psnr`."""
    images: list[np.ndarray] = []
    for sample in range(min(len(split), 4 * NUM_GATE_IMAGES)):
        if len(images) >= NUM_GATE_IMAGES:
            break
        pictured = _with_pictures(split.read(sample), tokenizer)
        images += pictured[1] if not isinstance(pictured, Rejected) else []
    if not images:
        return None
    pictures_BHWC = np.stack(images[:NUM_GATE_IMAGES])
    mean = float(psnr(pictures_BHWC, tokenizer.decode(tokenizer.encode(pictures_BHWC))).mean())
    if mean < min_psnr:
        raise ValueError(
            f"the image tokenizer {tokenizer.fingerprint} gives back the first {len(pictures_BHWC)} pictures of "
            f"{split.folder} with a PSNR of {mean:.1f} dB, below {min_psnr:g}; train one on pictures like these with "
            "`uvlm tokenizer train`, or lower --min-psnr"
        )
    return mean


def _tokenize_shard(job: _Job, source: ShardInfo, first: int, advance: Callable[[int], None]) -> ShardRecord:
    record_path(job.out, source.name).unlink(missing_ok=True)  # before the manifest: `_finish` counts on the order
    (job.out / MANIFEST_NAME).unlink(missing_ok=True)
    facts: dict[str, Any] = {**MADE_BY, "images": 0, "rejected": []}
    with _own_folder(job.out) as own:
        documents = _documents(job, range(first, first + source.samples), facts, advance)
        head = next(documents, None)
        info = None if head is None else write_shard(own / source.name, itertools.chain([head], documents))
        record = ShardRecord(job.made_from(source), info, facts)
        record.save(own, source.name)
        if info is not None:
            index_path(own / source.name).replace(index_path(job.out / source.name))
            (own / source.name).replace(job.out / source.name)
        record_path(own, source.name).replace(record_path(job.out, source.name))
    return record


def _documents(job: _Job, samples: range, facts: dict[str, Any], advance: Callable[[int], None]) -> Iterator[Document]:
    """The documents of `samples` with codes; counts images and lists rejected documents in `facts`."""
    waiting: list[_Pictured] = []
    num_pictures = 0
    for within, decoded in enumerate(_decoded(job, samples), 1):
        if isinstance(decoded, Rejected):
            facts["rejected"].append([decoded.key, decoded.reason])
            continue
        waiting.append(decoded)
        num_pictures += len(decoded[1])
        if num_pictures >= job.batch_size or len(waiting) >= 16 * job.batch_size:  # texts alone wait for no picture
            facts["images"] += num_pictures
            yield from _with_codes(job, waiting)
            waiting, num_pictures = [], 0
            advance(within)
    facts["images"] += num_pictures
    yield from _with_codes(job, waiting)


def _decoded(job: _Job, samples: range) -> Iterator[_Pictured | Rejected]:
    """Documents in order, each with its pictures: read in this thread, decoded in the pool some two batches ahead."""
    pending: deque[tuple[int, Future[_Pictured | Rejected]]] = deque()
    num_pictures = 0
    for position, sample in enumerate(samples):
        if position % job.batch_size == 0:
            job.split.prefetch(samples[position : position + 2 * job.batch_size])
        document = job.split.read(sample)
        expected = len(_image_names(document)) if isinstance(document, Document) else 0
        num_pictures += expected
        pending.append((expected, job.pool.submit(_with_pictures, document, job.tokenizer)))
        while num_pictures > 2 * job.batch_size or len(pending) > 2 * job.batch_size:
            expected, future = pending.popleft()
            num_pictures -= expected
            yield future.result()
    while pending:
        yield pending.popleft()[1].result()


def _with_pictures(document: Document | Rejected, tokenizer: ImageTokenizer) -> _Pictured | Rejected:
    """The document and its pictures in the order of its slots, each name once."""
    if isinstance(document, Rejected):
        return document
    pictures = []
    for name in _image_names(document):
        if name not in document.image_bytes:
            return Rejected(document.key, f"image has codes but no bytes to make new ones from: {name}")
        try:
            pictures.append(tokenizer.preprocess(document.image_bytes[name]))
        except ValueError as error:
            return Rejected(document.key, f"{error} ({name})")
    return document, pictures


def _image_names(document: Document) -> list[str]:
    return list(dict.fromkeys(name for name in document.images if name is not None))


def _with_codes(job: _Job, waiting: list[_Pictured]) -> Iterator[Document]:
    pictures = [picture for _, each in waiting for picture in each]
    codes: list[np.ndarray] = []
    for start in range(0, len(pictures), job.batch_size):
        codes.extend(job.tokenizer.encode(np.stack(pictures[start : start + job.batch_size])))
    remaining = iter(codes)
    for document, _ in waiting:
        named = {codes_name(name): next(remaining) for name in _image_names(document)}
        yield dataclasses.replace(document, codes=named, image_bytes=document.image_bytes if job.keep_images else {})


def _finish(job: _Job) -> int:
    """How many shards nobody has finished; where none lacks, writes the list of rejected documents and the manifest."""
    sources = job.split.manifest.shards
    with _own_folder(job.out) as own:
        while True:
            list(job.out.iterdir())  # a network file system looks names up anew after that: a record may be seconds old
            written, reasons, missing = _collect(job, own / REJECTED_NAME)
            if missing:
                return missing
            if not written:
                told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
                raise ValueError(
                    f"no document of {job.split.folder} could get codes ({told}); convert it again from other images"
                )
            remove_leftovers(job.out, [source.name for source in sources], [info.name for info in written])
            if reasons:
                (own / REJECTED_NAME).replace(job.out / REJECTED_NAME)
            else:
                (job.out / REJECTED_NAME).unlink(missing_ok=True)
            write_manifest(own, written, job.tokenizer.fingerprint)
            (own / MANIFEST_NAME).replace(job.out / MANIFEST_NAME)
            if _collect(job, own / REJECTED_NAME)[0] == written:
                return 0
            (job.out / MANIFEST_NAME).unlink(missing_ok=True)  # a shard is being made again; look who is last now


def _collect(job: _Job, path: Path) -> tuple[list[ShardInfo], Counter[str], int]:
    """The shards that hold documents, how many were rejected by reason, and how many shards lack; writes to `path` who
    was rejected. One record is in memory at a time."""
    written: list[ShardInfo] = []
    reasons: Counter[str] = Counter()
    missing = 0
    with path.open("w", encoding="utf-8") as file:
        for source in job.split.manifest.shards:
            record = job.kept(source, checksum=False)
            if record is None:
                missing += 1
                continue
            written += [record.info] if record.info is not None else []
            reasons.update(_categories(record))
            for key, reason in record.facts["rejected"]:
                file.write(json.dumps({"shard": source.name, "key": key, "reason": reason}) + "\n")
    return written, reasons, missing


def _categories(record: ShardRecord) -> Counter[str]:
    return Counter(Rejected(key, reason).category for key, reason in record.facts["rejected"])


@contextlib.contextmanager
def _own_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` in which no other process writes, so that two at the same shard do not mix their bytes."""
    for left in out.glob(OWN_FOLDER_PREFIX + "*"):
        with contextlib.suppress(OSError):  # its owner may be just done with it
            written = max(path.stat().st_mtime for path in [left, *left.iterdir()])  # a shard may take days
            if time.time() - written > OWN_FOLDER_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=OWN_FOLDER_PREFIX, dir=out, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
