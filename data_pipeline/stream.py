"""One row of the global batch: an endless stream of packs, each with the state that continues after it.

State travels with the value: whoever stores the state that came with the last pack it used resumes at the next one,
whatever was prefetched in between. A state is JSON: how far each source was drawn, the documents in the open bins as
(source, sample) pairs that are read again on resume, the pack count and the rejections by category. It takes about
10 bytes for each document in an open bin: 0.5 kB for the demo's kind of documents (run).

Sources are mixed by weight, counted in accepted documents: the source furthest behind its share is drawn next. So the
mixture is exact at every moment and needs no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.encode import Encoded, encode
from data_pipeline.order import row_order
from data_pipeline.packing import BestFit, Pack, make_pack
from data_pipeline.schema import Rejected
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab

MAX_REJECTED_RUN = 1000  # documents of one source rejected one after the other; a source like that is broken


@dataclass(frozen=True)
class Source:
    """A folder of tokenized shards and its share of the documents (weights need not sum to 1)."""

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class OpenSource:
    source: Source
    split: Split


def open_sources(sources: Sequence[Source], vocab: Vocab) -> list[OpenSource]:
    """Opens and checks all sources, once per process. ValueError or FileNotFoundError names the source at fault."""
    if not sources:
        raise ValueError("no data sources are given; name at least one folder of shards")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sources share a name among {', '.join(names)}; give each its own")
    opened = []
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise ValueError(
                f"source {source.name!r} has weight {source.weight}; give it a positive weight or remove it"
            )
        split = Split.open(source.path, vocab.image_tokenizer)
        if len(split) == 0:
            raise ValueError(f"source {source.name!r} at {source.path} holds no documents; convert it again")
        opened.append(OpenSource(source, split))
    return opened


class _Cursor:
    """Where a row stands in a source."""

    def __init__(self, opened: OpenSource, seed: int, row: int, num_rows: int, state: Mapping[str, Any]) -> None:
        self.name, self.split = opened.source.name, opened.split
        self.seed, self.row, self.num_rows = seed, row, num_rows
        self.shards = self.split.manifest.fingerprint
        if state and state["shards"] != self.shards:
            raise ValueError(
                f"the shards of source {self.name!r} are not those that the run was saved with; give the run its old "
                "data, or start a new run"
            )
        self.draws = state.get("draws", 0)  # accepted documents
        self.epoch = state.get("epoch", 0)
        self.position = state.get("position", 0)  # in this row's order of the epoch
        self.rejected_run = 0
        self._order: np.ndarray | None = None  # a row's order is kept for an epoch: 8 bytes a sample

    def next_sample(self) -> int:
        while True:
            if self._order is None:
                self._order = row_order(
                    self.seed, self.epoch, self.row, shard_sizes=self.split.shard_sizes, num_rows=self.num_rows
                )
            if self.position < len(self._order):
                self.position += 1
                return int(self._order[self.position - 1])
            self.epoch, self.position, self._order = self.epoch + 1, 0, None

    def state(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "draws": self.draws,
            "epoch": self.epoch,
            "position": self.position,
        }


@dataclass(frozen=True, eq=False)
class _Drawn:
    encoded: Encoded
    source: int
    sample: int

    def __len__(self) -> int:
        return len(self.encoded)


class RowStream:
    """Endless iterator of (pack, state_after) for one row. A state is only meant for the same seed, `num_rows`,
    `pack_tokens` and sources; ranks and workers are free to change."""

    def __init__(
        self,
        opened: Sequence[OpenSource],
        vocab: Vocab,
        *,
        row: int,
        num_rows: int,
        pack_tokens: int,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """ValueError where `state` does not belong to these sources."""
        state = state or {}
        self.vocab, self.row, self.pack_tokens = vocab, row, pack_tokens
        names = [item.source.name for item in opened]
        saved = state.get("sources", {})
        if state and list(saved) != names:
            raise ValueError(
                f"the data state was saved with the sources {', '.join(saved)} and cannot go on with "
                f"{', '.join(names)}; restore the old list, or start a new run"
            )
        self.cursors = [_Cursor(item, seed, row, num_rows, saved.get(item.source.name, {})) for item in opened]
        total_weight = sum(item.source.weight for item in opened)
        self.shares = [item.source.weight / total_weight for item in opened]
        self.num_packs: int = state.get("packs", 0)
        self.rejected: dict[str, int] = dict(state.get("rejected", {}))
        bins = [[self._read_again(*reference) for reference in references] for references in state.get("open", [])]
        self.bins = BestFit(pack_tokens, bins=bins)

    def __iter__(self) -> RowStream:
        return self

    def __next__(self) -> tuple[Pack, dict[str, Any]]:
        closed = None
        while closed is None:
            closed = self.bins.add(self._draw())
        documents = [drawn.encoded for drawn in closed]
        pack = make_pack(documents, self.pack_tokens, self.vocab.pad, (self.row, self.num_packs))
        self.num_packs += 1
        return pack, self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "packs": self.num_packs,
            "sources": {cursor.name: cursor.state() for cursor in self.cursors},
            "open": [[[drawn.source, drawn.sample] for drawn in items] for items in self.bins.bins],
            "rejected": dict(self.rejected),
        }

    def _draw(self) -> _Drawn:
        """The next document that can be used, of the source furthest behind its share (ties: the first)."""
        num_draws = sum(cursor.draws for cursor in self.cursors) + 1
        deficits = [share * num_draws - cursor.draws for share, cursor in zip(self.shares, self.cursors, strict=True)]
        source = max(range(len(deficits)), key=deficits.__getitem__)
        cursor = self.cursors[source]
        while True:
            sample = cursor.next_sample()
            encoded = self._encoded(source, sample)
            if not isinstance(encoded, Rejected):
                cursor.draws += 1
                cursor.rejected_run = 0
                return _Drawn(encoded, source, sample)
            self.rejected[encoded.category] = self.rejected.get(encoded.category, 0) + 1
            cursor.rejected_run += 1
            if cursor.rejected_run >= MAX_REJECTED_RUN:
                raise ValueError(
                    f"source {cursor.name!r} gave {cursor.rejected_run} documents in a row that cannot be used, "
                    f"the last because: {encoded.reason}; make its shards again without them"
                )

    def _encoded(self, source: int, sample: int) -> Encoded | Rejected:
        document = self.cursors[source].split.read(sample)
        if isinstance(document, Rejected):
            return document
        encoded = encode(document, self.vocab)
        if not isinstance(encoded, Rejected) and len(encoded) > self.pack_tokens:
            return Rejected(document.key, f"longer than a pack: {len(encoded)} tokens, a pack has {self.pack_tokens}")
        return encoded

    def _read_again(self, source: int, sample: int) -> _Drawn:
        encoded = self._encoded(source, sample)
        if isinstance(encoded, Rejected):
            raise ValueError(
                f"document {sample} of source {self.cursors[source].name!r} was in use when the run was saved and "
                f"cannot be used now: {encoded.reason}; give the run its old data, or start a new run"
            )
        return _Drawn(encoded, source, sample)
