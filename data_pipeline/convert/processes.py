"""Worker processes for the chunks of a conversion, their outcomes in order, and their end with the main process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from data_pipeline.convert.worker import Job, Outcome, run


def outcomes_of(jobs: Iterator[Job], num_processes: int) -> Generator[Outcome, None, None]:
    """The outcomes in the order of the jobs. An input of one chunk is done here, others by worker processes.

    ValueError where a worker process dies. All of them have ended when this has."""
    head = list(islice(jobs, 2))
    jobs = chain(head, jobs)
    if num_processes == 1 or len(head) < 2:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread of ours is forked
    context.set_forkserver_preload(["data_pipeline.convert.worker", "webdataset.writer"])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Outcome]] = deque()
    try:
        for job in jobs:
            with _sigint_blocked():  # which the processes inherit that the first call starts
                waiting.append(pool.submit(run, job))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        pool.shutdown()
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
            child.join()
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a worker process has died, perhaps for want of memory; start again with a smaller number of "
                "processes: shards that are finished are kept"
            ) from None
        raise


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Ctrl-C is the main process's to handle; where that one dies, so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
