"""When ranks stand still, one of them says who waits for whom; and nothing here ever waits for ever itself.

Most tests give two watchdogs of one process a store in memory, as if they were ranks; the slow ones use real ranks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from uvlm.guard import Guard
from uvlm.watchdog import Phase, Watchdog, lower_timeout, who_waits

EVERY = 0.02
LONG = 1e9
PATIENCE = 60.0  # seconds until a test gives up; none takes nearly as long


def until(condition: Callable[[], Any]) -> Any:
    """The condition's first value that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(EVERY / 4)
    return value


class Ranks:
    """Watchdogs of a job whose ranks all live in this process."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.watchdogs: list[Watchdog] = []

    def start(self, limits: Sequence[float], guards: Sequence[Guard | None] | None = None) -> list[Watchdog]:
        for rank, limit in enumerate(limits):
            guard = guards[rank] if guards else None
            self.watchdogs.append(Watchdog(limit, guard, EVERY, self.store, rank, len(limits)))
        return self.watchdogs

    def beacon(self, rank: int) -> dict[str, Any] | None:
        key = f"uvlm/watchdog/beacon/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def is_at(self, rank: int, phase: str) -> bool:
        beacon = self.beacon(rank)
        return beacon is not None and beacon["phase"] == phase

    def number(self, rank: int) -> int:
        return (self.beacon(rank) or {"number": 0})["number"]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    job = Ranks()
    yield job
    for watchdog in job.watchdogs:
        watchdog.close()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """All that was written to standard error so far."""
    parts: list[str] = []

    def read() -> str:
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return read


def beacon(step: int, phase: Phase, seconds: float, host: str = "n0", **others: Any) -> dict[str, Any]:
    values = {"number": 1, "time": time.time(), "host": host, "micro_step": 0}
    return {**values, "step": step, "phase": phase, "seconds": seconds, **others}


def test_a_report_groups_ranks_by_where_they_are() -> None:
    beacons = {rank: beacon(120, "backward", 480, micro_step=1) for rank in range(8)}
    beacons[1] = beacon(120, "data", 481, host="n3")
    beacons[5] = beacon(120, "forward", 2, host="n7", silent=True, time=time.time() - 512)
    assert who_waits(beacons, num_ranks=9) == [
        "ranks 0, 2-4, 6-7 wait in backward of step 120 since 480 s",
        "rank 1 (host n3) has not left data of step 120 since 481 s",
        "rank 5 (host n7) was last heard of 512 s ago, in forward of step 120",
        "rank 8 was never heard of",
    ]


def test_the_micro_step_tells_who_is_ahead() -> None:
    beacons = {0: beacon(3, "backward", 9, micro_step=2), 1: beacon(3, "forward", 8, micro_step=3)}
    assert who_waits(beacons, num_ranks=2) == [
        "rank 1 waits in forward of step 3, micro-step 3 since 8 s",
        "rank 0 (host n0) has not left backward of step 3, micro-step 2 since 9 s",
    ]


def test_where_all_ranks_are_at_one_place_none_is_blamed() -> None:
    beacons = {rank: beacon(7, "step", 30) for rank in range(2)}
    assert who_waits(beacons, num_ranks=2) == [
        "ranks 0-1 (host n0) have not left step of step 7 since 30 s",
        "all ranks are in the same phase; if at the same line too, look at the network and the devices",
    ]


def test_one_report_a_hang_and_only_from_the_lowest_rank(ranks: Ranks, said: Callable[[], str]) -> None:
    zero, one = ranks.start([0.3, 0.3])
    zero.at(4, "backward")
    one.at(4, "data")
    report = until(lambda: "stack of rank" in (text := said()) and text)
    assert "rank 0 waits in backward of step 4" in report
    assert "has not left data of step 4" in report
    assert re.search(r"ranks 0-1 are at .*test_watchdog.py:\d+ ", report)  # one main thread serves both here
    assert "stack of rank 0" in report
    assert "test_one_report_a_hang_and_only_from_the_lowest_rank" in report
    number = ranks.number(1)
    until(lambda: ranks.number(1) > number + 30)  # twice the limit
    assert said().count("who waits for whom") == 1


def test_a_hang_that_a_higher_rank_has_reported_is_not_reported_again(ranks: Ranks, said: Callable[[], str]) -> None:
    zero, one = ranks.start([LONG, 0.2])
    one.at(6, "backward")

    def moving() -> str:
        zero.at(6, "data")
        return said()

    assert "stack of rank 1" in until(lambda: "stack of rank" in (text := moving()) and text)
    zero.limit = 0.2  # and from now on it stands still
    number = ranks.number(0)
    until(lambda: ranks.number(0) > number + 40)
    assert said().count("who waits for whom") == 1


def test_ranks_that_move_are_not_reported(ranks: Ranks, said: Callable[[], str]) -> None:
    (zero,) = ranks.start([LONG])
    zero.at(0, "data")
    until(lambda: ranks.number(0) > 5)
    assert said() == ""
    zero.limit = 0.0
    until(said)  # it would have been


def test_the_next_rank_reports_where_the_lowest_is_dead(ranks: Ranks, said: Callable[[], str]) -> None:
    zero, one = ranks.start([LONG, LONG])
    zero.at(2, "forward")
    until(lambda: ranks.is_at(0, "forward"))
    zero.close()
    one.at(2, "backward")
    one.limit = 0.2
    report = until(lambda: "stack of rank" in (text := said()) and text)
    assert "rank 1 waits in backward of step 2" in report
    assert "was last heard of 0 s ago, in forward of step 2" in report
    assert "stack of rank 1" in report


def test_a_lower_rank_that_dies_without_a_report_leaves_it_to_the_next(ranks: Ranks, said: Callable[[], str]) -> None:
    zero, one = ranks.start([LONG, LONG])
    zero.at(2, "forward")
    until(lambda: ranks.is_at(0, "forward") and (ranks.beacon(0) or {})["seconds"] > 1)
    one.at(2, "backward")
    one.limit = 0.2
    number = ranks.number(1)
    until(lambda: ranks.number(1) > number + 40)
    assert said() == ""  # rank 0 is alive and has been there long enough to report
    zero.close()
    assert "stack of rank 1" in until(lambda: "stack of rank" in (text := said()) and text)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, route: str) -> torch.Tensor:
        x = torch.ones(1, 2)
        for name in route:
            x = getattr(self, name)(x)
        return x.sum()


def guarded(route: str) -> Guard:
    """A rank in the middle of a forward pass that has called these modules."""
    model = Pair()
    guard = Guard(model, every=1)
    guard.begin()
    model(route)
    return guard


def test_a_report_names_the_first_module_that_ranks_called_differently(ranks: Ranks, said: Callable[[], str]) -> None:
    for watchdog in ranks.start([0.3, 0.3], [guarded("ab"), guarded("bab")]):
        watchdog.at(9, "forward")
    report = until(lambda: "stack of rank" in (text := said()) and text)
    expected = (
        "the first difference: in micro-step 1 of step 9, rank 1 called b as module number 1, where rank 0 called a"
    )
    assert expected in report


def test_a_crash_is_explained_by_the_traces_of_ranks_that_stand_still(ranks: Ranks) -> None:
    zero, one = ranks.start([LONG, LONG], [guarded("ab"), guarded("aa")])
    zero.at(9, "forward")
    one.at(9, "forward")
    sentence = zero.explain_crash(patience=PATIENCE)
    assert sentence == "in micro-step 1 of step 9, rank 1 called a as module number 2, where rank 0 called b"


def test_a_crash_for_another_reason_is_not_explained(ranks: Ranks) -> None:
    zero, one = ranks.start([LONG, LONG], [guarded("ab"), guarded("a")])  # rank 1 has not come so far
    zero.at(9, "forward")
    one.at(9, "forward")
    assert zero.explain_crash(patience=10 * EVERY) is None


def test_events_of_the_first_steps_are_shown_before_they_have_consequences(ranks: Ranks) -> None:
    """A rank that gloo ends without an exception has left its trace."""
    model = Pair()
    guard = Guard(model, every=1, first=1)
    (watchdog,) = ranks.start([LONG], [guard])
    watchdog.at(0, "forward")
    shown: list[list[int]] = []

    def show(*_: Any) -> None:
        shown.append(json.loads(ranks.store.get("uvlm/watchdog/trace/0"))["events"])

    model.a.register_forward_pre_hook(show)  # where ZeRO-3 gathers
    guard.begin()
    model("ab").backward()
    guard.end()
    assert shown == [[0]]
    guard.compare(0)
    assert guard.show is None  # from here on only a rank that stands still shows its trace


STOPPABLE_STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.kill
def test_a_store_that_does_not_answer_stops_nobody_and_is_reported(said: Callable[[], str]) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPABLE_STORE], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), None, False)
        watchdog = Watchdog(LONG, None, EVERY, store, rank=3, world_size=8)
        until(lambda: store.check(["uvlm/watchdog/beacon/3"]))
        server.send_signal(signal.SIGSTOP)
        watchdog.at(5, "save")
        watchdog.limit = 0.1
        report = until(lambda: "stack of rank 3" in (text := said()) and text)
        assert "is in save of step 5 since" in report
        assert "the job's store does not answer" in report
        assert watchdog.explain_crash(patience=0.1) is None
        watchdog.close()
        server.kill()


REAL_RANK = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from uvlm.watchdog import Watchdog, lower_timeout
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, None, False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)  # its timeout: 30 minutes
groups = [dist.group.WORLD, dist.new_group(), dist.new_group([0, 1])]
watchdog = Watchdog(3.0, every=0.2)
dist.all_reduce(torch.ones(1))
lower_timeout(20)
print("ready", flush=True)
sys.stdin.readline()
if rank == 2:
    watchdog.at(8, "data")
    time.sleep(600)
watchdog.at(8, "forward")
try:
    dist.all_reduce(torch.ones(1), group=groups[1])
except RuntimeError as error:
    print(error, flush=True)
watchdog.close()
"""


@pytest.mark.slow
@pytest.mark.kill
def test_a_stopped_process_is_named_and_the_lowered_timeout_ends_the_others() -> None:
    """While main threads wait in a collective of a group of their own, their watchdogs still talk."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REAL_RANK, str(rank), str(server.port)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        os.kill(processes[2].pid, signal.SIGSTOP)
        for process in processes[:2]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=120) for process in processes[:2]]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert all("Timed out waiting" in stdout for stdout, _ in outputs), outputs
    report, other = outputs[0][1], outputs[1][1]
    assert "ranks 0-1 wait in forward of step 8" in report
    assert re.search(r"ranks 0-1 are at <string>:\d+ <module>", report)  # the all_reduce
    assert "rank 2 (host" in report
    assert "was last heard of" in report
    assert "who waits for whom" not in other


def test_the_timeout_of_every_group_is_lowered(tmp_path: Any) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=600))
    try:
        groups: list[Any] = [dist.group.WORLD, dist.new_group(), dist.new_group([0])]
        lower_timeout(7)
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        assert [backend.options._timeout for backend in backends] == [timedelta(seconds=7)] * 3
    finally:
        dist.destroy_process_group()
