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
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from data_pipeline.encode import IGNORED, SYSTEM, Encoded

Item = TypeVar("Item", bound=Sized)

MAX_AGE = 16  # packs; the demo's bins close after 3 on average and 9 at most (run)


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
    # deep prefetch would run out of file handles.
    def __getstate__(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
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
    tail = pack_tokens - sum(lengths)
    assert tail >= 0, f"{sum(lengths)} tokens do not fit into {pack_tokens}"
    has_tail = tail > 0
    ids = np.full(pack_tokens, pad_id, dtype=np.int64)
    labels = np.full(pack_tokens, IGNORED, dtype=np.int64)
    segment = np.full(pack_tokens, SYSTEM, dtype=np.uint8)
    position_ids = np.arange(pack_tokens)
    image_start = []
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        end = start + length
        ids[start:end] = document.ids
        labels[start:end] = document.labels
        segment[start:end] = document.segment
        position_ids[start:end] -= start
        image_start.append(document.image_start + start)
        start = end
    position_ids[start:] -= start
    all_lengths = lengths + [tail] * has_tail

    def joined(parts: list[np.ndarray], empty: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([empty, *parts]))

    return Pack(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *all_lengths], dtype=np.int32)),
        max_seqlen=max(all_lengths),
        segment=torch.from_numpy(segment),
        doc_task=torch.tensor([document.task for document in documents] + [-1] * has_tail, dtype=torch.int64),
        doc_source=[document.source for document in documents] + [""] * has_tail,
        doc_id=[document.doc_id for document in documents] + [""] * has_tail,
        image_start=joined(image_start, np.zeros(0, np.int64)),
        image_hw=joined([document.image_hw for document in documents], np.zeros((0, 2), np.int64)),
        image_is_target=joined([document.image_is_target for document in documents], np.zeros(0, np.bool_)),
        name=name,
    )
