"""The judge knows easy-vqa's pictures, bears a tokenizer's blur and refuses everything else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from uvlm.demo.judge import COLORS, SHAPES, Verdict, judge

BACKGROUND = (235, 240, 250)
Box = tuple[float, float, float, float]  # left, top, right, bottom


def draw(paint: Callable[[ImageDraw.ImageDraw], object], background: tuple[int, int, int] = BACKGROUND) -> np.ndarray:
    image = Image.new("RGB", (64, 64), background)
    paint(ImageDraw.Draw(image))
    return np.array(image)


def paint_shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, color: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "rectangle":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=color)


def shape_image(shape: str, color: str, box: Box = (20, 18, 44, 42)) -> np.ndarray:
    return draw(lambda pen: paint_shape(pen, shape, box, COLORS[color]))


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_colour_is_named(shape: str, color: str) -> None:
    assert judge(shape_image(shape, color)) == Verdict(shape, color)


@pytest.mark.parametrize("box", [(2, 2, 12, 12), (48, 50, 60, 62), (4, 4, 58, 58)])
@pytest.mark.parametrize("shape", SHAPES)
def test_place_and_size_do_not_matter(shape: str, box: Box) -> None:
    assert judge(shape_image(shape, "teal", box)) == Verdict(shape, "teal")


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_and_weak_noise_as_from_a_tokenizer_are_borne(shape: str) -> None:
    blurred = np.array(Image.fromarray(shape_image(shape, "brown")).filter(ImageFilter.GaussianBlur(1.2)))
    noise = np.random.default_rng(0).normal(0, 6, blurred.shape)
    assert judge((blurred + noise).clip(0, 255).astype(np.uint8)) == Verdict(shape, "brown")


@pytest.mark.parametrize("name", ["orange", "purple", "magenta", "cyan", "pink", "navy"])
def test_a_colour_without_a_name_of_ours_is_refused(name: str) -> None:
    rgb = {
        "orange": (255, 140, 0),
        "purple": (128, 0, 160),
        "magenta": (255, 0, 255),
        "cyan": (0, 255, 255),
        "pink": (255, 120, 160),
        "navy": (0, 0, 128),
    }[name]
    assert judge(draw(lambda pen: pen.rectangle((20, 20, 40, 40), fill=rgb))).color is None


def test_two_shapes_are_refused() -> None:
    for second in ("red", "blue"):

        def paint(pen: ImageDraw.ImageDraw, second: str = second) -> None:
            paint_shape(pen, "circle", (6, 6, 24, 24), COLORS["red"])
            paint_shape(pen, "rectangle", (36, 36, 54, 54), COLORS[second])

        assert judge(draw(paint)).shape is None


def test_a_shape_of_two_colours_is_refused() -> None:
    def paint(pen: ImageDraw.ImageDraw) -> None:
        pen.rectangle((16, 16, 31, 47), fill=COLORS["red"])
        pen.rectangle((32, 16, 47, 47), fill=COLORS["blue"])

    verdict = judge(draw(paint))
    assert None in (verdict.shape, verdict.color)


@pytest.mark.parametrize("value", [0, 128, 240, 255])
def test_a_blank_shows_nothing(value: int) -> None:
    assert judge(np.full((64, 64, 3), value, np.uint8)) == Verdict(None, None)


def test_noise_and_gradients_show_nothing() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        assert judge(random.integers(0, 256, (64, 64, 3), np.uint8)).shape is None
        patches = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        assert judge(patches).shape is None
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    assert judge(np.broadcast_to(ramp[None, :, None], (64, 64, 3)).copy()).shape is None


Strokes = tuple[Callable[[ImageDraw.ImageDraw], object], ...]
RED = COLORS["red"]
IMPOSTORS: dict[str, Strokes] = {
    "ring": (lambda pen: pen.ellipse((14, 14, 50, 50), outline=RED, width=4),),
    "frame": (lambda pen: pen.rectangle((14, 14, 50, 50), outline=RED, width=4),),
    "cross": (
        lambda pen: pen.rectangle((28, 14, 36, 50), fill=RED),
        lambda pen: pen.rectangle((14, 28, 50, 36), fill=RED),
    ),
    "corner": (
        lambda pen: pen.rectangle((14, 14, 24, 50), fill=RED),
        lambda pen: pen.rectangle((14, 40, 50, 50), fill=RED),
    ),
    "half circle": (lambda pen: pen.pieslice((12, 12, 52, 52), 0, 180, fill=RED),),
    "crescent": (
        lambda pen: pen.ellipse((12, 12, 52, 52), fill=RED),
        lambda pen: pen.ellipse((22, 12, 62, 52), fill=BACKGROUND),
    ),
    "upside-down triangle": (lambda pen: pen.polygon([(14, 16), (50, 16), (32, 48)], fill=RED),),
    "flat ellipse": (lambda pen: pen.ellipse((8, 24, 56, 40), fill=RED),),
    "diamond": (lambda pen: pen.polygon([(32, 10), (54, 32), (32, 54), (10, 32)], fill=RED),),
    "speck": (lambda pen: pen.point((30, 30), fill=RED),),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_shape_of_ours_is_refused(name: str) -> None:
    picture = draw(lambda pen: [stroke(pen) for stroke in IMPOSTORS[name]])
    assert judge(picture).shape is None


def test_real_test_pictures_are_judged_right() -> None:
    from uvlm.demo.easy_vqa import pictures

    known = [picture for picture in pictures("test") if picture.caption][::4]
    assert len(known) > 150
    right = 0
    for picture in known:
        with Image.open(picture.path) as image:
            right += judge(np.array(image.convert("RGB"))) == Verdict(picture.shape, picture.color)
    assert right >= 0.99 * len(known)


def test_other_arrays_are_refused_with_their_shape() -> None:
    with pytest.raises(ValueError, match="float64"):
        judge(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="64, 64"):
        judge(np.zeros((64, 64), np.uint8))
