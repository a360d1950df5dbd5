"""What ranks ask each other besides the mathematics: what has rank 0 found, and is it so everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, where alone it is called, on all ranks: something that pickles.

    What it raises ends all ranks, rank 0 with that itself; the others would wait for ever for a value.
    """
    made: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            failed, made[1] = error, f"rank 0: {error or type(error).__name__}"
    dist.broadcast_object_list(made)
    if failed:
        raise failed
    if made[1]:
        raise ValueError(made[1])
    return cast("T", made[0])


def on_all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether it is true on all ranks. `device`: the rank's own, from which its backend can reduce."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)
