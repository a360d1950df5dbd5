"""Finding the image, the text and the id in a record, whatever the publisher called them.

Names are compared without regard to case, because LAION's tables say URL and TEXT. A name that the user gives is the
only one that counts then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.convert.draft import ImageReference
from data_pipeline.schema import Rejected

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
IMAGE_COLUMNS = (
    *("image", "image_path", "img_path", "image_file", "img", *IMAGE_SUFFIXES),
    *("file_name", "filename", "path", "image_url", "img_url", "url"),
)
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")
TEXT_COLUMNS = ("text", "content")
UTF8_MARK = b"\xef\xbb\xbf"


def present(names: Iterable[str], usual: tuple[str, ...], wanted: str | None) -> list[str]:
    """Which of `names` are meant, the most specific first: exactly `wanted`, or the `usual` ones in their order."""
    names = list(names)
    if wanted is not None:
        return [wanted] if wanted in names else []
    by_lower = {name.lower(): name for name in reversed(names)}
    return [by_lower[name] for name in usual if name in by_lower]


def require_column(columns: list[str], usual: tuple[str, ...], wanted: str | None, kind: str) -> None:
    """ValueError that names the columns of a table where none is the one for `kind`, "image" or "text"."""
    if not present(columns, usual, wanted):
        missing = f"column {wanted!r}" if wanted is not None else f"{kind} column"
        found = ", ".join(columns) or "none"
        raise ValueError(f"no {missing} among its columns ({found}); name one of them with --{kind}-column")


def image_of(key: str, record: Mapping[str, Any], column: str | None) -> ImageReference | Rejected:
    """The first image that the record has: bytes, a path, a URL or {"bytes": ..., "path": ...} of a parquet file."""
    for name in present(record, IMAGE_COLUMNS, column):
        value = record[name]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) or (isinstance(value, str) and value):
            return value
    dotted = next((name for name in record if name.lower().endswith(tuple("." + s for s in IMAGE_SUFFIXES))), None)
    if isinstance(record.get("__key__"), str) and dotted is not None:
        return Rejected(key, f"key holds a dot: {record['__key__']}.{dotted}")
    return Rejected(key, "image path is missing")


def caption_of(key: str, record: Mapping[str, Any], column: str | None) -> str | Rejected | None:
    """The caption, or None where the record says that there is none (null). Looks into a json member too."""
    missing = Rejected(key, "caption is missing or empty")
    names = present(record, CAPTION_COLUMNS, column)
    if not names and record.get("json"):
        inner = json_object(record["json"])
        return Rejected(key, inner) if isinstance(inner, str) else caption_of(key, {**inner, "json": None}, column)
    if not names:
        return missing
    caption = record[names[0]]
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8").strip()
        except UnicodeDecodeError:
            return Rejected(key, "caption is not UTF-8")
    if caption is None:
        return None
    return caption if isinstance(caption, str) and caption.strip() and is_encodable(caption) else missing


def json_object(content: bytes | str | dict[str, Any]) -> dict[str, Any] | str:
    """An object from its JSON; or why it is none."""
    if isinstance(content, dict):
        return content
    try:
        record = json.loads(content if isinstance(content, str) else content.removeprefix(UTF8_MARK).decode("utf-8"))
    except (ValueError, RecursionError, AttributeError) as error:
        return f"record is not JSON: {error}"
    return record if isinstance(record, dict) else "record is not a JSON object"


def record_id(record: Mapping[str, Any]) -> dict[str, Any]:
    """The `id` of a record, or its key in a tar, as meta."""
    identity = record.get("id", record.get("__key__"))
    is_plain = type(identity) is int or (isinstance(identity, str) and is_encodable(identity))
    return {"id": identity} if is_plain else {}


def is_encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
