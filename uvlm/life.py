"""What ends a run early or makes it save: signals, files in the run folder, a time budget, steps that make no sense.

A wish on any one rank becomes a decision of all at the next step boundary: the flags are reduced in one small
collective a step, over the host, so that no GPU is waited for. A run that stopped at request has written a checkpoint
and ends with exit code 75 (EX_TEMPFAIL of <sysexits.h>: try again); the same command goes on.

    RUN/SAVE   write a checkpoint at the next step boundary, and go on
    RUN/STOP   write a checkpoint at the next step boundary, and stop. It stays until the next start, so that a job
               which comes back by itself knows that it should not
    SIGTERM, SIGUSR2 to any one rank   the same as STOP
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
from pydantic import Field

from uvlm.strict import Strict

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
SPARE_SECONDS = 60.0  # of the time budget, beside what a checkpoint is known to take


class SpikeConfig(Strict):
    factor: float = Field(
        default=0.0,
        ge=0,
        description="a loss this many times the median of the last `window` steps goes back to the last checkpoint and "
        "leaves out all packs since; 0 turns it off",
    )
    window: int = Field(default=50, gt=1, description="steps whose median is the measure")
    max_rollbacks: int = Field(default=3, gt=0, description="rollbacks of one start before it ends with an error")


class LifeConfig(Strict):
    hours: float | None = Field(
        default=None,
        gt=0,
        description="time budget of one start: before it is over, a checkpoint is written and the run stops",
    )
    max_skipped_steps: int = Field(
        default=20,
        gt=0,
        description="updates in a row left out for a loss or gradient that is not finite, before the run ends",
    )
    collective_timeout: float = Field(
        default=600.0,
        gt=0,
        le=7 * 86400,
        description="seconds that a rank waits for the others after the first steps, before it ends",
    )
    guard_every: int = Field(
        default=100, gt=0, description="steps between the guard's comparisons of what the ranks have called"
    )
    spike: SpikeConfig = SpikeConfig()


class Wishes(NamedTuple):
    """What is to happen at a step boundary; in an agreed one, on all ranks."""

    stop: bool = False
    save: bool = False
    unwritten: bool = False  # a checkpoint in the background is not on the disk yet

    @property
    def any_save(self) -> bool:
        return self.stop or self.save


class Life:
    """This rank's wishes, and those of all.

    Args:
        run: run folder; only rank 0 looks for files and at the clock.
        started: when this start began, by `clock`.
    """

    def __init__(
        self, config: LifeConfig, run: Path, started: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._started, self._clock = run, started, clock
        self._seconds = config.hours * 3600 if config.hours else float("inf")
        self._is_first = dist.get_rank() == 0
        self._signal: int | None = None
        self.reason = ""
        self.seconds_to_stop = SPARE_SECONDS  # what a step and a checkpoint take, once known: kept free in the budget
        # Flags go over the host: reading them from a GPU would make every step wait for it.
        self._group = dist.new_group(backend="gloo") if torch.cuda.is_available() else None
        if self._is_first:
            _remove_older(run / "STOP", psutil.Process().create_time())
            (run / "SAVE").unlink(missing_ok=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are wishes inside, and what they were before outside."""
        before = [(number, signal.signal(number, self._note)) for number in SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agree(self, unwritten: bool = False) -> Wishes:
        """Every rank calls it at the same point; all get the same answer."""
        own = self._own()._replace(unwritten=unwritten)
        flags = torch.tensor([float(flag) for flag in own])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        agreed = Wishes(*(flag > 0 for flag in flags.tolist()))
        if agreed.stop and not self.reason:
            self.reason = "another rank was asked to"
        return agreed

    def stop_wanted(self) -> bool:
        """`agree`, for places between step boundaries that can end early. The wish stands until the boundary."""
        return self.agree().stop

    def _own(self) -> Wishes:
        if self._signal is not None:
            self.reason = f"{signal.Signals(self._signal).name} was received"
        elif self._is_first and (self._run / "STOP").exists():
            self.reason = f"{self._run / 'STOP'} was found"
        elif self._is_first and self._clock() - self._started + self.seconds_to_stop > self._seconds:
            self.reason = f"life.hours={self._seconds / 3600:g} are nearly over"
        return Wishes(stop=bool(self.reason), save=self._is_first and (self._run / "SAVE").exists())

    def fulfilled(self, wishes: Wishes) -> None:
        """The checkpoint is written: the file that asked for it goes."""
        if self._is_first and wishes.any_save:
            (self._run / "SAVE").unlink(missing_ok=True)


def _remove_older(path: Path, seconds: float) -> None:
    """Remove a file from before this time (of the epoch): a wish that came while the model was built still stands."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < seconds:
            path.unlink()


class Skips:
    """Counts updates that DeepSpeed has left out because the gradient's norm was not finite, on all ranks together."""

    def __init__(self, limit: int, total: int) -> None:
        self._limit, self._total, self.in_a_row = limit, total, 0

    def add(self, total: int, step: int, dtype: str) -> bool:
        """Whether the last update was left out.

        Args:
            total: updates left out since the start of the run. step: steps done.

        Raises:
            ValueError: too many in a row.
        """
        was_skipped = total > self._total
        self._total = total
        self.in_a_row = self.in_a_row + 1 if was_skipped else 0
        if self.in_a_row >= self._limit:
            raise ValueError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, the last of them step "
                f"{step}; nothing was changed by them. Lower optim.learning_rate, "
                + ("train in bf16, " if dtype == "fp16" else "")
                + "or start from an earlier checkpoint; life.max_skipped_steps sets the limit"
            )
        return was_skipped


class Spikes:
    """Whether a step's loss is far above those before it: over `factor` times the median of the last `window`."""

    def __init__(self, config: SpikeConfig) -> None:
        self._factor = config.factor
        self._losses: deque[float] = deque(maxlen=config.window)

    def add(self, loss: float) -> bool:
        """A loss that is a spike does not enter the measure."""
        is_full = len(self._losses) == self._losses.maxlen
        is_spike = is_full and loss > self._factor * statistics.median(self._losses)
        if not is_spike:
            self._losses.append(loss)
        return is_spike
