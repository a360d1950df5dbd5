"""What all readers share: how a rate and a resume are timed, and how a reader is started. Standard library only,
because Energon runs in an environment of its own.

Each measurement is a process of its own: `python READER.py JOB`, the job as JSON; the answer is the last line printed,
as JSON. An endless stream is timed between two documents in its middle, so that neither filling buffers nor starting
workers counts. A resume is timed in a warm process: imports are done and files are in the page cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

NUM_COMPARED = 200  # documents that a resumed stream must give as the uninterrupted one does
SHUFFLE_BUFFER = 1000  # documents, of the readers that shuffle in a buffer
BATCH = 16  # documents, of the readers that hand over batches


@dataclass(frozen=True)
class Job:
    """`mode` is "codes" (JSON and code arrays of shards with images), "dropped" (the same of shards without images)
    or "jpeg" (all, and both JPEGs decoded to uint8 RGB). `batch` of 1 hands over documents one by one."""

    task: str  # "rate" or "resume"
    data: str  # the folder that documents.py made
    unit: str = "documents"  # ours also makes "packs"
    mode: str = "codes"
    workers: int = 0
    batch: int = 1
    num_warm: int = 0  # documents before the clock starts
    num_timed: int = 0
    stop_at: int = 0  # documents consumed when a resume happens
    resume_workers: int = 0
    location: str = ""  # of the shards, where they are not in `data`

    @property
    def folder(self) -> str:
        return self.location or f"{self.data}/{'codes' if self.mode == 'dropped' else 'images'}"


def answer(rate: Callable[[Job], Iterator[int]], resume: Callable[[Job], dict[str, Any]]) -> None:
    """The main function of a reader. `rate` gives how many documents came with each item, without end."""
    job = Job(**json.loads(sys.argv[1]))
    if job.task == "resume":
        result = resume(job)
    else:
        result = {"documents_per_second": documents_per_second(rate(job), job.num_warm, job.num_timed)}
    print(json.dumps(result), flush=True)


def documents_per_second(items: Iterator[int], num_warm: int, num_timed: int) -> float:
    count = 0
    while count < num_warm:
        count += next(items)
    count, start = 0, time.perf_counter()
    while count < num_timed:
        count += next(items)
    return count / (time.perf_counter() - start)


def timed_resume(make: Callable[[], Iterator[str]], expected: list[str]) -> dict[str, Any]:
    """`make` builds everything anew and continues; it gives document keys, which should be the expected ones."""
    start = time.perf_counter()
    try:
        keys = make()
        first = next(keys)
    except Exception as error:  # whatever a library raises is its way to refuse
        return {"seconds": None, "exact": False, "refused": f"{type(error).__name__}: {error}"[:200]}
    seconds = round(time.perf_counter() - start, 4)
    return {"seconds": seconds, "exact": [first, *islice(keys, len(expected) - 1)] == expected, "refused": None}
