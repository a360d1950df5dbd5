"""From drafts to documents: every image is brought in as the bytes it has, and its type is read from them.

    bytes                 as they are
    data:image/...        base64
    http://, https://     fetched (`fetch.py`), the next documents' while this one's are written
    relative path         below the image root, and never out of it by `..` or a symlink
    absolute path         only below the image root too: a foreign file must not name any picture of this machine

A document whose image cannot be had is rejected. `drop_missing_images` leaves out the slot instead, in documents of
task `interleave` only: a caption or a question without its image would teach something else.
"""

from __future__ import annotations

import base64
import binascii
import errno
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.convert import fetch
from data_pipeline.convert.chunk import read_bytes
from data_pipeline.convert.draft import Draft, ImageReference
from data_pipeline.convert.fetch import Fetcher
from data_pipeline.convert.fields import is_encodable
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected, default_loss

DOCUMENTS_AHEAD = 256  # of which images are being fetched while the first one waits

Waiting = tuple[str, Draft | Document | Rejected, dict[str, Future[bytes | str]]]
Resolved = tuple[Document | Rejected, list[str]]  # and the reasons of the slots that were left out


def resolve(
    drafts: Iterator[tuple[str, Draft | Document | Rejected]], folder: Path, source: str, options: Options
) -> Iterator[Resolved]:
    """Documents and rejections in the order of `drafts`. Relative paths are below `folder` unless options say else."""
    waiting: deque[Waiting] = deque()
    num_bytes = 0  # that the waiting drafts hold themselves
    fetcher: Fetcher | None = None

    def first() -> Resolved:
        nonlocal num_bytes
        key, draft, futures = waiting.popleft()
        num_bytes -= _size(draft)
        if fetcher is None or not futures:
            return _document(key, draft, futures, folder, source, options)
        with fetcher.needed_now(list(futures.values())):
            return _document(key, draft, futures, folder, source, options)

    with ExitStack() as stack:
        for key, draft in drafts:
            images = draft.images if isinstance(draft, Draft) else ()
            urls = dict.fromkeys(image for image in images if isinstance(image, str) and is_url(image))
            if urls and fetcher is None:
                fetcher = stack.enter_context(Fetcher())
            waiting.append((key, draft, {url: fetcher.submit(url) for url in urls} if fetcher is not None else {}))
            num_bytes += _size(draft)
            while waiting and (
                len(waiting) > DOCUMENTS_AHEAD or num_bytes > fetch.MAX_BYTES_AHEAD or not waiting[0][2]
            ):
                yield first()
        while waiting:
            yield first()


def _size(draft: Draft | Document | Rejected) -> int:
    images = draft.images if isinstance(draft, Draft) else ()
    return sum(len(image) for image in images if image is not None)


def is_url(image: str) -> bool:
    return image[:8].lower().startswith(("http://", "https://"))


def _document(
    key: str,
    draft: Draft | Document | Rejected,
    futures: dict[str, Future[bytes | str]],
    folder: Path,
    source: str,
    options: Options,
) -> Resolved:
    if not isinstance(draft, Draft):
        return draft, []
    if not all(text is None or is_encodable(text) for text in draft.texts):
        return Rejected(key, "text is not valid UTF-8"), []
    names: list[str | None] = []
    kept: list[int] = []
    left_out: list[str] = []
    image_bytes: dict[str, bytes] = {}
    for slot, image in enumerate(draft.images):
        if image is None:
            names.append(None)
            kept.append(slot)
            continue
        content = futures[image].result() if image in futures else _local(image, folder, options)
        extension = image_type(content) if isinstance(content, bytes) else None
        if isinstance(content, bytes) and extension is None:
            content = f"image is {'of an unknown type' if content else 'empty'}: {_shown(image)}"
        if isinstance(content, str):
            if not options.drop_missing_images or draft.task != "interleave":
                return Rejected(key, content), left_out
            left_out.append(content)
            continue
        name = f"{len(image_bytes)}.{extension}"
        image_bytes[name] = content
        names.append(name)
        kept.append(slot)
    texts = [draft.texts[slot] for slot in kept]
    loss = default_loss(draft.task, texts) if draft.loss is None else [draft.loss[slot] for slot in kept]
    if left_out and not any(loss):
        return Rejected(key, left_out[0]), left_out[1:]
    return Document(
        key, tuple(texts), tuple(names), draft.task, tuple(loss), source, draft.meta, image_bytes, {}
    ), left_out


def _local(image: ImageReference, folder: Path, options: Options) -> bytes | str:
    """The bytes of an image that is no URL; or why it cannot be had."""
    if isinstance(image, bytes):
        return image if len(image) <= fetch.MAX_IMAGE_BYTES else "image is too large: it is part of its record"
    if image[:5].lower() == "data:":
        if len(image) > fetch.MAX_IMAGE_BYTES * 4 // 3 + 100:  # with the type in front of it
            return "image is too large: it is part of its record"
        try:
            return base64.b64decode(image.partition(";base64,")[2], validate=True)
        except (binascii.Error, ValueError):
            return f"image is of an unknown type: {_shown(image)}"
    if not image or "\0" in image or not is_encodable(image):
        return "image path is missing"
    root = options.image_root or folder
    path = root / image
    try:
        status = path.stat()
        if not path.resolve().is_relative_to(root.resolve()):
            return f"image path leaves the image root: {image} is not below {root}; --image-root names another"
    except (FileNotFoundError, NotADirectoryError):
        return f"image is missing: {path}"
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return f"image is missing: {_shown(str(path))}"
    if stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(status.st_mode):  # a pipe or device would never end
        return f"image is of an unknown type: {image}"
    if status.st_size > fetch.MAX_IMAGE_BYTES:
        return f"image is too large: {image}"
    return read_bytes(path)


def image_type(content: bytes) -> str | None:
    """jpg, png, webp, gif or bmp by the first bytes; None for anything else."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    if content.startswith(b"BM") and int.from_bytes(content[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "bmp"
    return None


def _shown(image: ImageReference | Sequence[str]) -> str:
    return str(image)[:200] if isinstance(image, str) else "it is part of its record"
