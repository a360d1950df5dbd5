"""The watchdog: when a job stands still, one report says who waits for whom.

A collective that one rank never enters stops every other rank without a word, until a timeout kills them all and leaves
a stack that looks the same everywhere. So on each rank the main thread says where it is (`at`), and a thread tells the
others through the job's store every few seconds. When a rank has been at one place for too long, the lowest such rank
that is alive prints once: which ranks wait where, who has not come, who has not been heard of, and the first module
that ranks called differently (guard.py), where that is the reason.

The thread has a connection of its own: torch's client holds a lock while it waits for a key, and a main thread that
makes a process group does just that (run: a `set` through the same client came back after 3.7 s, through a clone after
0.05 ms). A store whose process is stopped never answers, whatever timeout is set (run), so every call is made in a
thread that may be left behind.

What it costs (run): 0.1 us for `at`; a beacon of 124 bytes, written in 0.1 ms; to read those of 1,000 ranks 6 ms, and
for the one rank that reports, 0.3 s for their traces.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from uvlm.distributed import listed
from uvlm.guard import Guard

Phase = Literal["start", "data", "forward", "backward", "step", "log", "validation", "save"]
# How far a rank has come within an optimizer step. Forward, backward and step alternate over its micro-steps.
_ORDER: dict[str, int] = {
    "start": 0,
    "data": 1,
    "forward": 2,
    "backward": 2,
    "step": 2,
    "log": 3,
    "validation": 4,
    "save": 5,
}
_WITHIN: dict[str, int] = {"forward": 0, "backward": 1, "step": 2}
_SILENT = "silent"
# Beyond them the store would be the slowest part of a step: each event of each rank is written there (reasoned).
_MOST_RANKS_TO_SHOW = 64
_MOST_STACKS = 4  # of which ranks stand at different lines
Beacon = dict[str, Any]


class Watchdog:
    """One for each rank; `close` it before the process group is destroyed.

    Args:
        limit: seconds at one place from which the job counts as hanging; may be set anew at any time.
        guard: its traces tell which module ranks called differently.
        every: seconds between two beacons.
        store, rank, world_size: those of the process group, unless given.
    """

    def __init__(
        self,
        limit: float,
        guard: Guard | None = None,
        every: float = 5.0,
        store: dist.Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.limit, self.every = limit, every
        self._guard = guard
        self._rank = dist.get_rank() if rank is None else rank
        self._num_ranks = dist.get_world_size() if world_size is None else world_size
        self._board = _Board(store or dist.distributed_c10d._get_default_store(), patience=max(2 * every, 1.0))
        self._host = socket.gethostname()
        self._main = threading.main_thread().ident
        self._where: tuple[int, Phase, float] = (0, "start", time.perf_counter())
        self._told: tuple[int, Phase, float] | None = None  # the place about which nothing is left to report
        self._number = 0  # of beacons
        self._last: Any = None  # what the last beacon saw: a rank at which nothing moves also shows its trace
        self._look: tuple[Any, int, dict[int, Beacon]] = (None, 0, {})  # from where, after which beacon, and what
        if guard and self._num_ranks <= _MOST_RANKS_TO_SHOW:
            guard.show = self._show_trace
        self._closed = threading.Event()
        with contextlib.suppress(_StoreGoneError):
            self._publish(with_trace=False)  # so that every rank is known, also one that dies at once
        self._thread = threading.Thread(target=self._run, name="uvlm-watchdog", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: Phase) -> None:
        """The main thread enters a phase of an optimizer step; a phase entered again starts anew."""
        self._where = (step, phase, time.perf_counter())

    def close(self) -> None:
        """Stop telling and watching; returns at once even if the store hangs."""
        self._closed.set()
        self._thread.join(timeout=self._board.patience)

    def explain_crash(self, patience: float | None = None) -> str | None:
        """Called by the main thread when a collective failed: what ranks called differently, if that is the reason.

        Shows this rank's trace to the others and waits for theirs, for `patience` seconds at most (as long as four
        beacons take, unless given). Their watchdogs show them once their main threads stand still.
        """
        deadline = time.perf_counter() + (4 * self.every if patience is None else patience)
        while self._guard:
            try:
                self._publish(with_trace=True)
                sentence = self._difference(self._board.read("trace", range(self._num_ranks)))
            except _StoreGoneError:
                return None
            if sentence or time.perf_counter() > deadline:
                return sentence
            time.sleep(min(self.every, 1.0) / 4)
        return None

    def _run(self) -> None:
        while not self._closed.wait(self.every):
            step, phase, since = where = self._where
            seconds = time.perf_counter() - since
            try:
                now = (where, self._guard and len(self._guard.trace()["events"]))
                self._publish(with_trace=now == self._last)
                self._last = now
                if where != self._told:
                    self._watch(where, seconds)
            except _StoreGoneError:
                if seconds > self.limit and where != self._told and not self._closed.is_set():
                    self._told = where
                    self._print(
                        f"rank {self._rank} (host {self._host}) is in {phase} of step {step} since {seconds:.0f} s\n"
                        "the job's store does not answer: look at the host of rank 0 or of the launcher"
                    )

    def _publish(self, with_trace: bool) -> None:
        """Show where this rank is, in about 150 bytes, and what it has called, in some kilobytes, if asked."""
        step, phase, since = self._where
        trace = self._guard.trace() if self._guard else {"micro_step": 0, "events": []}
        self._number += 1
        beacon = {
            "number": self._number,
            "time": time.time(),
            "host": self._host,
            "step": step,
            "phase": phase,
            "micro_step": trace["micro_step"] if phase in _WITHIN else 0,
            "seconds": time.perf_counter() - since,
        }
        if with_trace:
            self._board.write("trace", self._rank, {**trace, "step": step, "stack": self._stack(limit=3)})
        self._board.write("beacon", self._rank, beacon)

    def _show_trace(self) -> None:
        """In the first steps, by the main thread, before each call of a module."""
        assert self._guard
        self._board.write_at_once("trace", self._rank, {**self._guard.trace(), "step": self._where[0], "stack": ""})

    def _watch(self, where: tuple[int, Phase, float], seconds: float) -> None:
        """Two looks at the beacons show who is alive: one shortly before the limit, one when it is reached."""
        if seconds < self.limit - 3 * self.every:
            return
        seen_from, number, before = self._look
        if seen_from != where:
            self._look = where, self._number, self._board.read("beacon", range(self._num_ranks))
            return
        if seconds < self.limit or self._number < number + 3:
            return
        told = self._board.read("told", [0])
        if told and abs(told[0]["step"] - where[0]) <= 1:
            self._told = where
            return
        beacons = self._board.read("beacon", range(self._num_ranks))
        self._look = where, self._number, {rank: dict(beacon) for rank, beacon in beacons.items()}
        for rank, beacon in beacons.items():
            beacon[_SILENT] = rank != self._rank and rank in before and before[rank]["number"] == beacon["number"]
        lower = (beacons[rank] for rank in beacons if rank < self._rank and not beacons[rank][_SILENT])
        if any(beacon["seconds"] > 0.9 * self.limit for beacon in lower):
            return  # theirs to tell; should they die, it will be ours
        self._told = where
        self._board.write("told", 0, {"step": where[0]})
        self._print(self._report(beacons))

    def _report(self, beacons: Mapping[int, Beacon]) -> str:
        lines = who_waits(beacons, self._num_ranks)
        traces = self._board.read("trace", range(self._num_ranks))
        if sentence := self._difference(traces):
            lines.append(f"the first difference: {sentence}")
        by_stack: dict[str, list[int]] = defaultdict(list)
        for rank, beacon in beacons.items():
            trace = traces.get(rank)
            if trace and trace["stack"] and trace["step"] == beacon["step"] and not beacon[_SILENT]:
                by_stack[trace["stack"]].append(rank)
        odd_ones_first = sorted(by_stack, key=lambda stack: len(by_stack[stack]))
        lines += [
            f"{_named(by_stack[stack])} {'are' if len(by_stack[stack]) > 1 else 'is'} at {stack}"
            for stack in odd_ones_first[:_MOST_STACKS]
        ]
        return "\n".join(lines)

    def _difference(self, traces: Mapping[int, dict[str, Any]]) -> str | None:
        """In words, between ranks in the same micro-step; None if there is none to be seen."""
        by_place: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(dict)
        for rank, trace in traces.items():
            by_place[trace["step"], trace["micro_step"]][rank] = trace["events"]
        for step, micro_step in sorted(by_place):
            if self._guard and (sentence := self._guard.difference(by_place[step, micro_step])):
                return f"in micro-step {micro_step} of step {step}, {sentence}"
        return None

    def _stack(self, limit: int | None = None) -> str:
        """Of the main thread: all of it, or in a line its innermost calls that are not in an installed package."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return ""
        if limit is None:
            return "".join(traceback.format_stack(frame))
        calls = [call for call in traceback.extract_stack(frame) if "site-packages" not in call.filename][-limit:]
        return ", called from ".join(f"{call.filename}:{call.lineno} {call.name}" for call in reversed(calls))

    def _print(self, report: str) -> None:
        report = "\n  ".join(["uvlm: no progress; who waits for whom:", *report.splitlines()])
        print(f"{report}\n  stack of rank {self._rank}:\n{self._stack()}", end="", file=sys.stderr, flush=True)


