"""A document as the model reads it: ids, labels already shifted, and where its images lie.

    <|bos|>  slots ...  <|eos|>
    text without loss   its tokens                          segment instruction
    text with loss      its tokens, <|end|>                 segment output
    image               <|image|> codes <|/image|>          segment image

A slot with loss supervises all it contains, markers included, so a generating model learns to open and close images;
a slot without loss supervises nothing, and neither does <|bos|> or <|eos|>. What holds for a whole slot, its segment
and its loss, is kept by slot and written out to tokens once for a whole pack (packing.py). A document longer than a
pack can be cut between its slots (`encode_pieces`); each piece is a document of its own, with <|bos|> and <|eos|>.
Cost (run): 45 us for a document of 24 short texts and one 8x8 image, 7 us for one caption and one image. numpy only.

Legend: n tokens of the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.schema import TASKS, Document, Rejected, codes_name
from data_pipeline.vocab import Vocab

SEGMENTS = ("system", "instruction", "image", "output")  # the index is the segment's id
SYSTEM, INSTRUCTION, IMAGE, OUTPUT = range(len(SEGMENTS))
IGNORED = -100  # the label of a token that is not supervised
TOO_LONG = "longer than a pack"  # a category of rejections that says nothing about the data's quality


@dataclass(eq=False, slots=True)  # not frozen: one is made for every document, and a frozen one takes 2 us more
class Encoded:
    """A document's tokens. <|bos|> and <|eos|> count as slots of one token; the first slot never carries loss."""

    ids: np.ndarray  # int64 [n]
    slot_lengths: list[int]  # tokens, together n
    slot_segments: list[int]  # index into SEGMENTS
    slot_losses: list[bool]
    task: int  # index into TASKS
    source: str
    doc_id: str
    image_starts: list[int]  # index of an image's first code
    image_shapes: list[tuple[int, int]]  # rows and columns of codes
    image_targets: list[bool]  # the image carries loss

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]: ids[t + 1] where token t + 1 is supervised, else IGNORED."""
        return shifted_labels(self.ids, self.slot_lengths, self.slot_losses)

    @property
    def segment(self) -> np.ndarray:
        """uint8 [n], index into SEGMENTS."""
        return np.repeat(np.array(self.slot_segments, dtype=np.uint8), self.slot_lengths)


def shifted_labels(ids: np.ndarray, slot_lengths: Sequence[int], slot_losses: Sequence[bool]) -> np.ndarray:
    """int64 [n]: ids[t + 1] where the slot of token t + 1 carries loss, else IGNORED. Documents may follow one another:
    as none begins with loss, no label crosses into the next."""
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    is_supervised = np.repeat(np.array(slot_losses, dtype=np.bool_), slot_lengths)
    np.copyto(labels[:-1], ids[1:], where=is_supervised[1:])
    return labels


class _Slot(NamedTuple):
    ids: Sequence[int] | np.ndarray  # of an image without its markers
    length: int  # in tokens, markers included
    has_loss: bool
    shape: tuple[int, int] | None = None  # of an image's codes


def encode(document: Document, vocab: Vocab) -> Encoded | Rejected:
    """Rejected where an image has no codes, or codes that the vocabulary does not have."""
    slots = _slots(document, vocab)
    return slots if isinstance(slots, Rejected) else _joined(slots, document, document.key, vocab)


def encode_pieces(document: Document, vocab: Vocab, max_tokens: int) -> list[Encoded] | Rejected:
    """The document in pieces of at most `max_tokens`, each as many whole slots as fit, named key/0, key/1, ...

    One piece with the document's own name where all fits. A text that is longer than a piece by itself is cut inside;
    an image never is, so one that does not fit rejects the document.
    """
    slots = _slots(document, vocab)
    if isinstance(slots, Rejected):
        return slots
    room = max_tokens - 2  # <|bos|> and <|eos|>
    if room < 1:
        return Rejected(document.key, f"{TOO_LONG}: a pack has {max_tokens} tokens")
    pieces: list[list[_Slot]] = [[]]
    free = room
    for slot in slots:
        if slot.length > room and slot.shape is not None:
            return Rejected(document.key, f"{TOO_LONG}: one image has {slot.length} tokens, a pack has {max_tokens}")
        for part in [slot] if slot.length <= room else _cut(slot, room):
            if part.length > free:
                pieces.append([])
                free = room
            pieces[-1].append(part)
            free -= part.length
    if len(pieces) == 1:
        return [_joined(slots, document, document.key, vocab)]
    return [_joined(piece, document, f"{document.key}/{i}", vocab) for i, piece in enumerate(pieces)]


def _cut(slot: _Slot, room: int) -> list[_Slot]:
    """A text in parts of at most `room` tokens."""
    parts = [slot.ids[start : start + room] for start in range(0, slot.length, room)]
    return [slot._replace(ids=part, length=len(part)) for part in parts]


def _slots(document: Document, vocab: Vocab) -> list[_Slot] | Rejected:
    slots = []
    for text, image, has_loss in zip(document.texts, document.images, document.loss, strict=True):
        if text is not None:
            tokens = vocab.encode_text(text)
            if has_loss:
                tokens.append(vocab.end)
            slots.append(_Slot(tokens, len(tokens), has_loss))
        else:
            assert image is not None
            codes = document.codes.get(codes_name(image))
            if codes is None:
                return Rejected(document.key, f"image has no codes, run `uvlm data tokenize`: {image}")
            try:
                ids = vocab.code_ids(codes)
            except ValueError as error:
                return Rejected(document.key, str(error))
            slots.append(_Slot(ids, len(ids) + 2, has_loss, (codes.shape[0], codes.shape[1])))
    return slots


def _joined(slots: Sequence[_Slot], document: Document, doc_id: str, vocab: Vocab) -> Encoded:
    lengths = [1, *[slot.length for slot in slots], 1]
    segments, losses = [SYSTEM], [False]
    ids = np.empty(sum(lengths), dtype=np.int64)
    ids[0], ids[-1] = vocab.bos, vocab.eos
    starts: list[int] = []
    shapes: list[tuple[int, int]] = []
    targets: list[bool] = []
    start = 1
    for slot, length in zip(slots, lengths[1:-1], strict=True):
        end = start + length
        losses.append(slot.has_loss)
        if slot.shape is None:
            ids[start:end] = slot.ids
            segments.append(OUTPUT if slot.has_loss else INSTRUCTION)
        else:
            ids[start], ids[end - 1] = vocab.image_start, vocab.image_end
            ids[start + 1 : end - 1] = slot.ids
            segments.append(IMAGE)
            starts.append(start + 1)
            shapes.append(slot.shape)
            targets.append(slot.has_loss)
        start = end
    segments.append(SYSTEM)
    losses.append(False)
    return Encoded(
        ids=ids,
        slot_lengths=lengths,
        slot_segments=segments,
        slot_losses=losses,
        task=TASKS.index(document.task),
        source=document.source,
        doc_id=doc_id,
        image_starts=starts,
        image_shapes=shapes,
        image_targets=targets,
    )
