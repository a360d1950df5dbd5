"""Format `vqa`: a .jsonl of images with questions and answers, for learning to understand.

    {"image": "path.png", "questions": [["what color?", "blue"], ["is it a circle?", "no"]], "id": "optional"}

All questions of an image share a document, so its codes are read once for all of them: the image, then question and
answer in turn, with loss exactly on the answers. A question is stored as it is. An answer gets one leading space
(" blue"), because byte-level BPE writes a word inside a sentence so: the answer then shares its tokens with the same
word in other texts, instead of a rare form at the start of a line. Whoever compares answers strips them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.convert.pairs import is_encodable, read_image, read_records, record_id
from data_pipeline.schema import Document, Rejected


def read_vqa(source: Path) -> Iterator[Document | Rejected]:
    """One document or rejection for each line that is not blank. I/O errors are raised."""
    for key, record in read_records(source):
        if isinstance(record, Rejected):
            yield record
            continue
        questions = record.get("questions")
        if not isinstance(questions, list) or not questions or not all(_is_pair(pair) for pair in questions):
            yield Rejected(key, "questions are not a list of question and answer, at least one")
            continue
        image = read_image(key, record, source.parent)
        if isinstance(image, Rejected):
            yield image
            continue
        name, content = image
        texts: list[str | None] = [None]
        for question, answer in questions:
            texts += [question, f" {answer.strip()}"]
        yield Document(
            key=key,
            texts=tuple(texts),
            images=(name, *[None] * (len(texts) - 1)),
            task="understand",
            loss=(False, *[False, True] * len(questions)),
            source=source.stem,
            meta=record_id(record),
            image_bytes={name: content},
            codes={},
        )


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, str) and text.strip() and is_encodable(text) for text in pair)
    )
