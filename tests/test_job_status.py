"""`uvlm status` and `uvlm stop`: what they say of a run, and what they ask of Slurm. squeue and scancel are fake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fake_slurm import REQUEST, FakeSlurm
from tests.submitting import slurm
from uvlm.job_status import status, stop

__all__ = ["slurm"]  # a fixture

RUNNING = "42|42|RUNNING|None|n[1-2]|59:01|2030-01-01T00:00:00"
PENDING = "42|42|PENDING|Priority||1:00:00|2030-01-02T03:04:05"


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run that was submitted once, as job 42, and has begun twice."""
    run = tmp_path / "my run"
    submitted(run, 1, "42")
    (run / "config.yaml").touch()
    (run / "jobs" / "001" / "attempts").write_text("begin\t0\t0\tnow\tn1\nend\t0\tstopped\nbegin\t1\t10\tnow\tn1\n")
    return run


def submitted(home: Path, number: int, job: str, kind: str = "train") -> None:
    folder = home / "jobs" / f"{number:03d}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"job": job, "kind": kind, "request": REQUEST._asdict()}))


def test_a_running_job_is_shown_with_its_nodes_time_and_restarts(run: Path, slurm: FakeSlurm) -> None:
    slurm.answer("squeue", RUNNING)
    assert status(run) == [
        "train      job 42 RUNNING on n[1-2], 59:01 left; restarts: 1",
        "checkpoint none yet",
    ]


def test_a_waiting_job_is_shown_with_its_reason_and_expected_start(run: Path, slurm: FakeSlurm) -> None:
    slurm.answer("squeue", PENDING)
    line = "train      job 42 PENDING (Priority), expected to start at 2030-01-02T03:04:05; restarts: 1"
    assert status(run)[0] == line
    slurm.answer("squeue", "42|42|PENDING|Dependency||1:00:00|N/A")
    assert status(run)[0] == "train      job 42 PENDING (Dependency); restarts: 1"


def test_a_job_that_has_left_the_queue_is_shown_as_that(run: Path) -> None:
    assert status(run)[0] == "train      job 42, not in the queue any more; restarts: 1"


def test_of_several_submissions_those_in_the_queue_and_the_last_are_shown(run: Path, slurm: FakeSlurm) -> None:
    for number, job in ((2, "43"), (10, "51"), (9, "50")):
        submitted(run, number, job)
    slurm.answer("squeue", "43|43|PENDING|Priority||1:00|N/A")
    shown = [line for line in status(run) if line.startswith("train")]
    assert [line.split(",")[0].split(" (")[0] for line in shown] == ["train      job 43 PENDING", "train      job 51"]


def test_the_restarts_of_all_tasks_of_an_array_are_added(tmp_path: Path, slurm: FakeSlurm) -> None:
    home = tmp_path / "out.jobs"
    submitted(home, 1, "42", "tokenize")
    for task, num_attempts in enumerate([3, 1, 2]):
        lines = [f"begin\t{n}\tunknown\tnow\tn1\nend\t{n}\tfailed\n" for n in range(num_attempts)]
        (home / "jobs" / "001" / f"attempts_{task}").write_text("".join(lines))
    slurm.answer("squeue", "44|42|RUNNING|None|n1|1:00|N/A")
    assert status(home) == ["tokenize   job 42 RUNNING on n1, 1:00 left; restarts: 3"]


