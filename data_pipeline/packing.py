"""Documents of many lengths into packs of exactly T tokens, without a padding matrix or a dense mask.

Best-fit with a few open bins: a document goes where it leaves the least room; where it fits nowhere the fullest bin
closes and becomes a pack. Packs come one at a time, never in bursts, and documents are not sorted by length, which
would put all of one task into one step. Where a document goes depends only on the room in the open bins, so a stream
can be taken up from the sizes of the bins alone; and no bin stays open for more than MAX_AGE packs, so the documents
in the bins were all drawn a short while ago.
Cost (run): fill 96.7% for documents of 165 and 71 tokens in equal number at T = 1024; `make_pack` 0.06 ms.

Legend: T tokens of a pack, n documents (the unused tail counts as one), m images.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from data_pipeline.encode import SYSTEM, Encoded, shifted_labels

Item = TypeVar("Item", bound=Sized)

# Packs. Without a limit a bin of the demo stays open for up to 187 packs; with 8 its packs are 97.0% full instead of
# 97.1%, those of documents of log-normal lengths 99.6% either way; with 4 they are 87% and 91% full (run).
MAX_AGE = 8


@dataclass(eq=False)
class Pack:
    """A flat run of T tokens, cut into documents by `cu_seqlens`. Tensors are on the CPU.

    The unused tail, if there is one, is a last document of its own: ids pad, labels -100, doc_task -1, doc_id "".
    `name` is (row, number of the pack in its row); it seeds whatever is random about the pack.
    """

    ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], already shifted; -100 where nothing is supervised
    position_ids: torch.Tensor  # int64 [T], from 0 in each document
    cu_seqlens: torch.Tensor  # int32 [n + 1]
    max_seqlen: int  # of the documents and the tail; a Python int, so reading it never waits for a device
    segment: torch.Tensor  # uint8 [T], index into encode.SEGMENTS
    doc_task: torch.Tensor  # int64 [n], index into schema.TASKS
    doc_source: list[str]  # [n]
    doc_id: list[str]  # [n]
    image_start: torch.Tensor  # int64 [m], index of an image's first code in the pack
    image_hw: torch.Tensor  # int64 [m, 2]
    image_is_target: torch.Tensor  # bool [m]
    name: tuple[int, int]

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on `device`; copies may still be under way when this returns."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Pack:
        """The same pack in page-locked memory, from which copies to a GPU need not wait. Needs CUDA."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **pinned)

    # Between processes a pack travels as numpy: torch would open a shared-memory file for each small tensor, and a
    # deep prefetch would run out of file handles. Without the positions, and in 32 bits, it takes a third of the bytes.
    def __getstate__(self) -> dict[str, Any]:
        values = dict(vars(self))
        del values["position_ids"]
        values = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        return {**values, "ids": values["ids"].astype(np.int32), "labels": values["labels"].astype(np.int32)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["position_ids"] = positions(state["cu_seqlens"])
        state["ids"], state["labels"] = state["ids"].astype(np.int64), state["labels"].astype(np.int64)
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


class BestFit(Generic[Item]):
    """Online best-fit over `num_bins` open bins of `pack_tokens`. Items are documents, or anything with a length."""

    def __init__(
        self,
        pack_tokens: int,
        num_bins: int = 4,
        bins: Sequence[Sequence[Item]] = (),
        born: Sequence[int] = (),
        num_closed: int = 0,
    ) -> None:
        """`bins`, `born` and `num_closed` are those of an earlier BestFit."""
        self.pack_tokens = pack_tokens
        self.num_bins = num_bins
        self.bins: list[list[Item]] = [list(items) for items in bins]  # the oldest first
        self.free = [pack_tokens - sum(len(item) for item in items) for items in self.bins]  # tokens
        self.born = list(born)  # packs that had closed when a bin was opened
        self.num_closed = num_closed
        assert len(self.bins) == len(self.born) <= num_bins
        assert min(self.free, default=0) >= 0

    def close_overdue(self) -> list[Item] | None:
        """The items of the oldest bin if it has been open for too long. To be asked before each `add`."""
        return self._close(0) if self.born and self.num_closed - self.born[0] >= MAX_AGE else None

    def add(self, item: Item) -> list[Item] | None:
        """The items of the pack that closes by this, or None. An item must not be longer than a pack."""
        length = len(item)
        assert 0 < length <= self.pack_tokens, (length, self.pack_tokens)
        if length == self.pack_tokens:
            self.num_closed += 1
            return [item]
        fitting = [i for i, free in enumerate(self.free) if free >= length]
        if fitting:
            best = min(fitting, key=self.free.__getitem__)  # ties: the oldest
            self.bins[best].append(item)
            self.free[best] -= length
            return self._close(best) if self.free[best] == 0 else None
        born = self.num_closed
        closed = None
        if len(self.bins) == self.num_bins:
            closed = self._close(min(range(len(self.bins)), key=self.free.__getitem__))
        self.bins.append([item])
        self.free.append(self.pack_tokens - length)
        self.born.append(born)
        return closed

    def _close(self, i: int) -> list[Item]:
        self.num_closed += 1
        del self.free[i], self.born[i]
        return self.bins.pop(i)


def make_pack(documents: Sequence[Encoded], pack_tokens: int, pad_id: int, name: tuple[int, int]) -> Pack:
    """Joins documents of together at most `pack_tokens` tokens and fills up with pad."""
    lengths = [len(document) for document in documents]
    num_used = sum(lengths)
    tail = pack_tokens - num_used
    assert tail >= 0, f"{num_used} tokens do not fit into {pack_tokens}"
    has_tail = tail > 0
    slot_lengths = [length for document in documents for length in document.slot_lengths] + [tail]
    segments = [segment for document in documents for segment in document.slot_segments] + [SYSTEM]
    losses = [loss for document in documents for loss in document.slot_losses] + [False]
    ids = np.full(pack_tokens, pad_id, dtype=np.int64)
    np.concatenate([document.ids for document in documents] or [ids[:0]], out=ids[:num_used])
    starts = [0, *accumulate(lengths)][: len(lengths)]
    images = [
        (start + first, shape, is_target)
        for document, start in zip(documents, starts, strict=True)
        for first, shape, is_target in zip(
            document.image_starts, document.image_shapes, document.image_targets, strict=True
        )
    ]

    def of_list(values: list[Any], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=dtype))  # a third of the time of torch.tensor

    cu_seqlens = np.array([*starts, num_used] + [pack_tokens] * has_tail, dtype=np.int32)
    return Pack(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(shifted_labels(ids, slot_lengths, losses)),
        position_ids=torch.from_numpy(positions(cu_seqlens)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(*lengths, tail, 0),
        segment=torch.from_numpy(np.repeat(np.array(segments, dtype=np.uint8), slot_lengths)),
        doc_task=of_list([document.task for document in documents] + [-1] * has_tail, np.int64),
        doc_source=[document.source for document in documents] + [""] * has_tail,
        doc_id=[document.doc_id for document in documents] + [""] * has_tail,
        image_start=of_list([start for start, _, _ in images], np.int64),
        image_hw=of_list([shape for _, shape, _ in images], np.int64).reshape(-1, 2),
        image_is_target=of_list([is_target for _, _, is_target in images], np.bool_),
        name=name,
    )


def positions(cu_seqlens: np.ndarray) -> np.ndarray:
    """int64 [T]: each token's position in its document, from `cu_seqlens`, int32 [n + 1]."""
    starts = cu_seqlens[:-1].astype(np.int64)
    return np.arange(cu_seqlens[-1]) - np.repeat(starts, np.diff(cu_seqlens))
