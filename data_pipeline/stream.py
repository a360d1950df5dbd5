"""One row of the global batch: an endless stream of packs, each with the state that continues after it.

State travels with the value: whoever stores the state that came with the last pack it used resumes at the next one,
whatever was prefetched in between. A state is JSON of bounded size, however many documents a pack holds, because it
does not list the documents that wait in open bins. It holds an anchor: where each source stood, and how much room each
bin had, at a moment since which all bins of that moment have closed. From there the stream is run again to the present;
where documents go depends only on room, so the contents of the anchor's bins are not needed. Bins are short-lived
(`packing.MAX_AGE`), so this takes as long as a few packs do.

Sources are mixed by weight, counted in accepted documents: the source furthest behind its share is drawn next. So the
mixture is exact at every moment and needs no random numbers. Weights may change at given steps.

Cost (run): a state has 0.3 kB, and 0.1 kB more for each source beyond the first; it is taken up again in 3 ms where
packs have 4,096 tokens and in 17 ms where they have 32,768.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.encode import TOO_LONG, Encoded, encode, encode_pieces
from data_pipeline.order import WINDOW, row_order
from data_pipeline.packing import BestFit, Pack, make_pack
from data_pipeline.schema import Rejected
from data_pipeline.sources import OpenSource
from data_pipeline.vocab import Vocab

MAX_REJECTED_RUN = 1000  # documents of one source rejected one after the other; a source like that is broken
MIN_SEEN = 200  # documents before a share of rejected ones means something


class _Cursor:
    """Where a row stands in a source."""

    def __init__(self, opened: OpenSource, seed: int, row: int, num_rows: int, state: Mapping[str, Any]) -> None:
        self.source, self.split = opened.source, opened.split
        self.seed, self.row, self.num_rows = seed, row, num_rows
        self.credit: float = state.get("credit", 0.0)  # documents by which it is behind its share
        self.draws: int = state.get("draws", 0)  # accepted documents
        self.epoch: int = state.get("epoch", 0)
        self.position: int = state.get("position", 0)  # in this row's order of the epoch
        self._enter_epoch()

    def _enter_epoch(self) -> None:
        self._order = row_order(
            self.seed, self.epoch, self.row, shard_sizes=self.split.shard_sizes, num_rows=self.num_rows
        )
        self._hinted = self.position

    def next_sample(self) -> int:
        while self.position >= len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._enter_epoch()
        while self._hinted < min(self.position + WINDOW, len(self._order)):  # a window ahead
            end = (self._hinted // WINDOW + 1) * WINDOW
            self.split.prefetch(self._order[self._hinted : end])
            self._hinted = end
        self.position += 1
        return int(self._order[self.position - 1])

    def state(self) -> dict[str, Any]:
        return {
            "shards": self.split.manifest.fingerprint,
            "credit": self.credit,
            "draws": self.draws,
            "epoch": self.epoch,
            "position": self.position,
        }


def check_state(state: Mapping[str, Any], opened: Sequence[OpenSource], pack_tokens: int) -> None:
    """ValueError where a state is not of these sources, these shards and packs of `pack_tokens`."""
    saved, names = state["anchor"]["sources"], [item.source.name for item in opened]
    if list(saved) != names:
        raise ValueError(
            f"the data state was saved with the sources {', '.join(saved)} and cannot go on with "
            f"{', '.join(names)}; restore the old list, or start a new run"
        )
    if state["pack_tokens"] != pack_tokens:
        raise ValueError(
            f"the data state was saved with pack_tokens={state['pack_tokens']} and cannot go on with "
            f"{pack_tokens}; restore it, or start a new run"
        )
    for item in opened:
        if saved[item.source.name]["shards"] != item.split.manifest.fingerprint:
            raise ValueError(
                f"the shards of source {item.source.name!r} are not those that the run was saved with; give the run "
                "its old data, or start a new run"
            )


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
        max_rejected_share: float = 0.05,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """ValueError where `state` does not belong to these sources."""
        state = state or {}
        if state:
            check_state(state, opened, pack_tokens)
        anchor = state.get("anchor", {})
        saved = anchor.get("sources", {})
        self.vocab, self.row, self.pack_tokens = vocab, row, pack_tokens
        self.max_rejected_share = max_rejected_share
        self.cursors = [_Cursor(item, seed, row, num_rows, saved.get(item.source.name, {})) for item in opened]
        self.rejected: dict[str, int] = dict(anchor.get("rejected", {}))  # category -> documents
        self._refused: list[dict[str, Any]] = []
        self._shares_at: tuple[int, list[float]] = (-1, [])  # step, shares
        self._pieces: deque[Encoded] = deque()  # of the document drawn last, still to be packed
        self._pieces_of: tuple[int, int] | None = None  # source and sample
        # The anchor's bins: as full as they were, their contents unknown.
        bins = [[range(pack_tokens - free)] for free, _ in anchor.get("bins", [])]
        born = [packs for _, packs in anchor.get("bins", [])]
        self._bins: BestFit[Encoded | range] = BestFit(
            pack_tokens, bins=bins, born=born, num_closed=anchor.get("packs", 0)
        )
        self._anchors = deque([dict(anchor) or self._anchor()])
        if state:
            self._replay(anchor, state)

    @property
    def num_packs(self) -> int:
        return self._bins.num_closed

    def __iter__(self) -> RowStream:
        return self

    def __next__(self) -> tuple[Pack, dict[str, Any]]:
        documents = [document for document in self._next_documents() if isinstance(document, Encoded)]
        pack = make_pack(documents, self.pack_tokens, self.vocab.pad, (self.row, self.num_packs - 1))
        return pack, self._state()

    def take_refused(self) -> list[dict[str, Any]]:
        """The bad documents met since the last call: row, pack, source, sample, key and reason."""
        refused, self._refused = self._refused, []
        return refused

    def _next_documents(self) -> list[Encoded | range]:
        closed = self._bins.close_overdue()
        while closed is None:
            closed = self._bins.add(self._draw())
        self._anchors.append(self._anchor())
        oldest = self._bins.born[0] if self._bins.born else self.num_packs
        while len(self._anchors) > 1 and self._anchors[1]["packs"] <= oldest:
            self._anchors.popleft()
        return closed

    def _state(self) -> dict[str, Any]:
        return {
            "packs": self.num_packs,
            "pack_tokens": self.pack_tokens,
            "rejected": dict(self.rejected),
            "now": self._now(),
            "anchor": self._anchors[0],
        }

    def _now(self) -> list[list[int]]:
        """What a replay must come to."""
        return [list(self._bins.free), *([cursor.draws, cursor.epoch, cursor.position] for cursor in self.cursors)]

    def _anchor(self) -> dict[str, Any]:
        return {
            "packs": self.num_packs,
            "rejected": dict(self.rejected),
            "bins": [list(bin) for bin in zip(self._bins.free, self._bins.born, strict=True)],
            "pieces": [*self._pieces_of, len(self._pieces)] if self._pieces_of and self._pieces else None,
            "sources": {cursor.source.name: cursor.state() for cursor in self.cursors},
        }

    def _replay(self, anchor: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """From the anchor to the state, whose open bins then hold the documents that they held."""
        if anchor["pieces"]:
            source, sample, num_left = anchor["pieces"]
            pieces = self._encoded(source, sample)
            self._pieces.extend([] if isinstance(pieces, Rejected) else pieces[-num_left:])
            self._pieces_of = source, sample
        while self.num_packs < state["packs"]:
            self._next_documents()
        self.take_refused()  # told when they were met first
        fits = self._now() == state["now"] and self.rejected == state["rejected"]
        if not fits or any(isinstance(item, range) for items in self._bins.bins for item in items):
            raise ValueError(
                f"row {self.row} cannot go on where the run was saved: its documents are not read as they were; give "
                "the run its old data, weights and tokenizer, or start a new run"
            )

    def _draw(self) -> Encoded:
        """The next document that can be used, of the source furthest behind its share (ties: the first)."""
        if not self._pieces:
            furthest, source = -math.inf, -1
            for i, share in enumerate(self._shares()):
                cursor = self.cursors[i]
                cursor.credit += share
                if share > 0 and cursor.credit > furthest:
                    furthest, source = cursor.credit, i
            self.cursors[source].credit -= 1
            self._pieces.extend(self._next_usable(source))
        return self._pieces.popleft()

    def _shares(self) -> list[float]:
        """Of each source, at the present step."""
        if self._shares_at[0] != self.num_packs:
            weights = [cursor.source.weight_at(self.num_packs) for cursor in self.cursors]
            self._shares_at = self.num_packs, [weight / sum(weights) for weight in weights]
        return self._shares_at[1]

    def _next_usable(self, source: int) -> list[Encoded]:
        cursor = self.cursors[source]
        num_rejected = 0
        while True:
            sample = cursor.next_sample()
            pieces = self._encoded(source, sample)
            if not isinstance(pieces, Rejected):
                cursor.draws += 1
                self._pieces_of = source, sample
                return pieces
            self.rejected[pieces.category] = self.rejected.get(pieces.category, 0) + 1
            if pieces.category != TOO_LONG:
                place = {"row": self.row, "pack": self.num_packs, "source": cursor.source.name, "sample": sample}
                self._refused.append({**place, "key": pieces.key, "reason": pieces.reason})
            num_rejected += 1
            self._check_rejected(cursor, pieces.reason, num_rejected)

    def _check_rejected(self, cursor: _Cursor, reason: str, num_in_a_row: int) -> None:
        if num_in_a_row >= min(MAX_REJECTED_RUN, 20 * len(cursor.split)):
            is_long = reason.startswith(TOO_LONG)
            remedy = "raise data.pack_tokens, or set over_long: split" if is_long else "make its shards again"
            raise ValueError(
                f"source {cursor.source.name!r} gave {num_in_a_row} documents in a row that cannot be used, "
                f"the last because: {reason}; {remedy}"
            )
        num_bad = sum(count for category, count in self.rejected.items() if category != TOO_LONG)
        num_seen = num_bad + sum(cursor.draws for cursor in self.cursors)
        if num_seen >= MIN_SEEN and num_bad > self.max_rejected_share * num_seen:
            raise ValueError(
                f"{num_bad} of the first {num_seen} documents of row {self.row} are bad, the last of source "
                f"{cursor.source.name!r}: {reason}; find them with `uvlm data verify`, or raise "
                f"data.max_rejected_share={self.max_rejected_share:g}"
            )

    def _encoded(self, source: int, sample: int) -> list[Encoded] | Rejected:
        cursor = self.cursors[source]
        document = cursor.split.read(sample)
        if isinstance(document, Rejected):
            return document
        encoded = encode(document, self.vocab)
        if isinstance(encoded, Rejected):
            return encoded
        if len(encoded) <= self.pack_tokens:
            return [encoded]
        if cursor.source.over_long == "split":
            return encode_pieces(document, self.vocab, self.pack_tokens)
        return Rejected(document.key, f"{TOO_LONG}: {len(encoded)} tokens, a pack has {self.pack_tokens}")
