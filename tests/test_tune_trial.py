"""A trial of `uvlm tune`: whatever becomes of its processes, it is one sentence, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.tune_worker import HUNG, KILLED
from uvlm import tune as tuning
from uvlm import tune_search, tune_trial
from uvlm.check import check
from uvlm.config import load_config
from uvlm.tune_search import LAST, Journal
from uvlm.tune_space import setting_of
from uvlm.tune_trial import Outcome, Place, run_trial

RATES = {"step_seconds": [2.0, 1.0], "tokens": [100, 80], "peak_bytes": 7, "num_too_long": 1}
DEVICE = {"device": "a device", "device_bytes": 9}


@dataclass(frozen=True)
class Scripted(Place):
    """Ranks that are a Python script instead; it finds the trial's folder in sys.argv[1]."""

    script: str = ""

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-c", self.script, str(folder)]


def writing(**ranks: dict[str, Any]) -> str:
    """A script that leaves these files of ranks."""
    return "import json, os, pathlib, signal, sys, time, subprocess\n" + "".join(
        f"pathlib.Path(sys.argv[1], '{name}.json').write_text({json.dumps(json.dumps(tree))})\n"
        for name, tree in ranks.items()
    )


def failure(folder: Path, script: str, deadline: float = 60.0) -> str:
    outcome = run_trial(folder, Scripted(2, script=script), 1.0, deadline)
    assert outcome.rates == []
    return str(outcome.failure)


def test_a_trial_counts_the_tokens_of_all_ranks_over_the_slowest_ones_time(tmp_path: Path) -> None:
    slow = {**RATES, **DEVICE, "step_seconds": [1.0, 4.0], "peak_bytes": 8}
    script = writing(rank_0={**RATES, **DEVICE}, rank_1=slow)
    outcome = run_trial(tmp_path, Scripted(2, script=script), 1.0, 60.0)
    assert outcome.failure is None
    assert outcome.rates == [200 / 2.0, 160 / 4.0]
    assert outcome.step_seconds == [2.0, 4.0]
    assert outcome.peak_bytes == [7, 8]
    assert outcome.num_too_long == 2
    assert (outcome.device, outcome.device_bytes) == ("a device", 9)


LOST = {**DEVICE, "failure": "RuntimeError: [gloo] Connection closed by peer", "time": 1.0}


def test_a_rank_that_is_killed_is_named_though_others_only_miss_it(tmp_path: Path) -> None:
    script = writing(rank_0=LOST, rank_1=DEVICE) + "sys.exit(137)"
    assert failure(tmp_path, script) == "rank 1 killed (SIGKILL; out of memory?)"


def test_of_several_silent_ranks_the_one_that_the_launcher_names_was_killed(tmp_path: Path) -> None:
    script = writing(rank_0=DEVICE, rank_1=DEVICE) + "print('rank 1 was ended by SIGKILL; and so on'); sys.exit(137)"
    assert failure(tmp_path, script) == "rank 1 killed (SIGKILL; out of memory?)"


def test_an_exit_code_of_who_only_missed_a_killed_rank_is_not_told_as_its_own(tmp_path: Path) -> None:
    script = writing(rank_0=LOST, rank_1=DEVICE) + "sys.exit(1)"
    assert failure(tmp_path, script) == f"rank 1 killed (out of memory?), for rank 0 says: {LOST['failure']}"


def test_the_first_rank_that_failed_gives_the_reason(tmp_path: Path) -> None:
    first = {"failure": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB", "time": 1.0}
    later = {"failure": "RuntimeError: Connection closed by peer", "time": 2.0}
    script = writing(rank_0=later, rank_1=first) + "sys.exit(1)"
    assert failure(tmp_path, script).startswith("out of memory: rank 1: OutOfMemoryError: CUDA out of memory")


def test_where_no_rank_left_a_word_the_end_of_the_log_is_told(tmp_path: Path) -> None:
    script = "import sys; print('something before'); sys.exit('no such thing')"
    assert failure(tmp_path, script) == "exit code 1: something before | no such thing"
    assert "no such thing" in (tmp_path / "log").read_text()


def test_what_an_earlier_try_left_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "rank_0.json").write_text(json.dumps({**RATES, **DEVICE}))
    (tmp_path / "rank_1.json").write_text(json.dumps({**RATES, **DEVICE}))
    assert failure(tmp_path, "pass").startswith("exit code 0")


def test_a_trial_that_hangs_is_ended_with_all_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_trial, "_GRACE", 0.5)
    script = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
time.sleep(600)
"""
    assert failure(tmp_path, script, deadline=3.0).startswith("hung: no result within 3 s")
    assert ended(int((tmp_path / "child").read_text()))


def test_a_lock_that_a_killed_build_left_goes_with_it_and_none_of_other_jobs(tmp_path: Path) -> None:
    left, passed_on, of_another = (tmp_path / name for name in ("left", "passed_on", "of_another"))
    script = f"""
import os, pathlib, signal, sys
from torch.utils.file_baton import FileBaton
from uvlm.tune_trial import note_locks
note_locks(pathlib.Path(sys.argv[1]))
locks = [FileBaton({str(left)!r}), FileBaton({str(passed_on)!r})]
assert all(lock.try_acquire() for lock in locks)
assert not FileBaton({str(left)!r}).try_acquire()
locks[1].release()
for path in ({str(passed_on)!r}, {str(of_another)!r}):
    open(path, "w").close()  # by another job, while the trial goes on
