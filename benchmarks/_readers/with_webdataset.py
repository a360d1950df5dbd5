"""webdataset as its documentation uses it: shards shuffled, documents shuffled in a buffer, decoded; WebLoader above.

Given what is fastest in it: members that a mode does not need are not taken out of the tar, and arrays travel from
workers as they are (its default turns each into a tensor in shared memory, five times as slow, run). It has no state: a
resume is a seeded run that skips what was consumed, before decoding, in every worker its share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset
from measure import NUM_COMPARED, SHUFFLE_BUFFER, Job, answer, timed_resume

EPOCHS = 1_000_000  # more than any run reads


def main() -> None:
    answer(rate, resume)


def items(job: Job, workers: int, num_skipped: int = 0) -> Iterator[Any]:
    shards = [str(path) for path in sorted(Path(job.folder).glob("*.tar"))]
    dataset = webdataset.WebDataset(
        shards, shardshuffle=100, detshuffle=True, seed=0, select_files=None if job.mode == "jpeg" else is_no_image
    )
    dataset = dataset.repeat(EPOCHS).shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, seed=0)
    if num_skipped:
        dataset = dataset.slice(num_skipped // max(1, workers), sys.maxsize)
    dataset = dataset.decode("rgb8") if job.mode == "jpeg" else dataset.decode()
    if job.batch > 1:
        dataset = dataset.batched(job.batch, collation_fn=as_it_is)
    if workers:
        dataset = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    return iter(dataset)


def rate(job: Job) -> Iterator[int]:
    for item in items(job, job.workers):
        if job.batch == 1:
            check(job, item)
        yield 1 if job.batch == 1 else len(item)


def check(job: Job, document: dict[str, Any]) -> None:
    """That the work was done."""
    assert document["json"]["texts"][0]
    assert document["1.npy"].shape == document["3.npy"].shape == (16, 16)
    if job.mode == "jpeg":
        assert document["1.jpg"].shape[2] == document["3.jpg"].shape[2] == 3


def resume(job: Job) -> dict[str, Any]:
    def keys(workers: int, num_skipped: int = 0) -> Iterator[str]:
        return (document["__key__"] for document in items(job, workers, num_skipped))

    expected = list(islice(keys(job.workers), job.stop_at, job.stop_at + NUM_COMPARED))
    return timed_resume(lambda: keys(job.resume_workers, job.stop_at), expected)


def is_no_image(name: str) -> bool:
    return not name.endswith(".jpg")


def as_it_is(item: Any) -> Any:
    return item


if __name__ == "__main__":
    main()
