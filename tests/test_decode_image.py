"""Pictures of strangers become pixels or one clear refusal: never grey, never a crash, never all of the memory."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from data_pipeline import decode_image as module
from data_pipeline.decode_image import CANNOT_DECODE, MAX_PIXELS, decode_image
from data_pipeline.schema import Rejected

RANDOM = np.random.default_rng(0)
NOISE = Image.fromarray(RANDOM.integers(0, 256, (45, 70, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def refusal(content: bytes) -> str:
    """Every refusal is one line of one category."""
    with pytest.raises(ValueError, match=CANNOT_DECODE) as error:
        decode_image(content)
    reason = str(error.value)
    assert Rejected("key", reason).category == CANNOT_DECODE
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_has_the_pixels_that_pillow_sees(subsampling: int, progressive: bool) -> None:
    content = encoded(NOISE, subsampling=subsampling, progressive=progressive)
    pixels = decode_image(content)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pillow(content))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_without_ordinary_colours_has_the_pixels_that_pillow_sees(mode: str) -> None:
    content = encoded(NOISE.convert(mode))
    assert np.array_equal(decode_image(content), by_pillow(content))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_is_turned_and_mirrored_as_its_exif_says(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(NOISE.convert(mode), exif=exif)
    assert np.array_equal(decode_image(content), by_pillow(content))
    assert decode_image(content).shape == ((45, 70, 3) if orientation < 5 else (70, 45, 3))


@pytest.mark.filterwarnings("ignore")  # decode_image sets this once for a process, which pytest undoes
@pytest.mark.parametrize("damage", [b"\xff" * 32, b"\0\1\1\x12\0\2\0\0\0\1x\0\0\0\0\0\0\0"])  # the last: a text
def test_damaged_exif_does_not_cost_a_whole_picture(damage: bytes) -> None:
    content = encoded(NOISE)
    damaged = b"Exif\0\0MM\0*\0\0\0\x08" + damage
    spoiled = content[:2] + b"\xff\xe1" + struct.pack(">H", len(damaged) + 2) + damaged + content[2:]
    assert np.array_equal(decode_image(spoiled), decode_image(content))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused_and_never_grey(mode: str, progressive: bool) -> None:
    content = encoded(NOISE.convert(mode), progressive=progressive)
    start = content.index(b"\xff\xda")
    for cut in (2, 20, start, start + 30, (start + len(content)) // 2, len(content) - 10, len(content) - 1):
        refusal(content[:cut])
        if cut < len(content) - 1:
            refusal(content[:cut] + b"\xff\xd9")  # Pillow takes some of these for whole


def test_padding_at_the_end_of_a_jpeg_is_no_damage() -> None:
    content = encoded(NOISE)
    for padded in (content + b"\0" * 40, content[:-2] + b"\0\0\x12\0" + content[-2:]):
        assert np.array_equal(decode_image(padded), decode_image(content))


def test_what_is_no_picture_is_refused() -> None:
    assert "zero bytes" in refusal(b"")
    for content in (b"\xff", b"\xff\xd8", b"<html>not found</html>", b"GIF89a", encoded(NOISE, "PNG")[:1000]):
        refusal(content)


def test_kinds_that_start_programs_or_that_nobody_needs_are_refused() -> None:
    for kind in ("EPS", "PPM", "ICO", "TGA"):
        refusal(encoded(NOISE, kind))


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    content = bytearray(encoded(NOISE))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("side", [7_072, 12_000, 16_000, 65_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: object, **options: object) -> None:
        pytest.fail("a decoder was started")  # not an Exception, so decode_image does not swallow it

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for bomb in (png_that_claims(side, side), jpeg_that_claims(side, side)):
        assert f"more than {MAX_PIXELS:,}" in refusal(bomb)


def peak_bytes_per_pixel(content: bytes, num_pixels: int) -> float:
    """Of a process that decodes `content`, counted by the kernel."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send_peak, args=(sender, content))
    process.start()
    peak = receiver.recv() if receiver.poll(60) else pytest.fail("it did not end")
    process.join()
    return peak / num_pixels


def _send_peak(sender: Connection, content: bytes) -> None:
    decode_image(encoded(NOISE, "PNG"))  # what is imported is not counted
    decode_image(encoded(NOISE.convert("RGBA"), "PNG"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident_bytes("VmRSS")
    decode_image(content)
    sender.send(_resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


@pytest.mark.parametrize("turned", [False, True])
def test_a_transparent_picture_takes_little_more_memory_than_its_pixels(turned: bool) -> None:
    image = Image.new("RGBA", (2000, 3000), (255, 0, 0, 90))
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    content = encoded(image, "PNG", compress_level=1, exif=exif)
    assert peak_bytes_per_pixel(content, 6_000_000) < 4 + 4 + 3 + 2  # Pillow's, it turned, ours, and parts of it


def test_of_large_pictures_one_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_PIXELS", 45 * 70 - 1)
    under_way, largest = 0, 0
    both = threading.Barrier(2)
    real = module._decode_other

    def decode(opened: Image.Image) -> np.ndarray:
        nonlocal under_way, largest
        under_way += 1
        largest = max(largest, under_way)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # where both could be here, they would meet
        under_way -= 1
        return real(opened)

    monkeypatch.setattr(module, "_decode_other", decode)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(decode_image, [encoded(NOISE, "PNG")] * 2))) == 2
    assert largest == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_other_pictures_are_turned_and_put_together_from_strips(
    orientation: int, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRIP_PIXELS", 500)
    image = NOISE.convert("RGBA")
    image.putalpha(NOISE.getchannel("G"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image.convert(mode), kind, exif=exif, lossless=True)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
    assert np.array_equal(decode_image(content), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert (np.abs(decode_image(content).astype(int) - (255, 0, 0)) < 8).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_transparent_parts_are_white(kind: str) -> None:
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 6))
    pixels = decode_image(encoded(image, kind, lossless=True)).astype(int)
    assert (pixels[:, :4] == 255).all()
    assert (np.abs(pixels[:, 4:] - (0, 0, 255)) < 8).all()


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_any_damage_is_a_picture_or_a_refusal(kind: str) -> None:
    whole = encoded(NOISE, kind)
    random = np.random.default_rng(1)
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(content) if random.random() < 0.5 else 64, 4):
            content[place] = random.integers(0, 256)
        try:
            pixels = decode_image(bytes(content))
        except ValueError as error:
            reason = str(error)
            assert Rejected("key", reason).category == CANNOT_DECODE
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
