"""What a caller may choose about a conversion. Every format gets the same options and reads those that concern it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    image_root: Path | None = None  # image paths are below it; None: the folder of the file that names them
    text_column: str | None = None  # None: the first of the format's usual names that the input has
    image_column: str | None = None
    chat_template: Path | None = None  # a tokenizer's folder or a template file
    drop_missing_images: bool = False  # leave out the slot of an image that cannot be had, not its document
