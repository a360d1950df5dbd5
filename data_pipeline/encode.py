"""A document as the model reads it: ids, labels already shifted, and where its images lie.

    <|bos|>  slots ...  <|eos|>
    text without loss   its tokens                          segment instruction
    text with loss      its tokens, <|end|>                 segment output
    image               <|image|> codes <|/image|>          segment image

A slot with loss supervises all it contains, markers included, so a generating model learns to open and close images;
a slot without loss supervises nothing, and neither does <|bos|> or <|eos|>. Labels are shifted here, inside the
document, so no label can cross into a pack's next document.
Cost (run): 150 us for a document of 24 short texts and one 8x8 image, nearly all of it BPE; 19 us for one caption and
one image. numpy only.

Legend: n tokens of the document, m images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.schema import TASKS, Document, Rejected, codes_name
from data_pipeline.vocab import Vocab

SEGMENTS = ("system", "instruction", "image", "output")  # the index is the segment's id
SYSTEM, INSTRUCTION, IMAGE, OUTPUT = range(len(SEGMENTS))
IGNORED = -100  # the label of a token that is not supervised


@dataclass(frozen=True, eq=False)
class Encoded:
    ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]: ids[t + 1] where token t + 1 is supervised, else IGNORED
    segment: np.ndarray  # uint8 [n], index into SEGMENTS
    task: int  # index into TASKS
    source: str
    doc_id: str
    image_start: np.ndarray  # int64 [m], index of an image's first code
    image_hw: np.ndarray  # int64 [m, 2], rows and columns of codes
    image_is_target: np.ndarray  # bool [m], the image carries loss

    def __len__(self) -> int:
        return len(self.ids)


def encode(document: Document, vocab: Vocab) -> Encoded | Rejected:
    """Rejected where an image has no codes, or codes that the vocabulary does not have."""
    parts: list[Sequence[int] | np.ndarray] = [[vocab.bos]]
    spans: list[tuple[int, int, int, bool]] = []  # start, end, segment, is supervised
    starts: list[int] = []
    shapes: list[tuple[int, ...]] = []
    targets: list[bool] = []
    end = 1
    for text, image, has_loss in zip(document.texts, document.images, document.loss, strict=True):
        start = end
        if text is not None:
            tokens = vocab.encode_text(text)
            if has_loss:
                tokens.append(vocab.end)
            parts.append(tokens)
            end += len(tokens)
            spans.append((start, end, OUTPUT if has_loss else INSTRUCTION, has_loss))
        else:
            assert image is not None
            codes = document.codes.get(codes_name(image))
            if codes is None:
                return Rejected(document.key, f"image has no codes, run `uvlm data tokenize`: {image}")
            try:
                code_ids = vocab.code_ids(codes)
            except ValueError as error:
                return Rejected(document.key, str(error))
            parts += [[vocab.image_start], code_ids, [vocab.image_end]]
            end += len(code_ids) + 2
            spans.append((start, end, IMAGE, has_loss))
            starts.append(start + 1)
            shapes.append(codes.shape)
            targets.append(has_loss)
    parts.append([vocab.eos])

    ids = np.empty(end + 1, dtype=np.int64)
    position = 0
    for part in parts:
        ids[position : position + len(part)] = part
        position += len(part)
    segment = np.full(len(ids), SYSTEM, dtype=np.uint8)
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    for start, end, kind, is_supervised in spans:
        segment[start:end] = kind
        if is_supervised:
            labels[start - 1 : end - 1] = ids[start:end]  # start >= 1, because <|bos|> comes first
    return Encoded(
        ids=ids,
        labels=labels,
        segment=segment,
        task=TASKS.index(document.task),
        source=document.source,
        doc_id=document.key,
        image_start=np.array(starts, dtype=np.int64),
        image_hw=np.array(shapes, dtype=np.int64).reshape(-1, 2),
        image_is_target=np.array(targets, dtype=np.bool_),
    )
