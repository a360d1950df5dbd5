"""This project's reader, in two ways.

unit "packs": the full `Loader`, which also checks every document, makes its tokens, labels and positions, and packs it,
so it does more than the other readers; documents are counted in the packs. unit "documents": `Split.read` in the order
of the rows, which is what the other readers do too. With JPEGs there are only documents, as a pack holds no pixels.

Legend: H, W height and width of a picture.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from documents import FINGERPRINT, NUM_CODES, TEXT_TOKENIZER
from measure import NUM_COMPARED, Job, answer
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.decode_image import decode_image
from data_pipeline.loader import DataState, Loader
from data_pipeline.order import row_order
from data_pipeline.packing import Pack
from data_pipeline.schema import Document
from data_pipeline.sources import Source
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab

PACK_TOKENS = 4096  # holds seven documents
NUM_ROWS = 8
SHAPES = ((1, 0), (1, 2), (2, 1), (2, 4), (4, 1), (4, 2))  # ranks x workers
SEED = 0


def main() -> None:
    answer(rate, resume)


def rate(job: Job) -> Iterator[int]:
    if job.unit == "packs":
        for packs, _ in make_loader(job, job.workers):
            yield sum(len(keys(pack)) for pack in packs)
    else:
        dataset = _Documents(job)
        items = DataLoader(dataset, batch_size=None, num_workers=job.workers, collate_fn=as_it_is)
        yield from (len(item) for item in items)


def as_it_is(item: Any) -> Any:
    return item


def make_loader(
    job: Job, workers: int, rank: int = 0, world_size: int = 1, state: DataState | None = None
) -> Iterator[tuple[list[Pack], DataState]]:
    loader = Loader(
        [Source("benchmark", job.folder)],
        load_vocab(job.data),
        pack_tokens=PACK_TOKENS,
        num_rows=NUM_ROWS,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        seed=SEED,
        state=state,
    )
    return iter(loader)


@functools.cache
def load_vocab(data: str) -> Vocab:
    return Vocab(Tokenizer.from_file(str(Path(data) / TEXT_TOKENIZER)), NUM_CODES, FINGERPRINT)


def keys(pack: Pack) -> list[str]:
    return [key for key in pack.doc_id if key]  # the unused tail has none


class _Documents(IterableDataset):
    """Endless lists of `job.batch` documents in row order, each worker a row. JPEGs are decoded to uint8 [H, W, 3]."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.split = Split.open(job.folder, FINGERPRINT, images=job.mode == "jpeg")

    def __iter__(self) -> Iterator[list[tuple[Document, list[torch.Tensor]]]]:
        worker = get_worker_info()
        row, num_rows = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for epoch in count():
            order = row_order(SEED, epoch, row, shard_sizes=self.split.shard_sizes, num_rows=num_rows)
            for start in range(0, len(order), self.job.batch):
                yield [self._read(sample) for sample in order[start : start + self.job.batch].tolist()]

    def _read(self, sample: int) -> tuple[Document, list[torch.Tensor]]:
        document = self.split.read(sample)
        assert isinstance(document, Document), document
        pictures = [torch.from_numpy(decode_image(content)) for content in document.image_bytes.values()]
        document.image_bytes.clear()  # they need not travel from a worker
        return document, pictures


def resume(job: Job) -> dict[str, Any]:
    """Stops one rank without workers after `job.stop_at` documents; its state continues under every shape."""
    steps = make_loader(job, 0)
    num_documents = 0
    state: DataState = {}
    while num_documents < job.stop_at:
        packs, state = next(steps)
        num_documents += sum(len(keys(pack)) for pack in packs)
    state = json.loads(json.dumps(state))  # as a checkpoint holds it
    num_steps = -(-NUM_COMPARED // len([key for pack in packs for key in keys(pack)]))
    expected = [packs for packs, _ in islice(steps, num_steps)]
    shapes = {f"{ranks}x{workers}": _resumed(job, state, expected, ranks, workers) for ranks, workers in SHAPES}
    return {
        "seconds": max(shape["seconds"] for shape in shapes.values()),
        "exact": all(shape["exact"] for shape in shapes.values()),
        "refused": None,
        "shapes": shapes,
    }


def _resumed(job: Job, state: DataState, expected: list[list[Pack]], ranks: int, workers: int) -> dict[str, Any]:
    """The slowest rank's time to its first step, and whether all ranks together make the expected steps."""
    seconds, exact = 0.0, True
    for rank in range(ranks):
        start = time.perf_counter()
        steps = make_loader(job, workers, rank, ranks, state)
        first, _ = next(steps)
        seconds = max(seconds, time.perf_counter() - start)
        resumed = [first, *(packs for packs, _ in islice(steps, len(expected) - 1))]
        steps.close()  # type: ignore[attr-defined]  # a generator: ends its workers
        for packs, uninterrupted in zip(resumed, expected, strict=True):
            exact &= all(is_equal(*pair) for pair in zip(packs, uninterrupted[rank::ranks], strict=True))
    return {"seconds": round(seconds, 4), "exact": exact}


def is_equal(one: Pack, other: Pack) -> bool:
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    )


if __name__ == "__main__":
    main()
