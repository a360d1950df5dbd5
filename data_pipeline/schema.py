"""A document as it lies on disk, and the reasons why one is refused.

A document is a short list of slots, each a text or an image. The members of one webdataset sample hold it:

    000000123.json     {"texts": ["A cat", null], "images": [null, "0.jpg"], "task": "generate",
                        "loss": [false, true], "source": "pairs", "meta": {}}
    000000123.0.jpg    the image as it came, never re-encoded
    000000123.0.npy    its codes, uint16 or uint32 [h, w]

Shards are untrusted: `Document.from_members` checks all of this and returns `Rejected` where something is wrong,
because bad content is counted and skipped, never a crash. Arrays are read without pickle and without allocating what
a header merely claims. Cost (run): `from_members` 15 us for a document of 24 short texts and one 8x8 code array, 10 us
for a caption and one.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

TASKS = ("understand", "generate", "interleave", "text")  # the index is the task's id
CODE_DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
MAX_NESTING = 64  # of meta; what json just reads it may not write, because that needs a few more frames
MAX_REASON = 500  # characters; a reason may quote the document
NPY_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class Rejected:
    """A document that is left out. `reason` reads "category" or "category: detail"."""

    key: str
    reason: str

    @property
    def category(self) -> str:
        """The part of the reason that is counted: one of a few fixed strings, so that counts stay small."""
        return self.reason.partition(":")[0]


class RefusedError(Exception):
    """Carries a reason out of checks to the function that makes a `Rejected` of it."""


@dataclass(eq=False, slots=True)  # not frozen, as each reading makes one, and a frozen one takes 2 us more
class Document:
    """One document. Slot i is the text `texts[i]` or the image `images[i]`; exactly one of the two is not None."""

    key: str  # no dot, no slash
    texts: tuple[str | None, ...]
    images: tuple[str | None, ...]  # member suffix such as "0.jpg"
    task: str  # one of TASKS
    loss: tuple[bool, ...]  # resolved: the task's default, or the document's own
    source: str
    meta: dict[str, Any]
    image_bytes: dict[str, bytes]  # "0.jpg" -> original bytes; an image that has codes may lack them
    codes: dict[str, np.ndarray]  # "0.npy" -> uint16 or uint32 [h, w], named by the image's stem

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, bytes]) -> Document | Rejected:
        """Checks the members of one sample (suffix -> content). Members that no slot names are left out."""
        try:
            return _checked(key, members)
        except RefusedError as refused:
            return Rejected(key, str(refused)[:MAX_REASON])

    def to_members(self) -> dict[str, bytes]:
        """The members to write: equal documents give equal bytes."""
        record = {
            "texts": self.texts,
            "images": self.images,
            "task": self.task,
            "loss": self.loss,
            "source": self.source,
            "meta": self.meta,
        }
        members = {"json": json.dumps(record, ensure_ascii=False).encode("utf-8")}
        members.update(self.image_bytes)
        for name, codes in self.codes.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(codes), version=(1, 0), allow_pickle=False)
            members[name] = buffer.getvalue()
        return members


def default_loss(task: str, texts: Sequence[str | None]) -> tuple[bool, ...]:
    """The slots that carry loss where the document does not say: understand: the last text; generate: the images;
    interleave: all but the first slot; text: every text."""
    if task == "understand":
        last_text = max((i for i, text in enumerate(texts) if text is not None), default=-1)
        return tuple(i == last_text for i in range(len(texts)))
    if task == "generate":
        return tuple(text is None for text in texts)
    if task == "interleave":
        return tuple(i > 0 for i in range(len(texts)))
    return tuple(text is not None for text in texts)


@functools.lru_cache(maxsize=1024)  # nearly all images of a corpus have one of a few names
def codes_name(image: str) -> str:
    """The member that holds an image's codes: "0.jpg" -> "0.npy"."""
    return image.rpartition(".")[0] + ".npy"


