"""A checkpoint of another number of ranks, by way of DeepSpeed's universal checkpoint.

Rank 0 has it converted by a process of its own: DeepSpeed's converter prints, keeps what it has read, and starts
processes, which a rank with a GPU and the threads of a process group must not. The others wait by asking again and
again, since nobody knows how long it takes and a collective has its time limit. All ranks load the result, which is
then removed. A conversion that is cut short lies in a folder that nobody takes for a checkpoint.

Cost: 5 s of a core for imports (run), and on the disk twice the checkpoint for as long as it takes: the fp32 weights
and moments of each rank are written apart and then joined, by as many processes as there are cores, at most 8.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from uvlm.collectives import from_rank_0, on_all_ranks
from uvlm.engine import Engine

_POLL_SECONDS = 0.2


class Conversion:
    """A process that turns a checkpoint into DeepSpeed's universal one, which any number of ranks loads."""

    def __init__(self, checkpoint: Path, target: Path, trust: bool) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        command = [sys.executable, "-m", "uvlm.engine", str(checkpoint), str(target), *["--trust"] * trust]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._errors)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._process.poll() is not None

    def error(self) -> str | None:
        """After its end, what went wrong, if anything did."""
        if self._process.returncode == 0:
            return None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"the converter ended with code {self._process.returncode}"

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def load_converted(engine: Engine, folder: Path, written_by: int, trust: bool = False) -> None:
    """Bring the engine to a checkpoint that `written_by` ranks have written. All ranks call it.

    trust: its files may run code.

    ValueError, on all ranks, where it cannot be converted or there is no room to.
    """
    num_ranks = dist.get_world_size()
    if sentence := engine.not_convertible():
        raise ValueError(f"{folder} was written by {written_by} ranks and this start has {num_ranks}; {sentence}")
    place = from_rank_0(lambda: _place_for(folder, written_by))
    if isinstance(place, str):
        raise ValueError(place)
    try:
        if dist.get_rank() == 0:
            print(f"converting {folder}, written by {written_by} ranks, for {num_ranks}", flush=True)
        if sentence := _convert(folder, place, engine.device, trust):
            raise ValueError(f"{folder} cannot be converted for {num_ranks} ranks: {sentence}")
        engine.load(place, is_universal=True, trust=trust)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(place.parent, ignore_errors=True)


def _place_for(folder: Path, written_by: int) -> Path | str:
    """A folder that no other conversion uses, not even one that was killed a moment ago; or a sentence for want of
    room. The converter keeps the pieces beside the joined tensors until it has ended."""
    needed = 2 * sum(path.stat().st_size for path in folder.iterdir())
    if (free := shutil.disk_usage(folder).free) < needed:
        return (
            f"{folder} was written by {written_by} ranks, to convert it takes {needed / 1e6:,.0f} MB and the disk has "
            f"{free / 1e6:,.0f} MB free; free some space, or start {written_by} ranks"
        )
    return Path(tempfile.mkdtemp(prefix=f".universal_{folder.name}_", dir=folder.parent)) / "universal"


def _convert(folder: Path, place: Path, device: torch.device, trust: bool) -> str | None:
    """What went wrong, if anything did, the same on all ranks."""
    conversion: Conversion | None = None

    def begin() -> None:
        nonlocal conversion
        conversion = Conversion(folder, place, trust)

    from_rank_0(begin)  # where it cannot even begin, no rank waits for its end
    with conversion or contextlib.nullcontext():
        while not on_all_ranks(conversion is None or conversion.is_done, device):
            time.sleep(_POLL_SECONDS)
        return from_rank_0(lambda: conversion.error() if conversion else None)
