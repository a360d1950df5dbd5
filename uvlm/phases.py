"""Time and memory of each phase of training: data wait, forward, backward, step, save.

On a GPU the marks are CUDA events, read only when a record is made: the host never waits for one in between, and a wait
for data that the GPU did not notice counts as none. On a CPU they are clock readings. Memory is, on a GPU, the largest
that was allocated during a phase, and on a CPU the resident memory at its end.

Cost (run): 15 us a phase on a CPU, of which the resident memory takes most.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import psutil
import torch

PHASES = ("data", "forward", "backward", "step", "save")


class Phases:
    """Sums of seconds and peaks of bytes since `take` was last called, on this rank."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._process = psutil.Process()
        self._spans: list[tuple[str, Any, Any]] = []
        self._peaks: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything inside belongs to the phase `name`, one of PHASES."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))
        memory = torch.cuda.max_memory_allocated() if self._is_cuda else self._process.memory_info().rss
        self._peaks[name] = max(self._peaks[name], memory)

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """(seconds by phase, bytes by phase), all of PHASES; then they begin anew."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._is_cuda:
            torch.cuda.synchronize()
        for name, start, end in self._spans:
            seconds[name] += start.elapsed_time(end) / 1e3 if self._is_cuda else end - start
        peaks = {name: self._peaks[name] for name in PHASES}
        self._spans.clear()
        self._peaks.clear()
        return seconds, peaks
