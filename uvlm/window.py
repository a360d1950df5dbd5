"""What is counted between two records, on each rank; reduced over ranks only for a record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from uvlm.flops import Widths, dense_flops, flops
from uvlm.losses import by_task
from uvlm.phases import Phases
from uvlm.token_plan import TokenPlan

# By pack: tokens of documents, tokens that it could hold, one, shares that pass through layers, FLOPs.
_SUMS = ("tokens", "places", "packs", "queries", "image_queries", "flops", "dense_flops")


class Window:
    """Sums over the steps since the last record, on this rank. They are reduced over ranks only for a record."""

    def __init__(self, device: torch.device) -> None:
        self.phases = Phases(device)
        self.nll_K = torch.zeros(len(TASKS), dtype=torch.float64, device=device)
        self.counts_K = torch.zeros(len(TASKS), dtype=torch.float64)
        self.sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        self.num_steps = 0
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not training does not count as time of the window."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def add_pack(self, pack: Pack, plan: TokenPlan, widths: Widths) -> None:
        """What a pack holds and what its pass costs."""
        values = (num_useful_tokens(pack), len(pack.ids), 1, plan.query_share, plan.image_query_share)
        for name, value in zip(_SUMS, (*values, flops(plan, widths).total, dense_flops(plan, widths)), strict=True):
            self.sums[name] += value

    def add_step(self, nll_K: torch.Tensor, counts_K: torch.Tensor, was_skipped: bool) -> None:
        """The losses of a step; those of one that was left out, which are not finite, do not count.

        Args:
            nll_K: fp32, negative log-likelihoods summed by task, on the device. counts_K: of how many tokens.
        """
        self.num_steps += 1
        if not was_skipped:
            self.nll_K += nll_K
            self.counts_K += counts_K

    def reduced(self, num_rejected: int) -> dict[str, float]:
        """The record of these steps over all ranks; every rank calls it, with the documents its rows have left out."""
        seconds = time.perf_counter() - self.started
        phase_seconds, phase_bytes = self.phases.take()
        own = {**self.sums, "rejected": num_rejected, **phase_seconds}
        num_tasks, num_ranks = len(TASKS), dist.get_world_size()
        values = torch.tensor(list(own.values()), dtype=torch.float64)
        totals = torch.cat([self.nll_K.cpu(), self.counts_K, values]).to(self.nll_K.device)
        dist.all_reduce(totals)
        peaks = torch.tensor(list(phase_bytes.values()), dtype=torch.float64, device=totals.device)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        nll_K, counts_K, rest = totals.cpu().split([num_tasks, num_tasks, len(own)])
        of_all = dict(zip(own, rest.tolist(), strict=True))
        losses = by_task(nll_K / counts_K.clamp(min=1), counts_K)
        return {
            **({"loss/mean": sum(losses.values()) / len(losses)} if losses else {}),
            **{f"loss/{task}": value for task, value in losses.items()},
            "roles/query_share": of_all["queries"] / of_all["packs"],
            "roles/image_query_share": of_all["image_queries"] / of_all["packs"],
            "roles/flop_share": of_all["flops"] / of_all["dense_flops"],
            "speed/tokens_per_second": of_all["tokens"] / seconds,
            "speed/data_wait_share": of_all["data"] / num_ranks / seconds,
            **{f"time/{name}": of_all[name] / num_ranks / self.num_steps for name in phase_seconds},
            **{f"memory/{n}_gb": peak / 1e9 for n, peak in zip(phase_bytes, peaks.tolist(), strict=True) if peak},
            "data/fill_share": of_all["tokens"] / of_all["places"],
            "data/rejected_documents": of_all["rejected"],
        }


def num_useful_tokens(pack: Pack) -> int:
    """Tokens of documents; the unused tail does not count."""
    return int(pack.cu_seqlens.diff()[pack.doc_task >= 0].sum())
