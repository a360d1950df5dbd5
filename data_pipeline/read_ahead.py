"""Runs of samples on their way from remote storage: fetched in the background, a request each, until they are read.

There is one `ReadAhead` in a process. What it holds and fetches is bounded by MAX_BYTES: a run that is announced
beyond that waits until there is room or until one of its samples is read, whichever comes first; then the oldest runs
give way. A run whose every sample was read is dropped at once.

Samples are held as `load` gives them: without their images they take a few kilobytes, so what waits to be read is small
beside what is on its way.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from data_pipeline.storage import NUM_CONNECTIONS

MAX_BYTES = 256 << 20
NUM_FETCHES = NUM_CONNECTIONS  # at once

Load = Callable[[], tuple[Sequence[Any], int]]  # one value for each sample of a run, and the bytes they take


class _Run:
    def __init__(self, keys: Sequence[Hashable], load: Load, num_bytes: int) -> None:
        self.load, self.num_bytes = load, num_bytes  # a guess until it is loaded
        self.places = {key: i for i, key in enumerate(keys)}  # of the samples that were not read yet
        self.values: Future[Sequence[Any]] | None = None


class ReadAhead:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._started: queue.SimpleQueue[tuple[_Run, Future[Sequence[Any]]]] = queue.SimpleQueue()
        for i in range(NUM_FETCHES):  # daemons, unlike those of an executor: a process ends without waiting for them
            threading.Thread(target=_fetch, args=(self._started,), name=f"read-ahead-{i}", daemon=True).start()
        self._runs: OrderedDict[int, _Run] = OrderedDict()  # by id; first those that were announced first
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
        """What `load` gave for a sample, waiting for it if need be; None where the sample is not announced or could
        not be loaded for an I/O error. A sample can be taken once."""
        with self._lock:
            run = self._run_of.pop(key, None)
            if run is None:
                return None
            values = run.values or self._start(run)
            place = run.places.pop(key)
            is_last = not run.places
        try:
            return values.result()[place]
        except (OSError, CancelledError):
            return None
        finally:
            if is_last:
                with self._lock:
                    self._drop(run)
                    self._start_waiting()

    def _start(self, run: _Run) -> Future[Sequence[Any]]:
        while self.num_bytes + run.num_bytes > MAX_BYTES:
            started = [other for other in self._runs.values() if other.values is not None]
            if not started:
                break
            self._drop(started[0])
        run.values = Future()
        run.values.add_done_callback(self._start_waiting)  # it may take less than was guessed
        self._started.put((run, run.values))
        return run.values

    def _start_waiting(self, _: object = None) -> None:
        with self._lock:
            for run in [run for run in self._runs.values() if run.values is None]:
                if self.num_bytes + run.num_bytes > MAX_BYTES and self.num_bytes > 0:
                    break
                self._start(run)

    def _drop(self, run: _Run) -> None:
        self._runs.pop(id(run), None)
        for key in run.places:
            if self._run_of.get(key) is run:
                del self._run_of[key]
        if run.values is not None:
            run.values.cancel()


def _fetch(started: queue.SimpleQueue[tuple[_Run, Future[Sequence[Any]]]]) -> None:
    while True:
        run, future = started.get()
        if future.set_running_or_notify_cancel():
            try:
                values, run.num_bytes = run.load()
            except Exception as error:
                future.set_exception(error)  # to be raised where a sample of the run is read
            else:
                future.set_result(values)


def of_process() -> ReadAhead:
    """The one of this process: threads and what they fetch do not outlive a fork."""
    return _of_process(os.getpid())


@functools.cache
def _of_process(process: int) -> ReadAhead:
    return ReadAhead()
