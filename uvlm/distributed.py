"""Ranks: who am I, how many are we, and how to start some of us on this machine.

Three ways of starting are understood: torchrun and the `deepspeed` launcher, which set RANK, WORLD_SIZE and LOCAL_RANK,
and srun with one task per GPU, which says the same in words of its own. Variables that survive from another start are
what ruins such trainings: every process believes that it is rank 0, or trains alone. So whatever contradicts itself is
refused before anybody waits for anybody. Under srun alone each task asks Slurm's controller for one address, 13 to 31
ms (run, a controller of two nodes); with MASTER_ADDR set it asks nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int


def world() -> World:
    """This process's place: from RANK, WORLD_SIZE and LOCAL_RANK, else from srun's variables; alone without either.

    A shell of `salloc`, or a batch script, is alone: only an srun of several tasks starts ranks. ValueError where the
    variables contradict each other.
    """
    step = _place_in_step()
    rank, size, local_rank = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None and size is None and local_rank is None:
        place = step or World(0, 1, 0)
    else:
        if local_rank is None:
            local_rank = 0 if size == 1 else step.local_rank if step and step.size == size else None
        if rank is None or size is None or local_rank is None:
            raise ValueError(
                f"{_shown('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}: a launcher sets all three; unset them if they are left "
                "over from another start, or set what is missing"
            )
        place = World(rank, size, local_rank)
    _check(place, step)
    return place


def _place_in_step() -> World | None:
    """The place that srun gave this process, where it started several tasks.

    SLURM_NTASKS and SLURM_PROCID stand in a batch script too, which is one process; SLURM_STEP_NUM_TASKS does not.
    """
    size = _number("SLURM_STEP_NUM_TASKS")
    if size is None or size == 1:
        return None
    rank, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
    if rank is None or local_rank is None:
        raise ValueError(
            f"{_shown('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_LOCALID')}: srun sets all three; unset "
            "SLURM_STEP_NUM_TASKS to run alone"
        )
    return World(rank, size, local_rank)


def _check(place: World, step: World | None) -> None:
    """ValueError where the place contradicts itself, its node or the srun around it."""
    if not 0 <= place.rank < place.size:
        raise ValueError(
            f"RANK={place.rank} does not lie in a world of WORLD_SIZE={place.size}; unset both to run alone"
        )
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):  # torchrun's and DeepSpeed's word for it
        size = _number(name)
        if size is not None and not 0 <= place.local_rank < size:
            raise ValueError(
                f"LOCAL_RANK={place.local_rank} does not lie among the {name}={size} processes of a node; unset the "
                "one that is left over from another start"
            )
    if step is None:
        return
    # A torchrun per node inside of srun is in order: there, srun's tasks are the nodes.
    agents, nodes = _number("GROUP_WORLD_SIZE"), _number("SLURM_STEP_NUM_NODES")
    if _under_torchrun() and agents and nodes and agents < nodes:
        raise ValueError(
            f"srun started torchrun on SLURM_STEP_NUM_NODES={nodes} nodes, but it joins only GROUP_WORLD_SIZE={agents} "
            f"of them, so nodes would train apart; start it with --nnodes={nodes} on each"
        )
    if place.size < step.size:
        remedy = "unset RANK, WORLD_SIZE and LOCAL_RANK before srun"
        if _under_torchrun():
            remedy = "start one torchrun per node (srun --ntasks-per-node=1)"
        raise ValueError(
            f"srun started SLURM_STEP_NUM_TASKS={step.size} tasks, but WORLD_SIZE={place.size} with RANK={place.rank}, "
            f"so tasks would train apart; {remedy}"
        )
    if place.size == step.size and place.rank != step.rank and not _under_torchrun():
        raise ValueError(
            f"RANK={place.rank}, but srun's SLURM_PROCID={step.rank}, both of {place.size} processes; unset RANK, "
            "WORLD_SIZE and LOCAL_RANK before srun"
        )


def check_local_rank(told: int) -> None:
    """ValueError where `--local_rank`, which DeepSpeed's launcher adds, is not what the environment says."""
    if told != (known := world().local_rank):
        raise ValueError(
            f"--local_rank={told} contradicts LOCAL_RANK={known}; leave --local_rank to the `deepspeed` launcher, "
            "which sets both"
        )


