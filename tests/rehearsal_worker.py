"""A rank of a rehearsal in which one rank is not as the others are, for test_rehearse.py.

    python -m tests.rehearsal_worker CASE RANK CONFIG.yaml DEEPSPEED.json STEPS RESULT.json
    python -m torch.distributed.run ... -m tests.rehearsal_worker real - CONFIG.yaml DEEPSPEED.json STEPS FOLDER

CASE holds on RANK alone. `real` is no rehearsal: ranks of a real group do the same and write down the same, each into
FOLDER/rank_N.json.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    from uvlm.distributed import prepare_environment

    prepare_environment()

from torch import Tensor, nn

from data_pipeline.loader import Loader
from uvlm import rehearsal_rank
from uvlm.config import SourceConfig
from uvlm.distributed import leave
from uvlm.engine import start
from uvlm.model import UnifiedVLM
from uvlm.trainer import Trainer


def skip() -> None:
    """Layer 1 has no FFN."""
    whole = UnifiedVLM.feed_forward

    def feed_forward(model: UnifiedVLM, number: int, hidden: Tensor) -> Tensor:
        return hidden if number == 1 else whole(model, number, hidden)

    UnifiedVLM.feed_forward = feed_forward  # type: ignore[assignment,method-assign]


def swap() -> None:
    """In layer 2 two modules of the same shape change places: every gather has the same size as elsewhere."""
    whole = UnifiedVLM._module

    def module(model: UnifiedVLM, number: int, name: str, kind: str = "text") -> nn.Module:
        return whole(model, number, {"k": "v", "v": "k"}.get(name, name) if number == 2 else name, kind)

    UnifiedVLM._module = module  # type: ignore[assignment,method-assign]


def other_task() -> None:
    """It reads the first source alone."""
    whole = Trainer._loader

    def loader(trainer: Trainer, sources: Sequence[SourceConfig], *others: Any, **more: Any) -> Loader:
        return whole(trainer, sources[:1], *others, **more)

    Trainer._loader = loader  # type: ignore[assignment,method-assign]


def real(arguments: list[str]) -> list[str]:
    """The arguments with a file for this rank."""
    rehearsal_rank.Rehearsal.run = lambda self: self.start_and_step(start())  # type: ignore[method-assign]
    return [*arguments[:-1], str(Path(arguments[-1]) / f"rank_{os.environ['RANK']}.json")]


def die() -> None:
    """Linux kills it, as it does where memory runs out."""
    print("the last words of a rank", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    """It fails in its first step with an error that nobody has foreseen."""

    def train_step(trainer: Trainer, *_: Any) -> float | None:
        raise RuntimeError("a kernel has no image for this device")

    Trainer.train_step = train_step  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    case, rank, *arguments = sys.argv[1:]
    if case == "real":
        arguments = real(arguments)
    elif os.environ["RANK"] == rank:
        {"skip": skip, "swap": swap, "other_task": other_task, "die": die, "crash": crash}[case]()
    leave(rehearsal_rank.main(*arguments))
