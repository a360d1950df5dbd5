"""This rank's packs of each global step, from streams that know nothing of ranks or workers.

The global batch has `num_rows` rows. A rank owns the rows rank, rank + world_size, ...; a worker owns an equal share
of its rank's rows. Who computes a row changes nothing about it, so a run can stop on 8 ranks with 4 workers each and
go on with 2 and none, packs equal to the token. Underneath is torch's DataLoader, which gives one item of each worker
in turn. Workers ignore the signals that stop a job: the trainer must be able to write its last checkpoint.

Bad documents are skipped and counted. Where a quarantine file is given, each is written there as a line of JSON once
the step that met it is consumed or fails, so what was only prefetched is not in it. What a run does again after its
last checkpoint it writes again: row and pack say which lines are the same.

Cost (run, documents of 551 tokens, two images each, files in the page cache): 15,000 documents/s or 8 million tokens/s
with 0 workers on one core; benchmarks/loader.py compares.
"""

from __future__ import annotations

import atexit
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.packing import Pack
from data_pipeline.sources import OpenSource, Source, open_sources
from data_pipeline.stream import RowStream, check_state
from data_pipeline.vocab import Vocab

DataState = dict[int, dict[str, Any]]  # row -> state after the packs consumed


class Item(NamedTuple):
    row: int
    pack: Pack
    state: dict[str, Any]  # after the pack
    refused: list[dict[str, Any]]  # bad documents that were met on the way


class Failure(NamedTuple):
    """In place of an item: torch would bury the sentence in a worker's stack trace."""

    error: Exception
    refused: list[dict[str, Any]]


IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Loader:
    """Endless iterable over steps: (this rank's packs, rows ascending; the state after them by row).

    `state` continues a run: it must hold this rank's rows, and may hold all rows or come from JSON (string keys).
    """

    def __init__(
        self,
        sources: Sequence[Source],
        vocab: Vocab,
        *,
        pack_tokens: int,
        num_rows: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        max_rejected_share: float = 0.05,
        quarantine: Path | None = None,
        state: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """ValueError where the numbers do not divide, a source cannot be used, or `state` belongs to another run."""
        _check_divides("world_size", world_size, "num_rows", num_rows)
        if num_workers:
            _check_divides("num_workers", num_workers, "num_rows / world_size", num_rows // world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        if pack_tokens < 1 or seed < 0:
            raise ValueError(f"pack_tokens={pack_tokens} must be at least 1 and seed={seed} at least 0")
        self.rows = list(range(rank, num_rows, world_size))
        self.num_workers = num_workers
        self.quarantine = quarantine
        states = {int(row): row_state for row, row_state in (state or {}).items()}
        if states and not set(self.rows) <= set(states) <= set(range(num_rows)):
            raise ValueError(
                f"the data state holds rows {sorted(states)}, this rank of a run with num_rows={num_rows} needs "
                f"{self.rows}; num_rows cannot change within a run"
            )
        stream_arguments = {
            "num_rows": num_rows,
            "pack_tokens": pack_tokens,
            "seed": seed,
            "max_rejected_share": max_rejected_share,
        }
        opened = open_sources(sources, vocab)
        for row in self.rows if states else []:  # a state that does not fit is an error here, not in a worker later
            check_state(states[row], opened, pack_tokens)
        self._rows = _Rows(opened, vocab, self.rows, states, stream_arguments)

    def __iter__(self) -> Iterator[tuple[list[Pack], DataState]]:
        turns = self._worker_turns() if self.num_workers else iter(self._rows)
        while True:
            step: list[Item] = []
            while len(step) < len(self.rows):
                turn = next(turns)
                if isinstance(turn, Failure):
                    self._put_aside([*(each for item in step for each in item.refused), *turn.refused])
                    raise turn.error
                step += turn
            step.sort(key=lambda item: item.row)
            self._put_aside([each for item in step for each in item.refused])
            packs = [item.pack for item in step]
            if torch.cuda.is_available() and not self.num_workers:  # with workers, their DataLoader has pinned them
                packs = [pack.pin_memory() for pack in packs]
            yield packs, {item.row: item.state for item in step}

    def _put_aside(self, refused: Sequence[dict[str, Any]]) -> None:
        if refused and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in refused)

    def _worker_turns(self) -> Iterator[list[Item] | Failure]:
        loader = DataLoader(
            self._rows,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=torch.cuda.is_available(),
        )
        # At exit the workers must be told to stop: multiprocessing would send them the SIGTERM that they ignore, and
        # wait for ever (run). Dropping the iterator is not enough, as the traceback of an error keeps it alive.
        items = iter(loader)
        stop = items._shutdown_workers  # type: ignore[attr-defined]  # torch has no public name; twice is harmless
        atexit.register(stop)
        try:
            yield from items
        finally:
            atexit.unregister(stop)
            stop()


class _Rows(IterableDataset):
    """Step by step the items of some rows; in a worker, of the worker's share of them. A turn travels between processes
    at once, for fewer messages."""

    def __init__(
        self,
        opened: list[OpenSource],
        vocab: Vocab,
        rows: list[int],
        states: Mapping[int, Mapping[str, Any]],
        stream_arguments: dict[str, Any],
    ) -> None:
        self.opened, self.vocab, self.rows, self.states = opened, vocab, rows, states
        self.stream_arguments = stream_arguments

    def streams(self, rows: Sequence[int]) -> list[RowStream]:
        return [
            RowStream(self.opened, self.vocab, row=row, state=self.states.get(row), **self.stream_arguments)
            for row in rows
        ]

    def __iter__(self) -> Iterator[list[Item] | Failure]:
        worker = get_worker_info()
        rows = self.rows if worker is None else self.rows[worker.id :: worker.num_workers]
        streams: list[RowStream] = []
        turn: list[Item] = []
        try:
            streams += self.streams(rows)
            while True:
                turn = []
                for row, stream in zip(rows, streams, strict=True):
                    pack, state = next(stream)
                    turn.append(Item(row, pack, state, stream.take_refused()))
                yield turn
        except (ValueError, OSError) as error:
            refused = [each for item in turn for each in item.refused]
            yield Failure(error, refused + [each for stream in streams for each in stream.take_refused()])


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For worker processes: the trainer decides when to stop, and still needs data until then."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _check_divides(name: str, value: int, total_name: str, total: int) -> None:
    if total < 1:
        raise ValueError(f"{total_name}={total} must be at least 1")
    if value < 1 or total % value:
        working = [str(number) for number in range(1, total + 1) if total % number == 0]
        raise ValueError(f"{name}={value} does not divide {total_name}={total}; use {' or '.join(working)}")
