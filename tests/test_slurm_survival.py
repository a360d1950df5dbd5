"""A job that is hurt comes back by itself and ends with the curve of one that was left alone. Real Slurm, real ranks.

Slurm 22.05 looks at time limits every 30 s and may send its signal a minute early, and waits a minute for the tasks of
a step daemon that was killed: hence the minutes that these tests take.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import losses
from tests.slurm_lab import (
    Lab,
    eventually,
    kill_rank,
    kill_step_daemon,
    said,
    saved_step,
    trains,
)
from uvlm.life import EXIT_STOPPED

pytestmark = [pytest.mark.slurm, pytest.mark.kill]

ON_TWO_NODES = ("--nodes=2", "--gpus-per-node=1")


def attempts(run: Path) -> list[int]:
    """The step that each attempt of the first submission started from."""
    path = run / "jobs" / "001" / "attempts"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split("\t")[2]) for line in lines if line.startswith("begin")]


def assert_same_curve(run: Path, uninterrupted: Path, tolerance: float = 0.0) -> None:
    """Each step is there once and has the loss of the run that nothing happened to, beyond a restart too."""
    found, wanted = losses(run), losses(uninterrupted)
    assert list(found) == list(range(1, len(found) + 1))
    assert attempts(run)[1:] == [] or attempts(run)[1] < len(wanted)
    worst = max(abs(found[step] - wanted[step]) for step in found.keys() & wanted.keys())
    assert worst <= tolerance, f"off by {worst}\n{said(run)}"


def test_a_job_whose_time_is_over_saves_and_comes_back(
    slurm: Lab, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(
        config, f"run={run}", "optim.steps=800", "checkpoint.every=2000", "--time=2", "--stop-before=60", *ON_TWO_NODES
    )
    assert slurm.wait(job) == 0, said(run)
    first, second, *_ = attempts(run)
    assert first == 0
    assert 0 < second < 800, "the time limit is to end the first attempt: make the run longer"
    log = (run / "logs" / f"job_{job}.log").read_text()
    assert "the time limit is near: the ranks save and leave" in log
    assert "back to the queue for attempt 1" in log
    assert "SIGUSR2 was received" in (run / "logs" / f"job_{job}" / "attempt_0" / "rank_0000_n1.log").read_text()
    assert_same_curve(run, uninterrupted)


def test_a_job_survives_all_that_happens_to_it(slurm: Lab, config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(config, f"run={run}", "optim.steps=400", "checkpoint.every=10", *ON_TWO_NODES)

    def restarted(number: int) -> bool:
        return len(attempts(run)) > number

    hurt = {
        "scancel --signal": lambda: slurm.command("scancel", "--signal=USR2", job),
        "scontrol requeue": lambda: slurm.command("scontrol", "requeue", job),
        "preemption": lambda: slurm.command(
            "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
        ),
        "a killed rank": lambda: kill_rank(job, 1),
        "a killed step daemon": lambda: kill_step_daemon(job, 1),
        "a node set down": lambda: slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=test"),
    }
    for number, (what, do) in enumerate(hurt.items()):
        start = attempts(run)[-1] if number else 0
        eventually(lambda start=start: saved_step(run) > start, f"a checkpoint before {what}", run)  # type: ignore[misc]
        do()
        if what == "a node set down":
            slurm.command("scontrol", "update", "nodename=n2", "state=resume")
        eventually(lambda number=number: restarted(number + 1), f"a restart after {what}", run)  # type: ignore[misc]
    assert slurm.wait(job) == 0, said(run)
    starts = attempts(run)
    assert len(starts) == 1 + len(hurt)
    assert starts == sorted(set(starts)), "each attempt went on from a later step"
    assert_same_curve(run, uninterrupted)


def test_a_job_that_keeps_failing_ends_and_names_node_and_rank(slurm: Lab, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"run={run}", "optim.steps=100000", "checkpoint.every=5", "--max-restarts=1")
    job = slurm.submit(config, *words, *ON_TWO_NODES)
    for number in (0, 1):
        log = run / "logs" / f"job_{job}" / f"attempt_{number}" / "rank_0000_n1.log"
        eventually(lambda log=log: log.is_file() and "step " in log.read_text(), f"attempt {number}", run)  # type: ignore[misc]
        start = attempts(run)[-1]
        eventually(lambda start=start: saved_step(run) > start, "a checkpoint", run)  # type: ignore[misc]
        kill_rank(job, 1)
    assert slurm.wait(job) != 0
    verdict = (run / "logs" / f"job_{job}.log").read_text()
    assert "node n2, rank 1: Killed" in verdict
    assert "not again: this would be restart 2 after a failure, and --max-restarts is 1" in verdict
    assert len(attempts(run)) == 2


def test_a_stopped_run_goes_on_with_another_number_of_nodes(
    slurm: Lab, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(config, f"run={run}", "optim.steps=100000", "checkpoint.every=100000", *ON_TWO_NODES)
    eventually(trains(run, 10), "a step", run)
    assert f"job {job} for {run} is running" in slurm.uvlm("submit", run, "--nodes=1", "--gpus-per-node=1").stderr
    assert f"job {job} saves after its current step and ends" in slurm.uvlm("stop", run).stdout
    assert slurm.wait(job) == EXIT_STOPPED
    stopped = saved_step(run)
    assert stopped == max(losses(run))
    steps = stopped + 20
    job = slurm.submit(run, f"optim.steps={steps}", "--nodes=1", "--gpus-per-node=1")
    assert slurm.wait(job) == 0, said(run)
    assert max(losses(run)) == steps
    assert "1 rank(s)" in (run / "logs" / f"job_{job}" / "attempt_0" / "rank_0000_n1.log").read_text()
    assert_same_curve(run, uninterrupted, tolerance=1e-4)
