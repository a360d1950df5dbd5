"""What is fetched ahead stays within its bound, never blocks a reader, and is read a run at a time."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from data_pipeline import read_ahead
from data_pipeline.read_ahead import ReadAhead

Load = Callable[[], tuple[list[Any], int]]


class Loads:
    """Makes `load` functions, counts their calls, and lets them wait for `gate`."""

    def __init__(self) -> None:
        self.names: list[object] = []
        self.gate = threading.Event()

    def __call__(self, name: object, keys: list[Any], num_bytes: int, *, waits: bool = False) -> Load:
        def load() -> tuple[list[Any], int]:
            self.names.append(name)
            assert not waits or self.gate.wait(60)
            return keys, num_bytes

        return load


@pytest.fixture
def loads() -> Iterator[Loads]:
    made = Loads()
    yield made
    made.gate.set()


def wait_for(run: Any) -> None:
    run.values.result(timeout=60)


def test_a_run_that_is_read_before_there_was_room_is_read_whole(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives way to it wakes up nobody who would start a run in between."""
    monkeypatch.setattr(read_ahead, "NUM_FETCHES", 1)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 100)
    ahead = ReadAhead()
    ahead.announce(["a"], loads("a", ["a"], 40, waits=True), 40)
    ahead.announce(["b"], loads("b", ["b"], 40), 40)  # the only thread is at a
    ahead.announce(["c0", "c1", "c2"], loads("c", ["c0", "c1", "c2"], 60), 60)
    threading.Timer(0.05, loads.gate.set).start()
    assert [ahead.take(key) for key in ("c0", "c1", "c2", "b", "a")] == ["c0", "c1", "c2", "b", "a"]
    assert loads.names == ["a", "c", "b"]
    assert not ahead._runs
    assert not ahead._run_of


def test_what_was_announced_last_gives_way_and_is_fetched_again(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "NUM_FETCHES", 1)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 100)
    ahead = ReadAhead()
    for key in "abc":
        ahead.announce([key], loads(key, [key], 40), 40)
    for key in "ab":
        wait_for(ahead._run_of[key])
    assert [ahead.take(key) for key in "cab"] == ["c", "a", "b"]
    assert loads.names == ["a", "b", "c", "b"]


@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_rows_that_announce_more_than_the_bound_still_read_whole_runs(
    loads: Loads, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    num_runs, length, num_ahead = 40, 8, 16
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 80 * length)  # 80 runs; 16 rows announce 256
    ahead, announced, singly = ReadAhead(), [0] * num_rows, 0
    for step in range(num_runs * length):
        for row in range(num_rows):
            while announced[row] < min(step // length + num_ahead, num_runs):
                keys: list[Any] = [(row, announced[row] * length + i) for i in range(length)]
                ahead.announce(keys, loads(keys[0], keys, length), length)
                announced[row] += 1
            value = ahead.take((row, step))
            assert value in (None, (row, step))
            singly += value is None
            assert ahead.num_bytes <= read_ahead.MAX_BYTES
    assert singly <= 0.02 * num_rows * num_runs * length
    assert len(loads.names) <= 1.5 * num_rows * num_runs
    assert not ahead._runs


def test_runs_that_nobody_comes_to_read_take_no_room_from_others(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "NUM_FETCHES", 1)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 10)
    ahead = ReadAhead()
    for i in range(20):
        ahead.announce([("old", i)], loads("old", [i], 1), 1)
    for i in range(30):
        ahead.announce([i, -i - 1], loads(i, [i, -i - 1], 5), 5)
        assert (ahead.take(i), ahead.take(-i - 1)) == (i, -i - 1)


def test_runs_that_are_being_read_give_way_to_no_other(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise rows that need more than the bound at once would fetch a run for each sample."""
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 10)
    ahead, random = ReadAhead(), np.random.default_rng(0)
    keys = [(run, i) for run in range(8) for i in range(5)]
    for run in range(8):
        part = keys[5 * run : 5 * run + 5]
        ahead.announce(part, loads(run, part, 5), 5)
    for place in random.permutation(len(keys)):
        assert ahead.take(keys[place]) in (None, keys[place])  # alone what finds no room is left to the reader
        assert ahead.num_bytes <= 10
    assert len(loads.names) <= 12
    assert not ahead._runs


def test_a_run_above_the_bound_is_held_alone(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 10)
    ahead = ReadAhead()
    ahead.announce(["a"], loads("a", ["a"], 5), 5)
    ahead.announce(["b"], loads("b", ["b"], 50), 50)
    ahead.announce(["c"], loads("c", ["c"], 5), 5)
    wait_for(ahead._run_of["a"])
    assert [ahead.take(key) for key in "bca"] == ["b", "c", "a"]


def test_threads_are_started_as_runs_need_them(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "NUM_FETCHES", 3)
    ahead = ReadAhead()
    assert ahead._num_threads == 0
    for i in range(4):
        ahead.announce([i], loads(i, [i], 1), 1)
        assert ahead.take(i) == i
    assert ahead._num_threads == 1
    for i in range(9):
        ahead.announce([i], loads(i, [i], 1, waits=True), 1)
    assert ahead._num_threads == 3
    loads.gate.set()
    assert [ahead.take(i) for i in range(9)] == list(range(9))
