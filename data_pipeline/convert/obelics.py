"""Format `obelics`: web documents as two parallel lists, of which exactly one holds something at each place.

    {"texts": [null, "a lion", null], "images": ["https://host/0.jpg", null, "1.png"],
     "metadata": "[...]", "general_metadata": "{\\"url\\": \\"https://host/page\\"}"}

OBELICS, OmniCorpus and MINT-1T are written so; `text_list` with `image_list` is read as well, and `--text-column` with
`--image-column` name any other pair. A place where both lists are empty is left out; one where both hold something, or
lists of different lengths, reject the document, because then nobody knows its order. Slots stay as they are: texts are
not joined. The task is interleave; a document that has no image (left) is text, since interleave would take the loss
off its first slot. Of the metadata only the id and the page's URL are kept, which is what an opt-out needs.
Cost (run): 10 us for a document of 20 slots.
"""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.convert.draft import Draft, ImageReference
from data_pipeline.convert.fields import is_encodable, record_id, require_column
from data_pipeline.convert.options import Options
from data_pipeline.schema import Rejected

CONTAINERS = ("jsonl", "json", "parquet")
TEXTS = ("texts", "text_list")
IMAGES = ("images", "image_list")


def check_columns(columns: list[str], options: Options) -> None:
    """ValueError where a table lacks one of the two lists."""
    require_column(columns, TEXTS, options.text_column, "text")
    require_column(columns, IMAGES, options.image_column, "image")


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    """The document of one record, or why there is none."""
    texts = _first_of(record, (options.text_column,) if options.text_column else TEXTS)
    images = _first_of(record, (options.image_column,) if options.image_column else IMAGES)
    if not isinstance(texts, list) or not isinstance(images, list):
        return Rejected(key, "texts and images are not two lists")
    if len(texts) != len(images):
        return Rejected(key, f"texts and images differ in length: {len(texts)} and {len(images)}")
    slots: list[tuple[str | None, ImageReference | None]] = []
    for text, image in zip(texts, images, strict=True):
        if text is not None and not isinstance(text, str):
            return Rejected(key, f"a text is not a string: {type(text).__name__}")
        reference = image_reference(image)
        if reference is None and not is_empty_image(image):
            return Rejected(key, f"an image is not a path, URL, bytes or image struct: {type(image).__name__}")
        has_text = text is not None and bool(text.strip())
        if has_text and reference is not None:
            return Rejected(key, "a slot holds both a text and an image")
        if has_text or reference is not None:
            slots.append((text if has_text else None, reference))
    if all(text is None for text, _ in slots):
        return Rejected(key, "document has no text")
    has_image = any(image is not None for _, image in slots)
    return Draft(
        texts=[text for text, _ in slots],
        images=[image for _, image in slots],
        task="interleave" if has_image else "text",
        meta=_meta(record),
    )


def image_reference(image: Any) -> ImageReference | None:
    """What a field gives as an image: bytes, path or URL as they are; the bytes, else the path, of a Hugging Face image
    struct. None for anything else, and for what is empty."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return image if isinstance(image, bytes | str) and image else None


def is_empty_image(image: Any) -> bool:
    """True for the ways to write "no image here": null, an empty string, an empty image struct."""
    if isinstance(image, dict):
        return ("bytes" in image or "path" in image) and not image.get("bytes") and not image.get("path")
    return image is None or image in ("", b"")


def _first_of(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these fields that the record has; parquet has every column, with None where a row lacks it."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def _meta(record: dict[str, Any]) -> dict[str, Any]:
    """`id` and `url`, from the record or its `general_metadata`: a JSON string (OBELICS) or a struct (OmniCorpus).
    It is no training content, so what cannot be read is left out."""
    general = record.get("general_metadata")
    if isinstance(general, str):
        try:
            general = json.loads(general)
        except (ValueError, RecursionError):
            general = None
    found = {**(general if isinstance(general, dict) else {}), **record}
    url = found.get("url")
    return {**record_id(found), **({"url": url} if isinstance(url, str) and is_encodable(url) else {})}
