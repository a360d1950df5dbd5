"""A small model whose modules are called as each rank likes, and its training with and without DeepSpeed.

For tests/traps_worker.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from uvlm.guard import Guard

WIDTH = 16
RATE = 0.1
NUM_RANKS = 2

Route = str  # the modules between the first and the last, in order: "ab"
Steps = Sequence[Sequence[Sequence[Route]]]  # [optimizer step][micro-step][rank]


class Place(NamedTuple):
    rank: int
    num_ranks: int
    folder: Path


class Toy(nn.Module):
    """first -> the modules of the route -> last; a route may call `last` several times, on equal chunks of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, route: Route, num_chunks: int = 1) -> torch.Tensor:
        x = self.first(x)
        for name in route:
            x = getattr(self, name)(x)
        return torch.cat([self.last(chunk) for chunk in x.chunk(num_chunks)]).pow(2).mean()


def rows(step: int, micro_step: int, rank: int) -> torch.Tensor:
    return torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * micro_step + rank))


def engine_of(model: nn.Module, stage: int, accumulation: int = 1) -> Any:
    """DeepSpeed with plain SGD, so that an update is the gradient times RATE; every parameter is really partitioned."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def train(steps: Steps, place: Place, stage: int, guarded: bool = False, model: nn.Module | None = None) -> Any:
    """{"updates": by step, by parameter, divided by -RATE; "losses": by step and micro-step, of this rank}."""
    model = model or Toy()
    engine = engine_of(model, stage, len(steps[0]))
    guard = Guard(model, every=1) if guarded else None
    before, updates, losses = weights_of(engine), [], []
    for step, micro_steps in enumerate(steps):
        for micro_step, routes in enumerate(micro_steps):
            if guard:
                guard.begin()
            loss = engine(rows(step, micro_step, place.rank), routes[place.rank])
            losses.append(loss.item())
            if guard:
                guard.backward()
            engine.backward(loss)
            if guard:
                guard.end()
                if micro_step == len(micro_steps) - 1:
                    guard.compare(step)
            engine.step()
        after = weights_of(engine)
        updates.append({name: (before[name] - after[name]) / RATE for name in before})
        before = after
    return {"updates": updates, "losses": losses}


def plainly(steps: Steps, num_ranks: int) -> Any:
    """The same by one process without DeepSpeed: what is right. A parameter without a gradient is not updated."""
    model, updates, losses = Toy(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step, micro_steps in enumerate(steps):
        optimizer.zero_grad()
        for micro_step, routes in enumerate(micro_steps):
            for rank, route in enumerate(routes):
                loss = model(rows(step, micro_step, rank), route)
                (loss / num_ranks / len(micro_steps)).backward()
                losses.append(loss.item())
        updates.append(
            {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        )
        optimizer.step()
    return {"updates": updates, "losses": losses}


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm-wise."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def harm_and_guard(steps: Steps, place: Place, stage: int) -> dict[str, Any]:
    """How far each update of each parameter is off without a guard, and what the guard says."""
    right = plainly(steps, place.num_ranks)
    got = train(steps, place, stage)
    own_losses = right["losses"][place.rank :: place.num_ranks]
    return {
        "errors": [
            {name: error_of(update[name], expected[name]) for name in expected}
            for update, expected in zip(got["updates"], right["updates"], strict=True)
        ],
        "loss_errors": [abs(loss - own) / own for loss, own in zip(got["losses"], own_losses, strict=True)],
        "b_from_step_0": error_of(got["updates"][-1]["b.weight"], got["updates"][0]["b.weight"]),
        "b_from_both_steps": error_of(
            got["updates"][-1]["b.weight"], sum(update["b.weight"] for update in right["updates"])
        ),
        "guard": guard_says(lambda: train(steps, place, stage, guarded=True)),
    }


def guard_says(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def both(route: Route) -> list[Route]:
    return [route] * NUM_RANKS
