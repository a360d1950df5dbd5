"""Slurm's commands, and the only file that calls them for a user: sbatch, sinfo, squeue, scancel; and env.sh.

Slurm is the judge of a request; what it answers is often one sentence for five reasons ("Requested node configuration
is not available"). So what can be compared is compared with `sinfo` first, and named with both numbers. Each call is
one short process (10 to 20 ms, run) and is given its arguments as a list: nothing passes through a shell.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from uvlm.job_script import Request, seconds, template_folder

# What Slurm answers (before the colon of its reasons) and what helps. The first that fits: an answer about policy names
# time limits too.
_REMEDIES = {
    "unable to contact": "its controller does not answer; wait, and run the same command again",
    "timed out": "its controller does not answer; wait, and run the same command again",
    "dependency problem": "give --after the numbers of jobs that Slurm still knows (`squeue --me` lists them)",
    "invalid account": "give --account one that may use this partition (`sacctmgr show assoc user=$USER` lists them)",
    "invalid qos": "give --qos one that your account has (`sacctmgr show assoc user=$USER format=qos` lists them)",
    "invalid feature": "give a --constraint that nodes have (`sinfo -o '%R %f'` lists them)",
    "node configuration is not available": "ask for less per node, or for another partition (`sinfo -Nel` shows nodes)",
    "accounting/qos policy": "ask for less, or for another --qos or --account (`sacctmgr show qos` shows the limits)",
    "time limit": "give a --time that the partition allows (`sinfo -o '%R %l'` shows it)",
}

# What env.sh may set of the request, by sbatch's own variables, and the option that it becomes.
_ENV_OPTIONS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
}


class Partition(NamedTuple):
    name: str
    is_default: bool
    max_seconds: float
    nodes_by_gpus: dict[int, int]  # number of nodes for each number of GPUs on a node


class Job(NamedTuple):
    """A job that Slurm still knows: `reason` says why it waits, `left` what remains of its time, `start` when Slurm
    expects or saw it start."""

    state: str
    reason: str
    nodes: str
    left: str
    start: str


def find_env(given: Path | None) -> Path:
    """The cluster's env.sh: the one given, that of UVLM_ENV, slurm/env.sh here, or the shipped one, which sets nothing.

    ValueError where the first two name a file that is not there.
    """
    named = given or (Path(os.environ["UVLM_ENV"]) if os.environ.get("UVLM_ENV") else None)
    if named is None:
        here = Path("slurm/env.sh")
        return here if here.is_file() else template_folder() / "env.sh"
    if not named.is_file():
        raise ValueError(
            f"there is no {named}; give --env (or UVLM_ENV) the env.sh of this cluster, made from slurm/env.sh"
        )
    return named


def env_options(env_file: Path) -> dict[str, str]:
    """Options of sbatch that env.sh sets, as {"partition": "gpu"}. Runs the file, as the job does, in its own shell.

    ValueError where it fails, or sets an SBATCH_ variable that is not passed on.
    """
    # The file's path is an argument of the shell, not part of its text, and absolute: `source` looks for a bare name on
    # the PATH first. The job stops at a command that fails, so this does too.
    show = 'for name in "${!SBATCH_@}"; do unset "$name"; done; set -eo pipefail; source "$1" >&2; exec env -0'
    done = subprocess.run(
        ["bash", "-c", show, "env.sh", str(env_file.absolute())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(
            f"{env_file} fails here ({said[-1] if said else 'without a word'}); mend it, the job runs it too"
        )
    if not done.stdout:
        raise ValueError(f"{env_file} ends the shell that reads it (`exit`?), so the job would end there; remove that")
    pairs = (item.partition("=") for item in done.stdout.split("\0"))
    found = {name: value for name, _, value in pairs if name.startswith("SBATCH_")}
    if unknown := sorted(found.keys() - _ENV_OPTIONS.keys()):
        raise ValueError(
            f"{env_file} sets {unknown[0]}, which is not passed on; remove it and give --sbatch=--OPTION=VALUE, or use "
            f"one of {', '.join(_ENV_OPTIONS)}"
        )
    return {_ENV_OPTIONS[name]: value for name, value in found.items()}


def partitions() -> dict[str, Partition]:
    """The partitions of the cluster, by name."""
    found: dict[str, Partition] = {}
    for line in _run(["sinfo", "--all", "--noheader", "--format=%P|%l|%D|%G"]).splitlines():
        name, limit, count, gres = line.split("|", 3)
        is_default, name = name.endswith("*"), name.removesuffix("*")
        max_seconds = float("inf") if limit == "n/a" else seconds(limit)
        partition = found.setdefault(name, Partition(name, is_default, max_seconds, {}))
        gpus = sum(int(number) for number in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        partition.nodes_by_gpus[gpus] = partition.nodes_by_gpus.get(gpus, 0) + int(count)
    return found


def check_request(request: Request, known: dict[str, Partition]) -> None:
    """ValueError where no partition that was named can ever give what is asked, with what it could give."""
    names = request.partition.split(",") if request.partition else [p.name for p in known.values() if p.is_default]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"there is no partition {unknown[0]!r} here; give --partition one of {', '.join(sorted(known))}"
        )
    reasons = [reason for name in names if (reason := _lacks(known[name], request))]
    if names and len(reasons) == len(names):
        raise ValueError("; ".join(reasons))


def _lacks(partition: Partition, request: Request) -> str:
    """Why the partition cannot give it; empty where it can."""
    most_gpus = max(partition.nodes_by_gpus, default=0)
    if request.gpus_per_node > most_gpus:
        return (
            f"--gpus-per-node {request.gpus_per_node} is more than a node of partition {partition.name} has; its nodes "
            f"have {most_gpus}: give --gpus-per-node {most_gpus} and more --nodes, or another --partition"
        )
    nodes = sum(number for gpus, number in partition.nodes_by_gpus.items() if gpus >= request.gpus_per_node)
    if request.nodes > nodes:
        gpus = f" with {request.gpus_per_node} GPUs" if request.gpus_per_node else ""
        return (
            f"--nodes {request.nodes} is more than partition {partition.name} has: {nodes}{gpus}; give --nodes {nodes} "
            "or fewer, or another --partition"
        )
    if request.time and seconds(request.time) > partition.max_seconds:
        hours = partition.max_seconds / 3600
        return (
            f"--time {request.time} is above the limit of partition {partition.name}, {hours:g} hours; give less, the "
            "job goes back to the queue by itself when its time is over"
        )
    return ""


def expected_start(script: str) -> str:
    """When Slurm would start this script, by `sbatch --test-only`; ValueError where it would refuse it."""
    answer = _sbatch(["sbatch", "--test-only"], script)
    found = re.search(r"to start at (\S+)", answer)
    return found[1] if found else answer


def submit(script: Path) -> str:
    """Put the script into the queue; the number of the job. ValueError where Slurm refuses it."""
    return _sbatch(["sbatch", "--parsable", str(script)]).split(";")[0]  # on a federation ";" and the cluster follow


def jobs(numbers: Sequence[str]) -> dict[str, Job]:
    """Those of the jobs that wait or run, by number; of a job array, its first task that does."""
    if not numbers:
        return {}
    found: dict[str, Job] = {}
    # One question for all the user's jobs: squeue answers with an error if asked for one that is over and forgotten.
    for line in _run(["squeue", "--me", "--noheader", "--format=%A|%F|%T|%r|%N|%L|%S"]).splitlines():
        number, of_array, *rest = line.split("|")
        for name in {number, of_array} & set(numbers):
            found.setdefault(name, Job(*rest))
    return found


def check_known(numbers: Sequence[str]) -> None:
    """ValueError where a number is none of a job that Slurm knows: Slurm would not wait for it at all."""
    for number in numbers:
        if not number.isdecimal():
            raise ValueError(f"--after {number!r} is no number of a job; give one, and --after again for another")
        try:
            _run(["scontrol", "show", "job", number])
        except ValueError as error:
            if "invalid job id" not in str(error).lower():
                raise
            raise ValueError(
                f"--after {number}: Slurm knows no such job; give the number that `uvlm submit` printed, or leave "
                "--after out where it has ended well (Slurm forgets jobs after some minutes)"
            ) from None


def cancel(number: str) -> None:
    """End the job, whatever it does; a waiting one leaves the queue."""
    _run(["scancel", number])


def _sbatch(command: list[str], script: str | None = None) -> str:
    try:
        return _run(command, script)
    except ValueError as error:
        answer = str(error)
    raise ValueError(f"Slurm refuses the job: {answer}; {_remedy(answer) or 'change the request'}")


def _remedy(answer: str) -> str:
    return next((remedy for words, remedy in _REMEDIES.items() if words in answer.lower()), "")


def _run(command: list[str], stdin: str | None = None) -> str:
    """What the command answers. ValueError with what it complained of where it fails or is not there.

    A request is what stands in its script: variables that would change it or an answer, that an allocation around this
    process or another start of ranks has left, or that name folders for kernels here (cli.main does) do not reach it.
    """
    foreign = (
        r"(SBATCH|SINFO|SQUEUE|SCANCEL)_.*|SLURM_(?!CONF$).*|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|"
        r"CUDA_VISIBLE_DEVICES|DS_ACCELERATOR|TORCH_EXTENSIONS_DIR|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR"
    )
    environment = {name: value for name, value in os.environ.items() if not re.fullmatch(foreign, name)}
    try:
        done = subprocess.run(
            command, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    except FileNotFoundError:
        raise ValueError(f"there is no {command[0]} command here; run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} gave no answer within two minutes; see `squeue --me`, and try again") from None
    if done.returncode:
        lines = [
            re.sub(r"^(sbatch|sinfo|squeue|scancel|scontrol): (error: |fatal: )?", "", line)
            for line in done.stderr.splitlines()
        ]
        answer = "; ".join(line.removeprefix("allocation failure: ") for line in lines if line) or "no reason"
        if command[0] == "sbatch":
            raise ValueError(answer)
        raise ValueError(
            f"{command[0]} fails: {answer}; {_remedy(answer) or 'is this where the cluster is used from?'}"
        )
    return done.stdout.strip() or done.stderr.strip()  # --test-only speaks on standard error