def who_waits(beacons: Mapping[int, Beacon], num_ranks: int) -> list[str]:
    """Ranks by where they are, the ones furthest on first, a line for each place."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank in sorted(beacons):
        if not beacons[rank].get(_SILENT):
            groups[_progress(beacons[rank])].append(rank)
    lines = []
    for place in sorted(groups, reverse=True):
        ranks = groups[place]
        seconds = max(beacons[rank]["seconds"] for rank in ranks)
        waits = place == max(groups) and (len(groups) > 1 or len(ranks) < num_ranks)
        verb = ("wait" if len(ranks) > 1 else "waits") if waits else ("have" if len(ranks) > 1 else "has") + " not left"
        if waits:
            lines.append(f"{_named(ranks)} {verb} in {_place(beacons[ranks[0]])} since {seconds:.0f} s")
        else:
            lines.append(f"{_named(ranks, beacons)} {verb} {_place(beacons[ranks[0]])} since {seconds:.0f} s")
    if len(groups) == 1 and sum(map(len, groups.values())) == num_ranks:
        lines.append("all ranks are in the same phase; if at the same line too, look at the network and the devices")
    for rank in sorted(beacons):
        if beacons[rank].get(_SILENT):
            age = max(0.0, time.time() - beacons[rank]["time"])
            lines.append(f"{_named([rank], beacons)} was last heard of {age:.0f} s ago, in {_place(beacons[rank])}")
    if missing := [rank for rank in range(num_ranks) if rank not in beacons]:
        lines.append(f"{_named(missing)} {'were' if len(missing) > 1 else 'was'} never heard of")
    return lines


def _progress(beacon: Beacon) -> tuple[int, ...]:
    phase = beacon["phase"]
    return beacon["step"], _ORDER[phase], beacon["micro_step"], _WITHIN.get(phase, 0)


def _place(beacon: Beacon) -> str:
    micro_step = f", micro-step {beacon['micro_step']}" if beacon["micro_step"] > 1 else ""
    return f"{beacon['phase']} of step {beacon['step']}{micro_step}"


def _named(ranks: list[int], beacons: Mapping[int, Beacon] | None = None) -> str:
    """ "ranks 0, 2-7", with hosts where beacons are given and they are few."""
    hosts = sorted({beacons[rank]["host"] for rank in ranks}) if beacons else []
    at = f" (host{'s' if len(hosts) > 1 else ''} {', '.join(hosts)})" if 0 < len(hosts) <= 4 else ""
    return listed(ranks) + at


class _StoreGoneError(Exception):
    """The store did not answer in time, or its process has ended."""


class _Board:
    """What ranks write for each other in the store. No call takes longer than `patience` seconds."""

    def __init__(self, store: dist.Store, patience: float) -> None:
        self.patience = patience
        own: Any = store
        self._store: Any = dist.PrefixStore("uvlm/watchdog", own.clone())
        self._call: threading.Thread | None = None
        self._lock = threading.Lock()

    def write(self, kind: str, rank: int, value: Mapping[str, Any]) -> None:
        self._within_patience(lambda: self.write_at_once(kind, rank, value))

    def write_at_once(self, kind: str, rank: int, value: Mapping[str, Any]) -> None:
        """The same in this thread, three times as fast; it waits as long as the store does."""
        self._store.set(f"{kind}/{rank}", json.dumps(value, separators=(",", ":")))

    def read(self, kind: str, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """By rank, what those that have written such a thing wrote last."""
        return self._within_patience(lambda: self._read(kind, list(ranks)))

    def _read(self, kind: str, ranks: list[int]) -> dict[int, dict[str, Any]]:
        store, keys = self._store, {rank: f"{kind}/{rank}" for rank in ranks}
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        if store.has_extended_api() and keys:
            values = store.multi_get(list(keys.values()))
        else:
            values = [store.get(key) for key in keys.values()]
        return {rank: json.loads(value) for rank, value in zip(keys, values, strict=True)}

    def _within_patience(self, function: Callable[[], Any]) -> Any:
        """The function's value. While one call has not come back, no other is made."""
        result: list[Any] = []

        def call() -> None:
            try:
                result.append(function())
            except RuntimeError as error:  # torch's errors of a store
                result.append(error)

        with self._lock:
            if self._call is None or not self._call.is_alive():
                self._call = threading.Thread(target=call, name="uvlm-watchdog-store", daemon=True)
                self._call.start()
                self._call.join(self.patience)
                if result and not isinstance(result[0], RuntimeError):
                    return result[0]
        raise _StoreGoneError


def lower_timeout(seconds: float) -> None:
    """Set the timeout of every process group of this rank, DeepSpeed's own among them, for collectives from now on."""
    groups = dist.distributed_c10d
    for group in list(groups._world.pg_map):
        groups._set_pg_timeout(timedelta(seconds=seconds), group)
