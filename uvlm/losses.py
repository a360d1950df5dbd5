"""Losses: for each task the sum over its supervised tokens, divided by the *global* count of them.

ZeRO averages gradients over ranks and DeepSpeed divides by the accumulation steps, so both factors are put back here.
Then the gradients of any split over ranks and micro-steps equal those of one process that holds all packs.

Legend: S supervised tokens of a micro-step, K = len(TASKS).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from data_pipeline.encode import IGNORED
from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS


def task_ids(pack: Pack) -> torch.Tensor:
    """Task id of each supervised token, int64 [S], in the order of the pack. The pack is still on the host."""
    lengths = pack.cu_seqlens.diff().long()
    return pack.doc_task.repeat_interleave(lengths)[pack.labels != IGNORED]


def task_counts(packs: list[Pack]) -> torch.Tensor:
    """Supervised tokens by task over some packs, float64 [K] on the CPU."""
    counts_K = torch.zeros(len(TASKS), dtype=torch.float64)
    for pack in packs:
        counts_K += torch.bincount(task_ids(pack), minlength=len(TASKS))
    return counts_K


def task_sums(nll_S: torch.Tensor, task_ids_S: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods, fp32, summed by task: fp32 [K]."""
    return torch.zeros(len(TASKS), device=nll_S.device).index_add(0, task_ids_S, nll_S)


def task_scales(counts_K: torch.Tensor, weights: Mapping[str, float], num_micro_batches: int) -> torch.Tensor:
    """What to multiply the loss of each task's tokens with before the engine's backward: fp32 [K].

    Args:
        counts_K: supervised tokens by task over all ranks and micro-steps of this step, on any device.
        weights: weight of each task; 1.0 where none is given.
        num_micro_batches: ranks x accumulation steps, which ZeRO and DeepSpeed divide by.
    """
    weights_K = torch.tensor([weights.get(task, 1.0) for task in TASKS], dtype=torch.float64, device=counts_K.device)
    return (weights_K * num_micro_batches / counts_K.clamp(min=1)).float()


def by_task(values_K: torch.Tensor, counts_K: torch.Tensor) -> dict[str, float]:
    """Name the entries of tasks that have at least one supervised token."""
    return {task: float(values_K[i]) for i, task in enumerate(TASKS) if counts_K[i] > 0}
