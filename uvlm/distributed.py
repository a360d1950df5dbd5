"""Ranks: who am I, how many are we, and how to start some of us on this machine.

Any launcher that sets torchrun's variables works. Collectives here are the few that the trainer itself needs; those of
ZeRO belong to DeepSpeed (engine.py).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int


def world() -> World:
    """This process's place, from torchrun's variables; alone where there are none."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError("srun started several tasks without telling them their ranks; use slurm/train.sbatch")
    values = {name: os.environ.get(name, default) for name, default in _ALONE.items()}
    try:
        place = World(int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"]))
    except ValueError:
        raise ValueError(f"rank variables must be whole numbers, found {values}; unset them to run alone") from None
    if not 0 <= place.rank < place.size:
        raise ValueError(
            f"RANK={place.rank} does not lie in a world of WORLD_SIZE={place.size}; unset both to run alone"
        )
    return place


_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def be_alone_unless_launched() -> None:
    """Give this process the rank variables of a world of one where no launcher has set them; port 0 is any free one."""
    for name, default in {**_ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, default)


def prepare_environment() -> None:
    """Set what must be set before torch is imported; what the user has set stays."""
    # By default OpenMP threads spin while they wait. Beside any other busy process that is ruinous: two threads on two
    # cores encoded 51 images/s spinning and 804 waiting passively (measured next to one busy process).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A folder of our own: a start killed while it compiles leaves a lock behind that others would wait on for ever.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "uvlm" / "torch_extensions"))
    scripts = str(Path(sys.executable).parent)  # ninja lives there, also when nobody activated the environment
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `uvlm ARGUMENTS` on this machine with torchrun, cores shared out evenly. Returns its exit code."""
    environment = dict(os.environ)
    num_cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_processes)))
    command = [sys.executable, "-m", "uvlm.torchrun", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "uvlm", *arguments]
    with subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent) as torchrun:
        try:
            return torchrun.wait()
        except KeyboardInterrupt:  # a terminal sends it to torchrun too, which stops its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                torchrun.wait(timeout=10)
                raise
            torchrun.terminate()  # it was sent to us alone
            raise


def _end_with_parent() -> None:
    """Ask Linux to stop torchrun (and torchrun its ranks) when we die, even by kill -9: nobody trains on unseen."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_torchrun() -> None:
    """In a rank: the same where torchrun itself is killed. Other launchers look after their processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()


def leave() -> NoReturn:
    """End this process with exit code 0, once exit handlers have run, without shutting the interpreter down.

    DeepSpeed keeps hold of process groups, so gloo's threads outlive `destroy_process_group`, and now and then one is
    destroyed while it runs: "terminate called without an active exception" (run; pytorch/pytorch#190489). A finished
    training must not look like a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
