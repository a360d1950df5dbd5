"""A real Slurm of two nodes on this machine, the `uvlm` command line against it, and ways to hurt its jobs."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.corpus import losses
from uvlm.checkpoint_files import complete

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
CLUSTER = TESTS / "slurm_cluster.sh"
PATIENCE = 240.0  # seconds that anything may take that should happen at once; nothing is measured by it

# What a shell could trip over, as the name of a folder and in an argument.
UGLY = "my run; touch split && 'it''s' \"quoted\" $(touch ran) `touch ran` * %j ünï"


class Lab(NamedTuple):
    """The cluster. `environment` is that of a user at its login node."""

    conf: Path
    environment: dict[str, str]

    def command(self, *words: str | Path) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.check_output(
            [str(word) for word in words], env=self.environment, timeout=60, text=True, stderr=subprocess.STDOUT
        )

    def uvlm(self, *words: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`uvlm WORDS`, from this folder if given."""
        return subprocess.run(
            [sys.executable, "-m", "uvlm", *(str(word) for word in words)],
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def submit(self, *words: str | Path) -> str:
        """The number of the job that `uvlm submit WORDS` put into the queue; more of uvlm by the first word."""
        first = words[0] if str(words[0]).startswith("submit") else "submit"
        result = self.uvlm(first, *[word for word in words if word != first])
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("job ")
        return result.stdout.split()[1]

    def wait(self, job: str) -> int:
        """Until the job has ended for good; its exit status."""
        waiting = ["bash", str(CLUSTER), "wait", str(self.conf.parent), job]
        return int(subprocess.check_output(waiting, env=self.environment, timeout=480))

    def clear(self) -> None:
        """End all jobs, and have both nodes up."""
        user = str(os.geteuid())
        self.command("scancel", f"--user={user}")
        resume = ["scontrol", "update", "nodename=n[1-2]", "state=resume"]  # an error where they are up already
        subprocess.run(resume, env=self.environment, capture_output=True, timeout=60, check=False)
        eventually(lambda: not self.command("squeue", "--noheader"), "an empty queue", self.conf.parent)


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all sockets are open at once, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(folder: Path) -> Iterator[Lab]:
    """Two idle nodes, n1 and n2, until the generator is closed; skips where they cannot be had."""
    for program in ("slurmctld", "slurmd", "munge"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None:
            pytest.skip(f"no {program} here; on Debian: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm with two nodes can be started by root only")
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",  # gloo looks up this machine's name, which need not resolve
        "UVLM_ENV": str(folder / "env.sh"),
    }
    # Compiled once for all tests. What a job does without it: test_slurm.
    extensions = Path.home() / ".cache" / "uvlm" / "torch_extensions"
    (folder / "env.sh").write_text(f"export TORCH_EXTENSIONS_DIR={shlex.quote(str(extensions))}\n")
    try:
        ports = [str(port) for port in free_ports(3)]
        subprocess.run(["bash", CLUSTER, "start", folder, *ports], check=True, timeout=60)
        yield Lab(folder / "slurm.conf", environment)
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=True, timeout=60)


def eventually(holds: Callable[[], object], what: str, run: Path) -> None:
    """Returns once it holds; where it never does, the test fails with what the job says."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen\n{said(run)}"
        time.sleep(0.1)


def said(run: Path) -> str:
    """All logs of a run: of its batch scripts, of srun and of the ranks."""
    files = sorted(path for path in (run / "logs").rglob("*.log") if path.is_file())
    return "\n".join(f"== {path.relative_to(run)}\n{path.read_text(errors='replace')[-4000:]}" for path in files)


def trains(run: Path, beyond: int) -> Callable[[], bool]:
    """Whether a step beyond this one is recorded."""
    return lambda: max(losses(run), default=0) > beyond


def saved_step(run: Path) -> int:
    """The step of the newest complete checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in complete(run / "checkpoints")), default=0)


def tasks(job: str, **variables: str) -> list[psutil.Process]:
    """The Python processes that srun has started for this job, by rank, where these variables are set."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            place = process.environ()
            wanted = {"SLURM_JOB_ID": job, **variables}
            is_one = "SLURM_PROCID" in place and process.parent().name().startswith("slurmstepd")
            if is_one and "uvlm" in process.cmdline() and all(place.get(key) == wanted[key] for key in wanted):
                found[int(place["SLURM_PROCID"])] = process
    return [found[rank] for rank in sorted(found)]


def kill_rank(job: str, rank: int) -> None:
    tasks(job)[rank].send_signal(signal.SIGKILL)


def kill_step_daemon(job: str, rank: int) -> None:
    """Kill the slurmstepd that looks after this rank."""
    parent = tasks(job)[rank].parent()
    assert parent is not None
    assert parent.name().startswith("slurmstepd")
    parent.send_signal(signal.SIGKILL)