def test_of_an_array_only_tasks_that_have_not_finished_are_told_with_the_reason(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    home = tmp_path / "out.jobs"
    submitted(home, 1, "42", "tokenize")
    (home / "logs" / "job_42_1" / "attempt_10").mkdir(parents=True)
    (home / "logs" / "job_42_0.log").write_text("uvlm: attempt 0\nuvlm: finished\n")
    assert status(home)[1:] == ["job logs   1 tasks finished"]
    failed = home / "logs" / "job_42_1.log"
    failed.write_text("uvlm: attempt 10\nnoise\nuvlm: not again\n")
    (home / "logs" / "job_42_1" / "attempt_10" / "rank_0000_n1.log").write_text("noise\nerror: no such shard\n")
    told = [f"job log    {failed}", *(f"{'':<10} {line}" for line in ("attempt 10", "not again"))]
    assert status(home)[1:] == [*told, f"{'':<10} rank_0000_n1.log: error: no such shard"]
    slurm.answer("squeue", "44|42|RUNNING|None|n1|1:00|N/A")
    assert status(home)[1:] == told  # while it runs, logs of a thousand ranks are not searched


def test_steps_checkpoints_events_and_the_last_words_of_the_job_are_shown(run: Path, slurm: FakeSlurm) -> None:
    slurm.answer("squeue", RUNNING)
    records = [{"step": n, "loss/mean": 2.5, "speed/tokens_per_second": 12345.6} for n in (1199, 1200)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in [*records, {"step": 1201, "valid": 1}]))
    for name in ("step_00000010", "step_00000020"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints" / "step_00000010" / "state.json").write_text('{"format": 1}')
    events = [{"time": f"T{n}", "event": f"event {n}"} for n in range(5)]
    lines = [*map(json.dumps, events[:4]), '{"time": "T', json.dumps(events[4])]  # one was cut by a crash
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    (run / "model").mkdir()
    log = run / "logs" / "job_42.log"
    log.parent.mkdir()
    log.write_text("noise\n" + "".join(f"uvlm: said {n}\nslurmstepd: noise\n" for n in range(5)))
    (run / "logs" / "rank_0.log").symlink_to("job_42/attempt_1/rank_0000_n1.log")
    assert status(run)[1:] == [
        "step       1,200, loss 2.500, 12,346 tokens/s",
        "checkpoint step_00000010, 0 minutes old",
        f"model      {run}/model",
        "event      T3 event 3",
        "event      T4 event 4",
        f"rank 0 log {run}/logs/rank_0.log",
        f"job log    {log}",
        "           said 2",
        "           said 3",
        "           said 4",
    ]


def test_a_job_that_can_never_start_is_shown_with_the_remedy(run: Path, slurm: FakeSlurm) -> None:
    slurm.answer("squeue", "42|42|PENDING|DependencyNeverSatisfied||1:00:00|N/A")
    line = "train      job 42 will never start, as a job of --after failed or was stopped; `uvlm stop` it"
    assert status(run)[0] == line


def test_the_reason_that_a_rank_of_the_last_attempt_gave_is_shown(run: Path, slurm: FakeSlurm) -> None:
    for attempt in (2, 9, 10):
        folder = run / "logs" / "job_42" / f"attempt_{attempt}"
        folder.mkdir(parents=True)
        (folder / "rank_0000_n1.log").write_text("step 1\n")
        (folder / "rank_0001_n2.log").write_text(f"error: first\nerror: of attempt {attempt}\nnoise\n")
    (run / "logs" / "job_42.log").write_text("uvlm: failed\n")
    assert status(run)[-2:] == ["           failed", "           rank_0001_n2.log: error: of attempt 10"]


def test_a_damaged_record_of_a_submission_is_named(run: Path, slurm: FakeSlurm) -> None:
    record = run / "jobs" / "001" / "job.json"
    for damaged in ("", '{"job": "4', "[1]"):
        record.write_text(damaged)
        with pytest.raises(ValueError, match=r"/jobs/001/job\.json is damaged; remove its folder once `squeue"):
            status(run)


def test_a_folder_for_which_nothing_was_submitted_is_refused(tmp_path: Path, slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match=r"^nothing was submitted for .*; `uvlm submit` does that$"):
        status(tmp_path)
    (tmp_path / "config.yaml").touch()  # of something else
    with pytest.raises(ValueError, match=r"is no run folder; give the folder that `uvlm train` or `uvlm submit` print"):
        stop(tmp_path)
    assert not (tmp_path / "STOP").exists()


def test_a_running_job_is_asked_to_save_and_is_not_cancelled(run: Path, slurm: FakeSlurm) -> None:
    slurm.answer("squeue", RUNNING)
    assert stop(run) == [f"job 42 saves after its current step and ends; `uvlm status {run}` shows it"]
    assert (run / "STOP").exists()
    assert slurm.calls("scancel") == []


@pytest.mark.parametrize(("queue", "now", "state"), [(PENDING, False, "pending"), (RUNNING, True, "running")])
def test_a_waiting_job_is_cancelled_and_a_running_one_on_demand(
    run: Path, slurm: FakeSlurm, queue: str, now: bool, state: str
) -> None:
    slurm.answer("squeue", queue)
    assert stop(run, now) == [f"job 42 was {state} and is cancelled"]
    assert slurm.calls("scancel") == [["42"]]
    assert (run / "STOP").exists()  # for a job that goes back to the queue in this moment


@pytest.mark.parametrize("kind", ["eval", "tokenize"])
def test_running_work_that_has_nothing_to_save_is_cancelled_beside_a_training_that_saves(
    run: Path, slurm: FakeSlurm, kind: str
) -> None:
    submitted(run, 2, "43", kind)
    slurm.answer("squeue", f"{RUNNING}\n43|43|RUNNING|None|n1|1:00|N/A")
    assert stop(run)[1:] == ["job 43 was running and is cancelled"]
    assert slurm.calls("scancel") == [["43"]]


def test_STOP_is_there_before_Slurm_is_asked_what_runs(run: Path, slurm: FakeSlurm) -> None:
    slurm.program("squeue", f"test -e '{run}/STOP' && touch \"$state/was_there\"")
    stop(run)
    assert (slurm.state / "was_there").exists()


def test_a_training_outside_of_Slurm_is_stopped_by_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue here
    (tmp_path / "config.yaml").touch()
    (tmp_path / "environment.txt").touch()
    assert stop(tmp_path) == [
        f"no job of {tmp_path} waits or runs; what was started otherwise finds {tmp_path / 'STOP'} and saves, then ends"
    ]
    assert (tmp_path / "STOP").exists()
