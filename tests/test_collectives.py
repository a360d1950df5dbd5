"""What rank 0 finds, or fails with, reaches all ranks: nobody waits for a value that will not come."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from uvlm.collectives import from_rank_0


def _fail() -> NoReturn:
    raise PermissionError(13, "Permission denied", "checkpoints")


def _be_rank(rank: int, path: str) -> list[str]:
    """What each call gave or raised."""
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    said = [from_rank_0(lambda: f"found by rank {rank}")]
    try:
        from_rank_0(_fail)
    except (OSError, ValueError) as error:
        said.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    dist.destroy_process_group()
    return said


def test_what_rank_0_finds_or_fails_with_is_so_on_all_ranks(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        zero, one = pool.starmap(_be_rank, [(rank, str(tmp_path / "store")) for rank in range(2)], chunksize=1)
    sentence = "[Errno 13] Permission denied: 'checkpoints'"
    assert zero == ["found by rank 0", f"PermissionError: {sentence}"]
    assert one == ["found by rank 0", f"ValueError: rank 0: {sentence}"]
