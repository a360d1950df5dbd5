"""Packs of random documents for property tests: text, input images and target images in any order and number.

A document is written as its slots, `text(5)`, `image(2, 3, loss=True)`, and laid out as data_pipeline/encode.py does
it: <|bos|>, slots, <|eos|>; the markers around an image's codes belong to its slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from data_pipeline.encode import IMAGE, INSTRUCTION, OUTPUT, SYSTEM, Encoded
from data_pipeline.packing import Pack, make_pack
from data_pipeline.schema import TASKS
from tests.helpers import VOCAB_SIZE

BOS, EOS, OPEN, CLOSE = range(VOCAB_SIZE - 4, VOCAB_SIZE)


class Slot(NamedTuple):
    """A text of `length` tokens, or an image of `shape`."""

    length: int
    has_loss: bool
    shape: tuple[int, int] | None = None


def text(length: int, loss: bool = False) -> Slot:
    return Slot(length, loss)


def image(height: int, width: int, loss: bool = False) -> Slot:
    return Slot(height * width + 2, loss, (height, width))


def laid_out(slots: list[Slot], task: str, seed: int | list[int]) -> Encoded:
    """The document of these slots with random words and codes."""
    generator = np.random.default_rng(seed)
    ids, starts, segments = [BOS], [], [SYSTEM]
    for slot in slots:
        words = generator.integers(0, BOS, slot.length).tolist()
        if slot.shape is None:
            segments.append(OUTPUT if slot.has_loss else INSTRUCTION)
        else:
            segments.append(IMAGE)
            starts.append(len(ids) + 1)
            words[0], words[-1] = OPEN, CLOSE
        ids += words
    shapes = [(slot.shape, slot.has_loss) for slot in slots if slot.shape is not None]
    return Encoded(
        ids=np.array([*ids, EOS]),
        slot_lengths=[1, *(slot.length for slot in slots), 1],
        slot_segments=[*segments, SYSTEM],
        slot_losses=[False, *(slot.has_loss for slot in slots), False],
        task=TASKS.index(task),
        source="test",
        doc_id=f"{task}-{seed}",
        image_starts=starts,
        image_shapes=[shape for shape, _ in shapes],
        image_targets=[has_loss for _, has_loss in shapes],
    )


def pack_of(documents: list[tuple[str, list[Slot]]], tail: int = 0, name: tuple[int, int] = (0, 0)) -> Pack:
    """A pack of documents, each (task, slots), and an unused tail of so many tokens."""
    encoded = [laid_out(slots, task, seed) for seed, (task, slots) in enumerate(documents)]
    return make_pack(encoded, sum(map(len, encoded)) + tail, 0, name)


TEXT_ONLY = ("text", [text(4), text(6, loss=True)])
IMAGE_FIRST = ("understand", [image(3, 4), text(3), text(4, loss=True)])
IMAGE_LAST = ("generate", [text(5), image(2, 4, loss=True)])
MANY_IMAGES = ("understand", [text(2), image(2, 3), text(1), image(1, 1), image(3, 3), text(3), text(2, loss=True)])
BOTH_KINDS = (
    "interleave",
    [
        text(2),
        image(2, 4),
        text(3, loss=True),
        image(3, 3, loss=True),
        text(2, loss=True),
        image(2, 2),
        text(1, loss=True),
    ],
)
INPUT_LAST = ("interleave", [text(9), text(3, loss=True), image(2, 2, loss=True), image(2, 5)])
NO_LOSS = ("understand", [text(3), image(2, 2), text(2)])


def every_document(tail: int = 5) -> Pack:
    """One pack with all of the above."""
    return pack_of([IMAGE_FIRST, TEXT_ONLY, IMAGE_LAST, MANY_IMAGES, NO_LOSS, BOTH_KINDS, INPUT_LAST], tail, (3, 1))


_TEXTS = st.builds(text, st.integers(1, 9), st.booleans())
_IMAGES = st.builds(image, st.integers(1, 3), st.integers(1, 5), st.booleans())
_DOCUMENTS = st.tuples(st.sampled_from(TASKS), st.lists(_TEXTS | _IMAGES, min_size=1, max_size=5))
_NAMES = st.tuples(st.integers(0, 9), st.integers(0, 99))

# Packs of one to four documents of any kind, with and without an unused tail.
packs = st.builds(pack_of, st.lists(_DOCUMENTS, min_size=1, max_size=4), st.sampled_from([0, 0, 1, 7]), _NAMES)
