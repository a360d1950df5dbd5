"""Adds image codes to every document of a folder of shards: `0.jpg` gets a `0.npy` beside it.

One shard in, one shard of the same name out. Next to each finished shard lies `<name>.done.json` with its checksum, the
checksum of the shard it came from and the tokenizer's fingerprint; a shard whose record still holds is kept, so an
interrupted run is simply started again, while the manifest, which makes the folder count as finished, comes last.
Codes are never trusted from before: all images are encoded anew.

Before the long run the first pictures make a round trip through the tokenizer. A tokenizer that was trained on other
pictures, or is damaged, shows there and costs seconds instead of a training run on meaningless codes.
Cost (run, one core, 64x64 pictures): 3,800 documents in 7 s; 0.2 s where all is kept.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.files import replace_file
from data_pipeline.image_tokens import ImageTokenizer, Progress, psnr
from data_pipeline.schema import Document, Rejected, codes_name
from data_pipeline.shards import MANIFEST_NAME, ShardInfo, check_shard, write_manifest, write_shard
from data_pipeline.split import Split

MIN_PSNR = 18.0  # dB; a one-coloured guess at easy-vqa's pictures reaches 13, a trained tokenizer 27 and more
NUM_GATE_IMAGES = 64
RECORD_SUFFIX = ".done.json"


@dataclass
class TokenizeReport:
    """What a run did. `rejected` counts documents left out by reason; `psnr` in dB, None where no picture was read."""

    documents: int = 0
    images: int = 0
    shards_written: int = 0
    shards_kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    psnr: float | None = None
    seconds: float = 0.0


def tokenize(
    shards: Path | str,
    out: Path | str,
    tokenizer: Path | str,
    *,
    batch_size: int = 64,
    min_psnr: float = MIN_PSNR,
    progress: Progress | None = None,
) -> TokenizeReport:
    """Writes the documents of `shards` with codes to `out`; `tokenizer` is a tokenizer folder (its `image/` is used).

    A document with an image that cannot be decoded is left out and counted. ValueError where the tokenizer does not
    fit the pictures, where `out` is `shards`, and where no document is left.
    """
    started = time.monotonic()
    shards, out = Path(shards), Path(out)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if out.resolve() == shards.resolve():
        raise ValueError(f"{out} holds the shards to read; name another folder for the shards with codes")
    split = Split.open(shards)
    image_tokenizer = ImageTokenizer.load(Path(tokenizer) / "image")
    report = TokenizeReport(psnr=round_trip_gate(split, image_tokenizer, min_psnr))

    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST_NAME).unlink(missing_ok=True)  # until the end: shards may change below
    rejected: Counter[str] = Counter()
    written: list[ShardInfo] = []
    first = 0
    for index, info in enumerate(split.manifest.shards):
        if progress is not None:
            progress("tokenize", first, len(split))
        record = _kept(out, info, image_tokenizer.fingerprint)
        report.shards_kept += record is not None
        if record is None:
            record = _tokenize_shard(split, index, first, out, image_tokenizer, batch_size, progress)
            report.shards_written += 1
        written += [record.info] if record.info is not None else []
        rejected.update(record.rejected)
        report.images += record.images
        first += info.samples
    if not written:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in rejected.most_common(3))
        raise ValueError(f"no document of {shards} could get codes ({reasons}); convert it again from other images")
    _remove_leftovers(out, {info.name for info in split.manifest.shards}, {info.name for info in written})
    write_manifest(out, written, image_tokenizer.fingerprint)
    if progress is not None:
        progress("tokenize", len(split), len(split))
    report.documents = sum(info.samples for info in written)
    report.rejected = dict(rejected)
    report.seconds = time.monotonic() - started
    return report


def round_trip_gate(split: Split, tokenizer: ImageTokenizer, min_psnr: float) -> float | None:
    """Mean PSNR in dB of the first pictures after encode and decode; ValueError where it is below `min_psnr`."""
    images: list[np.ndarray] = []
    for sample in range(min(len(split), 4 * NUM_GATE_IMAGES)):
        document = split.read(sample)
        if isinstance(document, Document) and len(images) < NUM_GATE_IMAGES:
            loaded = _pictures(document, tokenizer)
            images += loaded if isinstance(loaded, list) else []
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


@dataclass(frozen=True)
class _Record:
    """What lies beside a finished shard. `info` is None where no document of it was left."""

    source_sha256: str
    image_tokenizer: str
    info: ShardInfo | None
    images: int
    rejected: dict[str, int]

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> _Record | None:
        try:
            record = json.loads(path.read_bytes())
            info = ShardInfo(**record.pop("info")) if record["info"] is not None else record.pop("info")
            return cls(info=info, **record)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None


def _record_path(out: Path, name: str) -> Path:
    return out / (name + RECORD_SUFFIX)


def _kept(out: Path, source: ShardInfo, fingerprint: str) -> _Record | None:
    """The record of a shard that an earlier run finished, or None where anything about it has changed."""
    record = _Record.load(_record_path(out, source.name))
    if record is None or (record.source_sha256, record.image_tokenizer) != (source.sha256, fingerprint):
        return None
    if record.info is not None and (
        record.info.name != source.name or check_shard(out, record.info, checksum=True) is not None
    ):
        return None
    return record


def _tokenize_shard(
    split: Split,
    index: int,
    first: int,
    out: Path,
    tokenizer: ImageTokenizer,
    batch_size: int,
    progress: Progress | None,
) -> _Record:
    source = split.manifest.shards[index]
    _record_path(out, source.name).unlink(missing_ok=True)
    rejected: Counter[str] = Counter()
    num_images = 0

    def documents() -> Iterator[Document]:
        nonlocal num_images
        waiting: list[tuple[Document, list[np.ndarray]]] = []
        for within in range(source.samples):
            document = split.read(first + within)
            pictures = _pictures(document, tokenizer) if isinstance(document, Document) else document
            if isinstance(document, Rejected) or isinstance(pictures, Rejected):
                refused = document if isinstance(document, Rejected) else pictures
                assert isinstance(refused, Rejected)
                rejected[refused.category] += 1
                continue
            num_images += len(pictures)
            waiting.append((document, pictures))
            if sum(len(each) for _, each in waiting) >= batch_size:
                yield from _with_codes(waiting, tokenizer, batch_size)
                waiting = []
                if progress is not None:
                    progress("tokenize", first + within + 1, len(split))
        yield from _with_codes(waiting, tokenizer, batch_size)

    remaining = documents()
    head = next(remaining, None)
    info = None
    if head is not None:

        def all_documents() -> Iterator[Document]:
            yield head
            yield from remaining

        info = write_shard(out / source.name, all_documents())
    record = _Record(source.sha256, tokenizer.fingerprint, info, num_images, dict(rejected))
    record.save(_record_path(out, source.name))
    return record


def _pictures(document: Document, tokenizer: ImageTokenizer) -> list[np.ndarray] | Rejected:
    """The document's pictures in the order of its slots, each name once."""
    pictures = []
    for name in _image_names(document):
        if name not in document.image_bytes:
            return Rejected(document.key, f"image has codes but no bytes to make new ones from: {name}")
        try:
            pictures.append(tokenizer.preprocess(document.image_bytes[name]))
        except ValueError as error:
            return Rejected(document.key, str(error))
    return pictures


def _image_names(document: Document) -> list[str]:
    return list(dict.fromkeys(name for name in document.images if name is not None))


def _with_codes(
    waiting: list[tuple[Document, list[np.ndarray]]], tokenizer: ImageTokenizer, batch_size: int
) -> Iterator[Document]:
    pictures = [picture for _, each in waiting for picture in each]
    codes: list[np.ndarray] = []
    for start in range(0, len(pictures), batch_size):
        codes.extend(tokenizer.encode(np.stack(pictures[start : start + batch_size])))
    remaining = iter(codes)
    for document, _ in waiting:
        yield dataclasses.replace(
            document, codes={codes_name(name): next(remaining) for name in _image_names(document)}
        )


def _remove_leftovers(out: Path, sources: set[str], written: set[str]) -> None:
    """Removes what an earlier run with other shards left behind; other files are not ours."""
    for path in out.glob("*.tar*"):
        name = path.name.partition(".tar")[0] + ".tar"
        is_ours = path.name in {name, name + ".idx", name + RECORD_SUFFIX} or path.name.endswith(".tmp")
        is_record = path.name == name + RECORD_SUFFIX
        if is_ours and (name not in sources or (name not in written and not is_record)):
            path.unlink()
