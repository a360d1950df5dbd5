"""The demo's generation test: 24 fixed prompts times 4 fixed seeds, judged by rules, and a picture of them all.

Prompts and seeds are fixed here before any training; how to sample was chosen on other seeds (docs/log.md). The judge
is held against the real test images: its own accuracy stands beside every figure it gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from uvlm.demo.easy_vqa import COLORS, SHAPES, pictures
from uvlm.demo.judge import Verdict, judge
from uvlm.generate import Generator
from uvlm.metrics import update_summary
from uvlm.pictures import picture_grid

WANTED = tuple(Verdict(shape, color) for shape in SHAPES for color in COLORS)
SEEDS = (0, 1, 2, 3)


def draw_and_judge(run: Path) -> None:
    """Write RUN/pictures.png, and generation_accuracy and judge_accuracy to RUN/metrics.json."""
    wanted = [verdict for verdict in WANTED for _ in SEEDS]
    prompts = [f"a {verdict.color} {verdict.shape}" for verdict in wanted]
    images = Generator.load(run).images(prompts, [seed for _ in WANTED for seed in SEEDS])
    right = [judge(image) == verdict for image, verdict in zip(images, wanted, strict=True)]
    marks = ["" if is_right else "  x" for is_right in right]
    captions = [prompt + mark for prompt, mark in zip(prompts, marks, strict=True)]
    Image.fromarray(picture_grid(images, captions)).save(run / "pictures.png")
    update_summary(
        run,
        {
            "generation_accuracy": sum(right) / len(right),
            "generated_pictures": len(right),
            "judge_accuracy": judge_accuracy(),
        },
    )


def judge_accuracy() -> float:
    """Share of the real test images, of those whose answers tell shape and colour, that the judge gets right."""
    known = [picture for picture in pictures("test") if picture.caption]
    verdicts = [judge(np.asarray(Image.open(picture.path).convert("RGB"))) for picture in known]
    right = [v == Verdict(p.shape, p.color) for v, p in zip(verdicts, known, strict=True)]
    return sum(right) / len(right)
