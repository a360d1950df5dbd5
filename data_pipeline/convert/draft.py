"""What a format makes of one record: a document whose images may still lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ImageReference = bytes | str  # the image itself; or its path below the image root, http(s) or data: URL


@dataclass(frozen=True)
class Draft:
    """Slot i is the text `texts[i]` or the image `images[i]`; exactly one of the two is not None."""

    texts: Sequence[str | None]
    images: Sequence[ImageReference | None]
    task: str  # one of schema.TASKS
    loss: Sequence[bool] | None = None  # None: the task's default
    meta: dict[str, Any] = field(default_factory=dict)
