"""Format `pairs`: a .jsonl of images with captions, for learning to generate.

    {"image": "path.png", "caption": "a blue rectangle"}

An image path is absolute or relative to the folder of the .jsonl. A document is the caption, then the image, which
carries the loss. `"caption": null` is an image alone: from a few of these a model learns what images look like without
a caption, which classifier-free guidance needs. The reading of lines and images is shared with the other .jsonl
formats.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.schema import Document, Rejected

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif")


def read_pairs(source: Path) -> Iterator[Document | Rejected]:
    """One document or rejection for each line that is not blank. I/O errors are raised."""
    for key, record in read_records(source):
        if isinstance(record, Rejected):
            yield record
            continue
        caption = record.get("caption", "")
        if caption is not None and (not isinstance(caption, str) or not caption.strip() or not is_encodable(caption)):
            yield Rejected(key, "caption is missing or empty")
            continue
        image = read_image(key, record, source.parent)
        if isinstance(image, Rejected):
            yield image
            continue
        name, content = image
        yield Document(
            key=key,
            texts=(None,) if caption is None else (caption, None),
            images=(name,) if caption is None else (None, name),
            task="generate",
            loss=(True,) if caption is None else (False, True),
            source=source.stem,
            meta=record_id(record),
            image_bytes={name: content},
            codes={},
        )


def read_records(source: Path) -> Iterator[tuple[str, dict[str, Any] | Rejected]]:
    """(key, object) of each line that is not blank. The key is the line's number, so it is unique and has no dot."""
    with source.open("rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            key = f"{number:09d}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield key, Rejected(key, f"line is not JSON: {error}")
                continue
            is_object = isinstance(record, dict)
            yield key, record if is_object else Rejected(key, "line is not a JSON object")


def read_image(key: str, record: dict[str, Any], folder: Path) -> tuple[str, bytes] | Rejected:
    """(member suffix such as "0.png", the bytes as they are) of the record's image."""
    image = record.get("image")
    if not isinstance(image, str) or not image or "\0" in image or not is_encodable(image):
        return Rejected(key, "image path is missing")
    path = folder / image
    extension = path.suffix.removeprefix(".").lower()
    if extension not in IMAGE_EXTENSIONS:
        return Rejected(key, f"image is of an unknown type: {image}")
    try:
        is_file = path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        is_file = False
    if not is_file:
        return Rejected(key, f"image is missing: {path}")
    return f"0.{extension}", path.read_bytes()


def record_id(record: dict[str, Any]) -> dict[str, Any]:
    """The `id` that a line may carry, as meta."""
    identity = record.get("id")
    is_plain = type(identity) is int or (isinstance(identity, str) and is_encodable(identity))
    return {"id": identity} if is_plain else {}


def is_encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
