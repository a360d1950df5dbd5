"""Image bytes to pixels: the one place where untrusted pictures are decoded.

Pillow reads the header (size, colour, orientation; nothing is allocated), simplejpeg decodes JPEG, Pillow the rest.
simplejpeg is faster, gives the same pixels (equal to the last bit for all subsamplings, progressive too) and refuses
what Pillow lets pass: a JPEG whose middle is missing but which ends properly comes out of Pillow half grey, and a
model learns grey. Other kinds than the six of FORMATS are refused: Pillow's EPS reader, for one, starts Ghostscript.
Cost (run, one core, 500 x 375 JPEG of 64 kB): 1,480 images/s; Pillow 1,150. Memory, the picture's own 3 bytes a pixel
included: 3 to 12 bytes a pixel, and 16 for a lossless WebP with transparency, so 770 MB for the largest picture that is
decoded, and 250 MB in each thread beside it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000
LARGE_PIXELS = 16_000_000  # of larger ones a process decodes one at a time, however many threads it has
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # the EXIF tag: 1 upright, 2-8 mirrored or turned
STRIP_PIXELS = 1 << 20  # are composed and converted at once: whole copies would take twice the memory
CANNOT_DECODE = "image cannot be decoded"

_large = threading.Lock()


def decode_image(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG, PNG, WebP, GIF, BMP or TIFF: upright as its EXIF says, transparent parts white, the
    first frame of an animation.

    ValueError("image cannot be decoded: ...") for anything that is damaged, cut off, of another kind, or larger than
    MAX_PIXELS, which is checked before the picture's memory is allocated. Threads may call it.
    """
    if not content:
        raise ValueError(f"{CANNOT_DECODE}: it has zero bytes")
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content), formats=FORMATS) as opened:
            num_pixels = opened.width * opened.height
            if num_pixels <= MAX_PIXELS:
                with _large if num_pixels > LARGE_PIXELS else contextlib.nullcontext():
                    return _decode_jpeg(content, opened) if content[:2] == b"\xff\xd8" else _decode_other(opened)
        reason = f"it has {num_pixels:,} pixels, more than {MAX_PIXELS:,}"
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        reason = f"it has more than {MAX_PIXELS:,} pixels"
    except pillow.UnidentifiedImageError:
        reason = "it is of no known format"
    except Exception as error:  # damaged bytes show as almost any error, and nothing here touches a disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(f"{CANNOT_DECODE}: {reason}")


@functools.cache
def _pillow() -> ModuleType:
    """Pillow, without its warnings: what it thinks odd about one picture of millions is no line on the terminal."""
    import warnings

    import PIL.Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    return PIL.Image


def _decode_jpeg(content: bytes, opened: Image.Image) -> np.ndarray:
    import simplejpeg

    if opened.mode not in ("RGB", "L"):
        # Colours of print are beyond simplejpeg, but not whether the file is whole: Pillow would make up what lacks.
        simplejpeg.decode_jpeg(content, colorspace="CMYK")
        return _decode_other(opened)
    try:
        pixels_HWC = simplejpeg.decode_jpeg(content)
    except ValueError as error:
        if "extraneous bytes before marker" not in str(error):
            raise
        pixels_HWC = simplejpeg.decode_jpeg(content, strict=False)  # padding, as some cameras leave; nothing lacks
    return _upright(pixels_HWC, opened.getexif().get(ORIENTATION))


def _decode_other(opened: Image.Image) -> np.ndarray:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(opened, in_place=True)
    is_transparent = opened.has_transparency_data
    width, height = opened.size
    pixels_HWC = np.empty((height, width, 3), np.uint8)
    num_rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        strip = opened.crop((0, top, width, min(top + num_rows, height)))
        if is_transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        pixels_HWC[top : top + num_rows] = np.asarray(strip.convert("RGB"))
    return pixels_HWC


def _upright(pixels_HWC: np.ndarray, orientation: object) -> np.ndarray:
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:  # damaged EXIF, common, tells nothing
        return pixels_HWC
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[orientation]
    return np.ascontiguousarray(pixels_HWC[::rows, ::columns])
