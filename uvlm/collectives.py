"""What ranks ask each other besides the mathematics: what has rank 0 found, and is it so everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, where alone it is called, on all ranks: something that pickles."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def on_all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether it is true on all ranks. `device`: the rank's own, from which its backend can reduce."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)
