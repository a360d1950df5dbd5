"""The corpora a run is trained on, and how much of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.split import Split
from data_pipeline.vocab import Vocab

OverLong = Literal["drop", "split"]


@dataclass(frozen=True)
class Source:
    """A folder of tokenized shards and its share of the documents. Weights are relative to those of the other sources.

    `weight` may change at given steps: ((0, 1.0), (1000, 0.5)) is 1.0 up to step 999 and 0.5 from then on. `over_long`
    says what becomes of documents longer than a pack: they are dropped and counted, or split between their slots.
    """

    name: str
    path: Path | str
    weight: float | tuple[tuple[int, float], ...] = 1.0
    over_long: OverLong = "drop"

    @property
    def weights(self) -> tuple[tuple[int, float], ...]:
        """(step from which it holds, weight), ascending."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)

    def weight_at(self, step: int) -> float:
        if isinstance(self.weight, float | int):
            return self.weight
        return next(weight for first, weight in reversed(self.weight) if first <= step)


@dataclass(frozen=True)
class OpenSource:
    source: Source
    split: Split


def open_sources(sources: Sequence[Source], vocab: Vocab) -> list[OpenSource]:
    """Opens and checks all sources, once per process. ValueError or FileNotFoundError names the source at fault."""
    if not sources:
        raise ValueError("no data sources are given; name at least one folder of shards")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sources share a name among {', '.join(names)}; give each its own")
    _check_weights(sources)
    opened = []
    for source in sources:
        split = Split.open(source.path, vocab.image_tokenizer, images=False)
        if len(split) == 0:
            raise ValueError(f"source {source.name!r} at {source.path} holds no documents; convert it again")
        opened.append(OpenSource(source, split))
    return opened


def _check_weights(sources: Sequence[Source]) -> None:
    for source in sources:
        steps = [step for step, _ in source.weights]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"the weights of source {source.name!r} are for the steps {steps}; begin at 0 and go up")
        weights = [weight for _, weight in source.weights]
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            told = ", ".join(f"{weight:g} from step {step}" for step, weight in source.weights)
            raise ValueError(f"source {source.name!r} has weight {told}; give it a positive weight or remove it")
    for step in sorted({step for source in sources for step, _ in source.weights}):
        if not any(source.weight_at(step) for source in sources):
            raise ValueError(f"all sources have weight 0 from step {step} on; give one a positive weight there")
