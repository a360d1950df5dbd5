"""`python -m tests.preflight_worker RANK PORT CONFIG FOLDER`: a rank of four that passes one preflight after the other.

Each is spoiled in one way on some ranks. What a rank printed and was refused with goes to FOLDER/rank_RANK.json by
case; after the last case, LATE, nobody is left to write.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from data_pipeline.storage import Folder
from uvlm import preflight, preflight_judge
from uvlm.config import Config, load_config

NUM_RANKS = 4
LATE = "late"
CPU = torch.device("cpu")
SLEEP = 0.5  # seconds for an exchange that takes some milliseconds otherwise


def slow(before: Callable[..., Any], ranks: set[int]) -> Callable[..., Any]:
    """Exchanges with `ranks` take long."""

    def exchange(ops: list[dist.P2POp]) -> Any:
        if ops[0].peer in ranks:
            time.sleep(SLEEP)
        return before(ops)

    return exchange


def stuck(before: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The exchange with `rank` never comes."""

    def exchange(ops: list[dist.P2POp]) -> Any:
        if ops[0].peer == rank:
            threading.Event().wait()
        return before(ops)

    return exchange


def flipped(before: Callable[..., torch.Tensor], rank: int) -> Callable[..., torch.Tensor]:
    """One bit of one byte that `rank` sends is another one."""

    def pattern(sender: int, num_bytes: int, device: torch.device) -> torch.Tensor:
        sent = before(sender, num_bytes, device)
        if sender == rank:
            sent[num_bytes // 2] ^= 1
        return sent

    return pattern


def wrong(before: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One element of a product is off by one."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = before(a, b)
        c[7, 11] += 1
        return c

    return product


def faults(rank: int, config: Config, folder: Path) -> Iterator[tuple[str, Any, Config]]:
    """By case: its name, what spoils it on this rank, and this rank's config."""

    def on(ranks: set[int], fault: Any) -> Any:
        return fault if rank in ranks else contextlib.nullcontext()

    exchange, clock = dist.batch_isend_irecv, time.time
    yield "well", contextlib.nullcontext(), config
    yield "slow link", on({1}, patch.object(dist, "batch_isend_irecv", slow(exchange, {2}))), config
    yield "slow rank", on({1}, patch.object(dist, "batch_isend_irecv", slow(exchange, {0, 2, 3}))), config
    yield "flipped byte", on({2}, patch.object(preflight, "pattern", flipped(preflight.pattern, 2))), config
    yield "wrong product", on({3}, patch.object(torch, "mm", wrong(torch.mm))), config
    yield "wrong sum", on({0}, patch.object(preflight, "_sum_is_right", broken_sum(preflight._sum_is_right))), config
    real_open = Folder.open
    for case, ranks, name in (("other data", {3}, "other"), ("no data", {2, 3}, "nowhere")):
        elsewhere = staticmethod(lambda place, name=name: real_open(folder / name))
        yield case, on(ranks, patch.object(preflight.Folder, "open", elsewhere)), config
    code = [folder / "code" / "uvlm", folder / "code" / "data_pipeline"]
    yield "other code", on({2, 3}, patch.object(preflight, "code_folders", lambda: code)), config
    yield "clock", on({2, 3}, patch.object(time, "time", lambda: clock() + 3.0)), config
    elsewhere_run = config.model_copy(update={"run": folder / "local"}) if rank > 1 else config
    yield "other run folder", patch.object(preflight, "_TOKEN_SECONDS", 0.5), elsewhere_run
    yield LATE, on({1}, patch.object(dist, "batch_isend_irecv", stuck(exchange, 2))), config


def broken_sum(before: Callable[..., bool]) -> Callable[..., bool]:
    """This rank's part of the last sum is another one than it should be."""

    def is_right(num_elements: int, device: torch.device) -> bool:
        with patch.object(dist, "get_rank", lambda: 5 if num_elements > 1 else 0):
            return before(num_elements, device)

    return is_right


def main() -> None:
    rank, port, config, folder = int(sys.argv[1]), int(sys.argv[2]), load_config(Path(sys.argv[3])), Path(sys.argv[4])
    torch.set_num_threads(1)
    # Far above what a busy machine does to four processes on two cores, far below what is done to them here.
    preflight_judge.SLOW_LINK = preflight_judge.SLOW_RANK = 20.0
    preflight._GRACE = 1.0
    server = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=120))
    said: dict[str, Any] = {}
    for case, fault, own_config in faults(rank, config, folder):
        store = dist.PrefixStore(case, server)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=120))
        refused = None
        started = time.perf_counter()
        deadline = 8.0 if case == LATE else 120.0
        with fault, contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                preflight.preflight(own_config, CPU, deadline)
            except ValueError as error:
                refused = str(error)
        seconds = time.perf_counter() - started
        said[case] = {"printed": printed.getvalue(), "refused": refused, "seconds": seconds}
        (folder / f"rank_{rank}.json").write_text(json.dumps(said, indent=1))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
