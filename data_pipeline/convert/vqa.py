"""Format `vqa`: a .jsonl of images with questions and answers, for learning to understand.

    {"image": "path.png", "questions": [["what color?", "blue"], ["is it a circle?", "no"]], "id": "optional"}

All questions of an image share a document, so its codes are read once for all of them: the image, then question and
answer in turn, with loss exactly on the answers. A question is stored as it is. An answer gets one leading space
(" blue"), because byte-level BPE writes a word inside a sentence so: the answer then shares its tokens with the same
word in other texts, instead of a rare form at the start of a line. Whoever compares answers strips them.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.convert.draft import Draft
from data_pipeline.convert.fields import image_of, is_encodable, record_id
from data_pipeline.convert.options import Options
from data_pipeline.schema import Rejected

CONTAINERS = ("jsonl", "json")


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    questions = record.get("questions")
    if not isinstance(questions, list) or not questions or not all(_is_pair(pair) for pair in questions):
        return Rejected(key, "questions are not a list of question and answer, at least one")
    image = image_of(key, record, options.image_column)
    if isinstance(image, Rejected):
        return image
    texts: list[str | None] = [None]
    for question, answer in questions:
        texts += [question, f" {answer.strip()}"]
    return Draft(
        texts=texts,
        images=[image, *[None] * (len(texts) - 1)],
        task="understand",
        loss=[False, *[False, True] * len(questions)],
        meta=record_id(record),
    )


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(text, str) and text.strip() and is_encodable(text) for text in pair)
    )
