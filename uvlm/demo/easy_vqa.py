"""The demo's corpus: easy-VQA (github.com/vzhou842/easy-VQA, MIT), 5,000 real images and 48,248 questions on PyPI.

Each image shows one shape of one colour. It becomes two kinds of document: *understand*, the image and all of its
questions with their answers; and *generate*, a caption that its answers imply, then the image. Where the answers tell
too little for a caption (458 of 4,000) the image stands alone: from these the model learns the unconditional half of
guidance. One training image in twenty is held out for the validation loss. Test images never reach the tokenizer or the
training set; each test question is a document of its own, so that no answer is seen before it is asked for.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.files import replace_file
from uvlm.demo.judge import COLORS, SHAPES

_VALID_EVERY = 20


class Picture(NamedTuple):
    """One image of the package; shape and color are None where no answer tells."""

    id: int
    path: Path
    questions: tuple[tuple[str, str], ...]
    shape: str | None
    color: str | None

    @property
    def caption(self) -> str | None:
        return f"a {self.color} {self.shape}" if self.color and self.shape else None


def pictures(split: str) -> list[Picture]:
    """All pictures of "train" or "test", in the order of their ids."""
    try:
        import easy_vqa
    except ModuleNotFoundError:
        raise ValueError("the demo's corpus is not installed; install it: pip install 'uvlm[demo]'") from None

    if split == "train":
        paths, (questions, answers, ids) = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    else:
        paths, (questions, answers, ids) = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(questions, answers, ids, strict=True):
        by_image[image_id].append((question, answer))
    return [
        Picture(image_id, Path(path), tuple(asked := by_image[image_id]), _told(asked, SHAPES), _told(asked, COLORS))
        for image_id, path in sorted(paths.items())
    ]


def _told(questions: list[tuple[str, str]], names: Collection[str]) -> str | None:
    """Which of `names` the picture shows, as far as its answers tell."""
    for question, answer in questions:
        if answer in names:
            return answer
        words = question.rstrip("?").split()
        named = next((name for name in names if name in words), None)
        if named is None:
            continue
        if answer not in ("yes", "no"):  # "what color is the circle?" tells a shape
            return named
        denied = "not" in words or "no" in words  # "is there not a circle?"
        if (answer == "yes") != denied:
            return named
    return None


def write_sources(folder: Path) -> None:
    """Write the five jsonl files that `uvlm data convert` reads, each whole or not at all."""
    train = pictures("train")
    splits = {
        "train": [p for p in train if p.id % _VALID_EVERY],
        "valid": [p for p in train if p.id % _VALID_EVERY == 0],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        _write(folder / f"understand-{split}.jsonl", (_questions(p, p.questions, str(p.id)) for p in members))
        _write(folder / f"generate-{split}.jsonl", ({"image": str(p.path), "caption": p.caption} for p in members))
    _write(
        folder / "understand-test.jsonl",
        (_questions(p, (asked,), f"{p.id}-{i}") for p in pictures("test") for i, asked in enumerate(p.questions)),
    )


def _questions(picture: Picture, questions: tuple[tuple[str, str], ...], key: str) -> dict[str, object]:
    return {"image": str(picture.path), "questions": questions, "id": key}


def _write(path: Path, lines: Iterator[dict[str, object]]) -> None:
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))