def _checked(key: str, members: Mapping[str, bytes]) -> Document:
    if not key or "." in key or "/" in key:
        raise RefusedError(f"key is empty or holds a dot or a slash: {key!r}")
    record = _record(members)
    texts, images = _slots(record)
    task = record.get("task")
    if task not in TASKS:
        raise RefusedError(f"unknown task: {task!r}; known are {', '.join(TASKS)}")
    loss = record.get("loss")
    if loss is None:
        loss = default_loss(task, texts)
    elif not isinstance(loss, list) or len(loss) != len(texts) or not all(type(item) is bool for item in loss):
        raise RefusedError("loss is not one true or false for each slot")
    source, meta = record.get("source", ""), record.get("meta", {})
    if not isinstance(source, str) or not isinstance(meta, dict):
        raise RefusedError("source is not a string or meta is not an object")

    image_bytes: dict[str, bytes] = {}
    codes: dict[str, np.ndarray] = {}
    names = {image for image in images if image is not None}
    if len({codes_name(image) for image in names}) < len(names):
        raise RefusedError("two images share a stem")
    for image in images:
        if image is None:
            continue
        if image in members:
            image_bytes[image] = members[image]
        if codes_name(image) in members:
            codes[codes_name(image)] = _codes(members[codes_name(image)])
        elif image not in members:
            raise RefusedError(f"image has neither bytes nor codes: {image}")
    return Document(key, tuple(texts), tuple(images), task, tuple(loss), source, meta, image_bytes, codes)


def _record(members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise RefusedError("no json member")
    try:
        text = bytes(members["json"]).decode("utf-8")
        record = json.loads(text)
        if "\\u" in text:  # only an escape can smuggle in half a surrogate pair, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise RefusedError(f"json is not valid UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"json cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise RefusedError("json is not an object")
    if text.count("[") + text.count("{") > MAX_NESTING and _is_deeper(record, MAX_NESTING):
        raise RefusedError("json is nested too deep")
    return record


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        lists = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for items in lists for child in items]
    return bool(level)


def _slots(record: dict[str, Any]) -> tuple[list[str | None], list[str | None]]:
    texts, images = record.get("texts"), record.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or not texts or len(texts) != len(images):
        raise RefusedError("texts and images are not two lists of the same length, at least one slot long")
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise RefusedError("a slot is not exactly one of text and image")
        if not isinstance(text if image is None else image, str):
            raise RefusedError("a slot is not a string")
        if image is not None:
            stem, _, extension = image.rpartition(".")
            if not stem or not extension or "/" in image or image.startswith("_") or extension == "npy":
                raise RefusedError(f"image name is not like 0.jpg: {image!r}")
    return texts, images


def _codes(content: bytes) -> np.ndarray:
    """uint16 or uint32 [h, w] from the bytes of a .npy file. Not `np.load`: that allocates the shape which the header
    claims before it looks for the data, so a small file could ask for all memory."""
    header_end = 10 + int.from_bytes(content[8:10], "little")
    if content[:8] != NPY_MAGIC or len(content) < header_end:
        raise RefusedError("codes are not a .npy file of version 1.0")
    shape, order, dtype, num_bytes = _npy_layout(content[8:header_end])
    if len(content) - header_end != num_bytes:
        raise RefusedError("codes hold more or fewer bytes than their shape says")
    return np.ndarray(shape, dtype, content, header_end, order=order)


@functools.lru_cache(maxsize=256)  # most images of a corpus share one header, and parsing it takes 20 us
def _npy_layout(header: bytes) -> tuple[tuple[int, int], Literal["F", "C"], np.dtype, int]:
    """Shape, order, dtype and number of bytes that a header claims."""
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    except Exception as error:  # a header is parsed as Python literals, so damage shows as almost any error
        raise RefusedError(f"codes have a damaged header: {type(error).__name__}") from None
    if dtype not in CODE_DTYPES:
        raise RefusedError(f"codes are not uint16 or uint32: {dtype}")
    if len(shape) != 2 or min(shape) < 1:
        raise RefusedError(f"codes are not of shape [h, w]: {list(shape)}")
    return shape, "F" if fortran_order else "C", dtype, math.prod(shape) * dtype.itemsize
