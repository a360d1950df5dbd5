"""Pictures to look at: a labelled grid of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def check_png(out: Path) -> None:
    """ValueError where a picture cannot be written there."""
    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise ValueError(f"cannot write {out}; give a file name that ends in .png, in a folder that exists")


def picture_grid(images: Sequence[np.ndarray], captions: Sequence[str], num_columns: int = 8) -> np.ndarray:
    """Images in rows with their caption under each.

    Args:
        images: uint8 [h, w, 3], all of one size.
        captions: one each.

    Returns:
        uint8 [height, width, 3]; small images are enlarged to about 128 pixels so that they can be seen.
    """
    height, width = images[0].shape[:2]
    scale = max(1, 128 // width)
    cell_w, cell_h, margin, line = width * scale, height * scale, 8, 18
    num_columns = min(num_columns, len(images))
    num_rows = -(-len(images) // num_columns)
    size = (num_columns * (cell_w + margin) + margin, num_rows * (cell_h + line + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for index, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x = margin + index % num_columns * (cell_w + margin)
        y = margin + index // num_columns * (cell_h + line + margin)
        sheet.paste(Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        draw.text((x + cell_w / 2, y + cell_h + 2), caption, fill="black", font=font, anchor="ma")
    return np.asarray(sheet)
