"""Makes a tokenizer folder from one's own shards: `text/tokenizer.json`, `image/` and `tokenizer_report.json`.

Interrupted and started again it goes on where it was; called on a finished folder with the same shards and settings it
returns the report at once. The report is written last, so a folder with a report is whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.files import replace_file
from data_pipeline.image_tokens import Preprocessing, Progress, image_tokenizer_fingerprint
from data_pipeline.schema import Document
from data_pipeline.split import Split
from data_pipeline.text_tokenizer import train_text_tokenizer

if TYPE_CHECKING:
    from data_pipeline.image_tokenizer_training import ImageTraining

REPORT_NAME = "tokenizer_report.json"
MAX_IMAGES = 20_000  # 245 MB of 64x64 pictures in memory; more would not be seen in a training of minutes
HELD_OUT_EVERY = 20  # every 20th picture is measured, not trained on
MAX_HELD_OUT = 256


def train_tokenizers(
    shards: Sequence[Path | str],
    out: Path | str,
    *,
    vocabulary: int = 512,
    image: ImageTraining | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains both tokenizers on the documents of `shards` (folders) and returns the report that is also in the folder.

    `vocabulary` bounds the text ids; `image` are the image tokenizer's settings, the defaults where None. ValueError
    where the shards hold no picture that can be decoded, or no text.
    """
    from data_pipeline.image_tokenizer_training import ImageTraining, train_image_tokenizer

    out = Path(out)
    settings = image or ImageTraining()
    splits = [Split.open(folder) for folder in shards]
    if not splits:
        raise ValueError("no folder of shards was given to train tokenizers on; make one with `uvlm data convert`")
    identity = _identity(splits, vocabulary, settings)
    finished = _finished_report(out, identity)
    if finished is not None:
        return finished
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT_NAME).unlink(missing_ok=True)

    started = time.monotonic()
    text_ids = train_text_tokenizer(_texts(splits, progress), out / "text" / "tokenizer.json", vocabulary=vocabulary)
    text_seconds = time.monotonic() - started
    images_BHWC, num_rejected = _images(splits, Preprocessing(settings.image_size, settings.folding), progress)
    held_out = np.arange(len(images_BHWC)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if not held_out.any():
        held_out[-1] = len(images_BHWC) > 1
    trained_BHWC = images_BHWC[~held_out]
    measured_BHWC = images_BHWC[held_out][:MAX_HELD_OUT] if held_out.any() else images_BHWC
    image_report = train_image_tokenizer(trained_BHWC, measured_BHWC, out / "image", settings, progress)
    report = {
        "identity": identity,
        "text": {"ids": text_ids, "seconds": round(text_seconds, 1)},
        "image": image_report | {"images": len(images_BHWC), "documents_rejected": num_rejected},
    }
    replace_file(out / REPORT_NAME, json.dumps(report, indent=1) + "\n")
    return report


def _identity(splits: list[Split], vocabulary: int, settings: ImageTraining) -> str:
    """Names shards and settings: a report of another identity does not count as finished."""
    checksums = [shard.sha256 for split in splits for shard in split.manifest.shards]
    return hashlib.sha256(json.dumps([checksums, vocabulary, repr(settings)]).encode()).hexdigest()[:16]


def _finished_report(out: Path, identity: str) -> dict[str, Any] | None:
    try:
        report = json.loads((out / REPORT_NAME).read_bytes())
        fingerprint = image_tokenizer_fingerprint(out / "image")
        is_whole = (out / "text" / "tokenizer.json").is_file() and report["image"]["image_tokenizer"] == fingerprint
        return report if is_whole and report["identity"] == identity else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _texts(splits: list[Split], progress: Progress | None) -> Iterator[str]:
    num_texts = done = 0
    total = sum(len(split) for split in splits)
    for split in splits:
        for sample in range(len(split)):
            document = split.read(sample)
            for text in document.texts if isinstance(document, Document) else ():
                if text is not None:
                    num_texts += 1
                    yield text
            done += 1
            if progress is not None and (done % 256 == 0 or done == total):
                progress("text tokenizer", done, total)
    if not num_texts:
        raise ValueError("the shards hold no text to train a text tokenizer on; give shards that have some")


def _images(splits: list[Split], preprocessing: Preprocessing, progress: Progress | None) -> tuple[np.ndarray, int]:
    """uint8 [B, H, W, 3], at most MAX_IMAGES from evenly spread documents, each picture once; and how many documents
    were rejected."""
    places = [(split, sample) for split in splits for sample in range(len(split))]
    places = places[:: -(-len(places) // MAX_IMAGES)]
    images: list[np.ndarray] = []
    seen: set[bytes] = set()
    num_rejected = 0
    for done, (split, sample) in enumerate(places):
        document = split.read(sample)
        if not isinstance(document, Document):
            num_rejected += 1
            continue
        for content in document.image_bytes.values():
            digest = hashlib.sha256(content).digest()
            if digest in seen or len(images) == MAX_IMAGES:
                continue
            seen.add(digest)
            try:
                images.append(preprocessing.apply(content))
            except ValueError:
                num_rejected += 1
        if progress is not None and done % 256 == 0:
            progress("reading pictures", done, len(places))
    if not images:
        raise ValueError(
            f"the shards hold no picture that can be decoded ({num_rejected} documents rejected); an image tokenizer "
            "needs pictures to train on"
        )
    return np.stack(images), num_rejected