os.kill(os.getpid(), signal.SIGKILL)
"""
    failure(tmp_path, script)
    assert not left.exists()
    assert passed_on.exists()
    assert of_another.exists()


def test_in_a_slurm_allocation_srun_starts_all_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    place = Place.of_environment(None)
    assert (place.nproc, place.num_nodes, place.num_ranks, place.in_slurm) == (4, 2, 8, True)
    command = place.command(tmp_path)
    assert command[0] == "srun"
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8", "--kill-on-bad-exit=1"} <= {*command}
    assert command[-3:] == ["-m", "uvlm.tune_trial", str(tmp_path)]


def test_a_search_that_a_launcher_started_several_times_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="starts the ranks itself; run it once"):
        Place.of_environment(2)


def test_without_gpus_the_number_of_ranks_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="give --nproc, such as 2"):
        Place.of_environment(None)
    assert Place.of_environment(2) == Place(2)


def test_the_winner_is_used_where_it_was_measured_and_replaces_what_the_user_had_said(config: Path) -> None:
    winner, out = setting_of(load_config(config), 1), Path("/out")

    def command(place: Place) -> list[str]:
        return tuning.command("my.yaml", ["data.num_rows=64", "seed=3"], winner, place, out)

    rest = ["seed=3", *winner.overrides, "deepspeed=/out/best.json"]
    assert any(word.startswith("data.num_rows=") for word in winner.overrides)
    assert command(Place(1)) == ["uvlm", "train", "my.yaml", *rest]
    assert command(Place(2)) == ["uvlm", "launch", "my.yaml", "--nproc=2", *rest]
    in_slurm = command(Place(8, num_nodes=4, in_slurm=True))
    assert in_slurm == ["uvlm", "submit", "my.yaml", "--nodes=4", "--gpus-per-node=8", *rest]


@pytest.mark.slow
def test_a_search_goes_on_when_a_trial_is_killed_and_another_hangs(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real ranks; started from a poor setting."""
    monkeypatch.setattr(tune_search, "_FIRST_SECONDS", 0.5)
    monkeypatch.setattr(tune_search, "NUM_REPEATS", 1)  # each is a start of processes
    monkeypatch.setattr(tune_search, "MAX_REPEATS", 1)
    poor = tmp_path / "poor.json"
    poor.write_text(
        json.dumps(
            {
                "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
                "zero_optimization": {
                    "stage": 3,
                    "overlap_comm": False,
                    "reduce_bucket_size": 1000,
                    "stage3_param_persistence_threshold": 0,
                },
            }
        )
    )
    run, out = tmp_path / "run", tmp_path / "out"
    loaded = load_config(config, [f"run={run}", f"deepspeed={poor}", "recompute=full", "data.num_rows=8"])
    lines: list[str] = []
    place = Place(2, module="tests.tune_worker")

    def impatient(folder: Path, place: Place, seconds: float, deadline: float) -> Outcome:
        if int(folder.name) == HUNG:  # enough to come as far as the killed one, and no longer
            deadline = 2 * Journal(out / "trials.jsonl").records[KILLED].outcome.seconds
        return run_trial(folder, place, seconds, deadline)

    monkeypatch.setattr(tuning, "run_trial", impatient)
    words, winner = tuning.tune(loaded, place, out, 0.1, None, lines.append)
    journal = Journal(out / "trials.jsonl")
    killed, hung = journal.records[KILLED].outcome.failure, journal.records[HUNG].outcome.failure
    assert killed == "rank 1 killed (SIGKILL; out of memory?)", (out / "trials" / f"{KILLED:04d}" / "log").read_text()
    assert hung is not None
    assert hung.startswith("hung: no result within")
    assert "tune_worker.py" in (out / "trials" / f"{HUNG:04d}" / "log").read_text()  # where it stood
    last = [record for record in journal.records if record.rung == LAST and record.rate]
    assert len(last) >= 2
    assert "useful tokens/s" in words
    text = (out / "report.md").read_text()
    assert killed in text
    assert hung in text
    assert not run.exists()  # nothing of the user's is written
    assert [*out.glob("trials/*/run")] == []
    resolved = load_config(config, [f"run={run}", *(out / "overrides.txt").read_text().split()])
    assert resolved.data.pack_tokens * resolved.data.num_rows == loaded.data.pack_tokens * loaded.data.num_rows
    assert json.loads(resolved.deepspeed.read_text()) == winner.tree
    check(resolved, place.num_ranks)


@pytest.mark.slow
def test_the_command_stops_at_request_and_goes_on_where_it_was(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    once = "from uvlm import cli, tune_search as t; t.NUM_REPEATS = t.MAX_REPEATS = 1; cli.main()"
    words = [sys.executable, "-c", once, "tune", str(config), f"run={tmp_path / 'run'}", "data.num_rows=2"]
    words += ["--nproc=2", "--budget=0.1", f"--out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        assert first.stdout
        said = [next(first.stdout)]
        while "trial 1," not in said[-1]:
            said.append(next(first.stdout))
        while not (rank := rank_process_of(first.pid)):  # the next trial runs
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        said += first.stdout.readlines()
        assert first.wait(60) == 130, said
    assert any("run the same command again" in line for line in said)
    assert ended(rank.pid)
    before = (out / "trials.jsonl").read_text()
    assert len(before.splitlines()) >= 2
    again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (out / "trials.jsonl").read_text().startswith(before)
    assert "trial 0," not in again.stdout
    assert f"uvlm launch {config} --nproc=2 run=" in again.stdout
    assert yaml.safe_load((out / "best.json").read_text())["zero_optimization"]["stage"] in (1, 2, 3)


def ended(process: int) -> bool:
    """Whether it has ended, though nobody may have asked for its exit code."""
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def rank_process_of(command: int) -> psutil.Process | None:
    """Rank 0 of the trial that runs below a process id; None where there is none."""
    for child in psutil.Process(command).children(recursive=True):
        try:
            if "uvlm.tune_trial" in child.cmdline() and child.environ().get("RANK") == "0":
                return child
        except psutil.Error:
            continue
    return None
