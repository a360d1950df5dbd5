"""Bytes of tensors that are alive: how many, of what kind, in which phase.

Resident memory says what a process holds, libraries and allocator included, and not for what. Here every storage that
a torch operation makes is seen when it is made and when it is given back, by a dispatch mode; it works the same for
real tensors, for those of the meta device and for fake ones, so what a plan predicts (memory_plan.py) and what a
rehearsal or a benchmark measures is counted by the same rule.

What a storage is for is often known later than its birth: a gathered weight becomes a parameter's data, a bucket part
of an optimizer. So kinds are claimed at any time while it lives, backwards too: sums by kind are made from the log of
births and deaths at the end. Memory that a kernel takes and gives back inside of one operation is not seen.

Cost (run, one core): 6 us an operation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL = "all"
OTHER = "other"  # what nobody has claimed


class _Event(NamedTuple):
    storage: int  # number of a storage
    num_bytes: int  # negative where it is given back
    phase: int


class LiveMemory(TorchDispatchMode):
    """Use it as a context; afterwards `peaks` tells.

    Args:
        device: type of the device whose memory counts, as tensors name theirs.
        claims: asked after every operation that made a storage, with the operation's name and the new tensors: a kind,
            or None. For those whose kind shows only in how they are made.
    """

    def __init__(
        self, device: str = "cpu", claims: Callable[[str, list[torch.Tensor]], str | None] | None = None
    ) -> None:
        super().__init__()
        self._device = device
        self._claims = claims
        self._events: list[_Event] = []
        self._kinds: list[str] = []  # by number of a storage
        self._alive: dict[int, int] = {}  # id of a storage's implementation -> number
        self._references: dict[int, weakref.ref[Any]] = {}
        self._phases: list[str] = ["start"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        new = [tensor for tensor in tensors if self._see(tensor, OTHER)]
        if new and self._claims and (kind := self._claims(str(func), new)):
            self.claim(kind, new)
        return made

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside belongs to this phase; a phase may come again. Phases may be nested."""
        before = self._phases[-1]
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.append(before)

    def claim(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """The storages of these tensors are of this kind, from their birth on. The last claim holds. A storage that no
        operation has made (from a file, say) counts from now on."""
        for tensor in tensors:
            if not self._see(tensor, kind) and tensor.device.type == self._device:
                self._kinds[self._alive[tensor.untyped_storage()._cdata]] = kind

    def now(self) -> dict[str, int]:
        """Bytes that are alive, by kind, with ALL."""
        sums = {ALL: 0}
        born = {event.storage: event.num_bytes for event in tuple(self._events) if event.num_bytes > 0}
        for number in tuple(self._alive.values()):
            for kind in (ALL, self._kinds[number]):
                sums[kind] = sums.get(kind, 0) + born.get(number, 0)
        return sums

    def peaks(self) -> dict[str, dict[str, int]]:
        """By phase, the most bytes that were alive at a moment of it: of each kind and, under ALL, of all together."""
        events = tuple(self._events)  # a collection of garbage may write another death at any moment
        if not events:
            return {}
        storage, num_bytes, phase = np.array(events, dtype=np.int64).T
        kinds = np.array(self._kinds)[storage]
        names = np.array(self._phases)[phase]
        phases = list(dict.fromkeys(names.tolist()))
        peaks: dict[str, dict[str, int]] = {name: {} for name in phases}
        for kind in [ALL, *dict.fromkeys(self._kinds)]:
            alive = np.cumsum(np.where((kinds == kind) | (kind == ALL), num_bytes, 0))
            before = np.concatenate([[0], alive[:-1]])  # a phase also holds what was there at its entry
            for name in phases:
                peaks[name][kind] = int(max(alive[names == name].max(), before[names == name].max()))
        return peaks

    def _see(self, tensor: torch.Tensor, kind: str) -> bool:
        """Whether its storage counts and was not known yet."""
        if tensor.device.type != self._device or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return False
        number = len(self._kinds)
        self._kinds.append(kind)
        self._alive[key] = number
        num_bytes = storage.nbytes()
        self._references[number] = weakref.ref(storage, lambda _: self._gone(key, number, num_bytes))
        self._events.append(_Event(number, num_bytes, len(self._phases) - 1))
        return True

    def _gone(self, key: int, number: int, num_bytes: int) -> None:
        self._alive.pop(key, None)
        self._references.pop(number, None)
        self._events.append(_Event(number, -num_bytes, len(self._phases) - 1))
