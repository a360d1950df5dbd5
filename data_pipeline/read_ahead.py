"""Runs of samples on their way from remote storage: fetched in the background, a request each, until they are read.

There is one `ReadAhead` in a process. What it holds and fetches is bounded by MAX_BYTES. A run that is announced beyond
that waits until there is room, or until one of its samples is read: then runs of which nothing has been read yet give
way, the last announced first, for they are needed last, and wait in their turn. Where all that is held is being read,
the sample is left to the reader, who never waits for room. A run whose every sample was read is dropped at once.

Samples are held as `load` gives them: without their images they take a few kilobytes, so what waits to be read is small
beside what is on its way.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from data_pipeline.storage import NUM_CONNECTIONS

MAX_BYTES = 256 << 20
NUM_FETCHES = NUM_CONNECTIONS  # at once

Load = Callable[[], tuple[Sequence[Any], int]]  # one value for each sample of a run, and the bytes they take


class _Run:
    def __init__(self, keys: Sequence[Hashable], load: Load, num_bytes: int) -> None:
        self.load, self.num_bytes = load, num_bytes  # a guess until it is loaded
        self.places = {key: i for i, key in enumerate(keys)}  # of the samples that were not read yet
        self.is_begun = False  # one of its samples was read
        self.values: Future[Sequence[Any]] | None = None  # None while it waits for room


class ReadAhead:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: queue.SimpleQueue[tuple[_Run, Future[Sequence[Any]]]] = queue.SimpleQueue()
        self._num_threads = 0
        self._runs: dict[int, _Run] = {}  # by id, in the order they were announced
        self._run_of: dict[Hashable, _Run] = {}  # by sample

    @property
    def num_bytes(self) -> int:
        """Bytes held or on their way."""
        return sum(run.num_bytes for run in list(self._runs.values()) if run.values is not None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._run_of

    def announce(self, keys: Sequence[Hashable], load: Load, num_bytes: int) -> None:
        """A run of samples, none of which is announced already; `load` will be called in a thread."""
        with self._lock:
            run = _Run(keys, load, num_bytes)
            self._runs[id(run)] = run
            self._run_of.update(dict.fromkeys(keys, run))
            self._start_waiting()

    def take(self, key: Hashable) -> Any | None:
        """What `load` gave for a sample, waiting for it if need be; None where the sample is not announced, could not
        be loaded for an I/O error, or finds no room. A sample can be taken once."""
        with self._lock:
            run = self._run_of.pop(key, None)
            if run is None:
                return None
            if run.values is None and self._make_room(run):
                self._start(run)
            run.is_begun = True
            place, values = run.places.pop(key), run.values
            is_last = not run.places
        try:
            return values.result()[place] if values is not None else None
        except OSError:
            return None
        finally:
            if is_last:
                with self._lock:
                    del self._runs[id(run)]
                    self._start_waiting()

    def _fits(self, run: _Run) -> bool:
        """One that is larger than the bound is held alone."""
        num_bytes = self.num_bytes
        return num_bytes + run.num_bytes <= MAX_BYTES or num_bytes == 0

    def _make_room(self, run: _Run) -> bool:
        """Whether the run fits now."""
        for other in reversed(self._runs.values()):
            if self._fits(run):
                return True
            # What is under way cannot be stopped, so it goes on to count.
            if other.values is not None and not other.is_begun and (other.values.done() or other.values.cancel()):
                other.values = None
        return self._fits(run)

    def _start_waiting(self) -> None:
        for run in list(self._runs.values()):
            if run.values is None:
                if not self._fits(run):
                    break
                self._start(run)

    def _start(self, run: _Run) -> None:
        run.values = Future()
        self._started.put((run, run.values))
        num_busy = sum(run.values is not None and not run.values.done() for run in self._runs.values())
        if self._num_threads < min(num_busy, NUM_FETCHES):
            self._num_threads += 1
            # A daemon, unlike those of an executor: a process ends without waiting for them.
            threading.Thread(target=self._fetch, name=f"read-ahead-{self._num_threads}", daemon=True).start()

    def _fetch(self) -> None:
        while True:
            run, values = self._started.get()
            if values.set_running_or_notify_cancel():
                try:
                    loaded, run.num_bytes = run.load()
                except Exception as error:
                    values.set_exception(error)  # to be raised where a sample of the run is read
                else:
                    values.set_result(loaded)
                with self._lock:
                    self._start_waiting()  # it may take less than was guessed


def of_process() -> ReadAhead:
    """The one of this process: threads and what they fetch do not outlive a fork."""
    return _of_process(os.getpid())


@functools.cache
def _of_process(process: int) -> ReadAhead:
    return ReadAhead()