def export_world() -> None:
    """Write place and meeting point into the environment, where torch and DeepSpeed read them; what is set stays.

    DeepSpeed needs all five variables: where one is missing it looks for MPI. ValueError where nobody said where to
    meet, or where the port that srun's tasks agree on is taken.
    """
    place = world()
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(place.local_rank))
    if place.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any free one
    elif _place_in_step() is not None:
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _address_of_first_node()
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port_of_step(must_be_free=place.rank == 0))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"WORLD_SIZE={place.size}, but {_shown('MASTER_ADDR', 'MASTER_PORT')}; set both to where rank 0 can be "
            "reached, or unset RANK, WORLD_SIZE and LOCAL_RANK to run alone"
        )


def _address_of_first_node() -> str:
    """The address of the step's first node, where rank 0 runs, as Slurm knows it: its name need not resolve."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        first, *_ = _scontrol("hostnames", nodes).split()
        found = re.search(r"\sNodeAddr=(\S+)", _scontrol("node", "-o", first))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ValueError(
            f"scontrol does not tell the address of the first node of {nodes!r} ({error}); set MASTER_ADDR to it "
            "before srun"
        ) from None
    return found[1] if found else first


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", "show", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def _port_of_step(must_be_free: bool) -> int:
    """A function of job and step alone, below the ports that Linux hands out: all ranks know it without talking.

    So none may evade to another port. Where it is taken, rank 0 says so, and srun ends the others. The factor of the
    step keeps steps of one job apart, which may run side by side, and off the ports of the next jobs.
    """
    job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
    port = 10000 + (job + 7919 * step) % 20000
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store: what only lingers is not in use
        try:
            if must_be_free:
                one.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port}, where the tasks of SLURM_JOB_ID={job} would meet, is taken ({error.strerror}); set "
                "MASTER_PORT to a free one before srun"
            ) from None
    return port


def device_index(num_devices: int) -> int:
    """Which of the GPUs that this process sees is its own; LOCAL_RANK is set to it, since DeepSpeed looks there.

    Where srun gives each task a GPU of its own (--gpus-per-task=1), that one is number 0 to every task. ValueError
    where LOCAL_RANK points beyond what is visible otherwise: ranks would share a GPU.
    """
    place, step = world(), _place_in_step()
    if place.local_rank < num_devices:
        return place.local_rank
    srun_alone = (
        step is not None and step.size == place.size and not _under_torchrun() and "LOCAL_SIZE" not in os.environ
    )
    if num_devices == 1 and srun_alone:
        os.environ["LOCAL_RANK"] = "0"
        return 0
    raise ValueError(
        f"LOCAL_RANK={place.local_rank}, but this process sees {num_devices} GPU(s) ("
        f"{_shown('CUDA_VISIBLE_DEVICES')}); start one process per GPU of the node, or srun with --gpus-per-task=1"
    )


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(name: str) -> int | None:
    """The whole number in this variable; None where it is not set."""
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} must be a whole number; unset it to run alone") from None


def _shown(*names: str) -> str:
    return ", ".join(f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set" for name in names)


def listed(ranks: Sequence[int]) -> str:
    """Ranks in ascending order as a reader wants them: "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


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
    with hold_signals():
        torchrun = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent)
    with torchrun:
        try:
            return torchrun.wait()
        except KeyboardInterrupt:  # a terminal sends it to torchrun too, which stops its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                torchrun.wait(timeout=10)
                raise
            torchrun.terminate()  # it was sent to us alone
            raise


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Around the start of a process: Python's handlers of SIGINT and SIGTERM run when the block has ended.

    Python drops an exception that a handler raises inside its hooks around fork; a command that its user has ended
    would go on (run: 1 of 59 signals sent within 80 ms of a fork).
    """
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        held = {}  # handlers run in the main thread alone
    for number in held:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


def end_with_parent() -> None:
    """Ask Linux to stop this process (a torchrun then stops its ranks) when the one that started it dies, even by kill
    -9: nobody trains on unseen."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_launcher() -> None:
    """In a rank: the same where torchrun or Slurm's step daemon is killed, which would leave it to train on unseen."""
    if _under_torchrun() or _place_in_step() is not None:
        end_with_parent()


def leave(code: int = 0) -> NoReturn:
    """End this process with an exit code, once exit handlers have run, without shutting the interpreter down.

    DeepSpeed keeps hold of process groups, so gloo's threads outlive `destroy_process_group`, and now and then one is
    destroyed while it runs: "terminate called without an active exception" (run; pytorch/pytorch#190489). A finished
    training must not look like a failed one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
