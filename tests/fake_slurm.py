"""Programs named as Slurm's commands, for tests without a Slurm: they write down how they were called, then do as told.

What they answer was recorded from a Slurm 22.05 unless a test says otherwise. A call costs a few milliseconds.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from uvlm.job_script import Request, render

# What a fake srun runs in order to be the task of rank 3, on the second node.
ONE_TASK = (
    "export SLURM_PROCID=3 SLURM_NODEID=1 SLURMD_NODENAME=n2 SLURM_CPUS_PER_TASK=4\n"
    'while [[ $1 != bash ]]; do shift; done; "$@"'
)

REQUEST = Request(nodes=2, gpus_per_node=1, time="1:00:00")
DEADLINE = 30  # seconds within which a machine under load gets anything done

# `sinfo --format=%P|%l|%D|%G` of a cluster of 4 nodes with 8 GPUs, 2 with 4, and 3 without.
SINFO = "gpu*|1-00:00:00|4|gpu:h100:8(S:0-1)\ngpu*|1-00:00:00|2|gpu:a100:4\ncpu|infinite|3|(null)"
TEST_ONLY = "sbatch: Job 41 to start at 2030-01-02T03:04:05 using 2 processors on nodes n[1-2] in partition gpu"


class FakeSlurm:
    """A folder with fake programs, to be put first on the PATH.

    Args:
        folder: is made; `self.bin` holds the programs and `self.state` what they were given.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.state = folder / "state"
        self.bin.mkdir(parents=True)
        self.state.mkdir()
        self.program("sinfo", _say(SINFO))
        self.program("squeue", "")
        self.program("scancel", "")
        self.knows("42")
        self.sbatch()

    def program(self, name: str, body: str) -> None:
        """Put a bash program there. It sees its arguments, and $state; argv and variables are recorded before."""
        path = self.bin / name
        path.write_text(
            f"#!/bin/bash\nstate={shlex.quote(str(self.state))}\n"
            f"""{{ printf '%s\\0' "$#" "$@"; }} >>"$state/{name}.argv"; env -0 >"$state/{name}.env"\n{body}\n"""
        )
        path.chmod(0o755)

    def sbatch(self, test_only: str = TEST_ONLY, submit: str = "42", *, refuses: str = "") -> None:
        """An sbatch that takes jobs; with `refuses` it takes them in `--test-only` alone, or not at all."""
        no = _say(submit, error=True) + "; exit 1" if refuses else _say(submit)
        maybe = _say(test_only, error=True) + ("; exit 1" if refuses == "--test-only" else "")
        self.program("sbatch", f'if [[ $1 == --test-only ]]; then cat >"$state/script"; {maybe}; else {no}; fi')

    def knows(self, *numbers: str) -> None:
        """An scontrol that can show these jobs and no other."""
        no = _say("slurm_load_jobs error: Invalid job id specified", error=True) + "; exit 1"
        self.program("scontrol", f"case $3 in {'|'.join(numbers)}) ;; *) {no} ;; esac")

    def answer(self, name: str, lines: str) -> None:
        """Let a program print this."""
        self.program(name, _say(lines))

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call so far."""
        path = self.state / f"{name}.argv"
        words = os.fsdecode(path.read_bytes()).split("\0")[:-1] if path.exists() else []
        found = []
        while words:
            num_arguments = int(words[0])
            found.append(words[1 : num_arguments + 1])
            words = words[num_arguments + 1 :]
        return found

    def variables(self, name: str) -> dict[str, str]:
        """The environment of the last call."""
        pairs = (item.partition("=") for item in (self.state / f"{name}.env").read_text().split("\0")[:-1])
        return {key: value for key, _, value in pairs}


def _say(text: str, error: bool = False) -> str:
    return f"printf '%s\\n' {shlex.quote(text)}" + " >&2" * error


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Returns when the condition holds; fails where the process ends first, or after the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None and not condition():
            raise AssertionError(f"it ended with {process.returncode} before: {process.communicate()}")
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def script_of(home: Path, *, template: str = "train.sbatch.j2", request: Request = REQUEST, **values: Any) -> str:
    arguments: dict[str, Any] = {"name": "name", "folder": home / "jobs" / "001", "command": ["program"]} | values
    return render(template, request, home=home, **arguments)


class Job:
    """A job folder with a rendered script; srun does what `ranks` says, in bash, with $home and $state."""

    def __init__(self, folder: Path, home: str = "my run", **values: Any) -> None:
        self.home = folder / home
        self.folder = self.home / "jobs" / "001"
        self.folder.mkdir(parents=True)
        self.here = folder / "here"  # where the script runs: whatever is injected would leave its file there
        self.here.mkdir()
        (self.folder / "env.sh").touch()
        self.slurm = FakeSlurm(folder / "slurm")
        self.slurm.program(
            "scontrol", 'case "$2" in hostnames) printf "n1\\nn2\\n" ;; node) echo "x NodeAddr=127.0.0.1 y" ;; esac'
        )
        self._process: subprocess.Popen[str] | None = None
        self.ranks(":")
        self.script = self.folder / "job.sbatch"
        self.script.write_text(script_of(self.home, **values))

    def ranks(self, body: str, remove_caches: str = "") -> None:
        """What the ranks of the next attempt do. `save N` leaves a checkpoint of step N; who comes to the end without
        an `exit` leaves a model."""
        self.slurm.program(
            "srun",
            f"home={shlex.quote(str(self.home))}\n"
            'save() { mkdir -p "$home/checkpoints/step_$1"; touch "$home/checkpoints/step_$1/state.json"; }\n'
            f'if [[ " $* " != *" --kill-on-bad-exit=1 "* ]]; then {remove_caches or ":"}; exit; fi\n{body}\n'
            'mkdir -p "$home/model"; touch -d "1 minute" "$home/model"',
        )

    def start(self, attempt: int = 0, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.slurm.bin}:{os.environ['PATH']}",
            "HOME": str(self.here),
            "TMPDIR": str(self.here),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "4",
            **({"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}),  # Slurm sets it from the first restart on
            **variables,
        }
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            ["bash", self.script],
            cwd=self.here,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        return self._process

    def end(self) -> None:
        """Kill what a failed test has left of the last attempt."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def run(self, attempt: int = 0, **variables: str) -> tuple[int, str]:
        """Exit code and what was said, of an attempt."""
        return ended(self.start(attempt, **variables))

    @property
    def was_requeued(self) -> bool:
        return ["requeue", "42"] in self.slurm.calls("scontrol")

    @property
    def outcomes(self) -> list[str]:
        """What became of each attempt that has ended."""
        lines = [line.split("\t") for line in (self.folder / "attempts").read_text().splitlines()]
        return [words[2] for words in lines if words[0] == "end"]

    @property
    def num_starts(self) -> int:
        return sum("--kill-on-bad-exit=1" in call for call in self.slurm.calls("srun"))


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, error = process.communicate(timeout=DEADLINE)
    assert error == ""
    return process.returncode, out


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A training's job; a module that uses it imports it and lists it in `__all__`."""
    job = Job(tmp_path)
    yield job
    job.end()
