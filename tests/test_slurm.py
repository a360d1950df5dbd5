"""`slurm/train.sbatch`, and srun without it, on a real Slurm: two nodes, started on this machine by `slurm_cluster.sh`.

Two tests train with the real `uvlm`. The others of train.sbatch exchange the program by the same means that a user has:
the cluster's `env.sh`, here one that puts a small `uvlm` first on the PATH. It really joins a gloo process group over
both nodes.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.corpus import write_corpus
from uvlm.metrics import read_records

pytestmark = pytest.mark.slurm

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
CLUSTER = TESTS / "slurm_cluster.sh"

# Each rank adds 1 over the whole job, then writes down what it was given.
RANK_PROGRAM = f"""#!{sys.executable}
import json, os, sys
import torch
import torch.distributed as dist

if "fail-on-second-node" in sys.argv and os.environ["SLURM_NODEID"] == "1":
    sys.exit(3)
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
keys = ("SLURMD_NODENAME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCH_EXTENSIONS_DIR")
seen = dict(argv=sys.argv[1:], total=int(total.item()), **{{key: os.environ[key] for key in keys}})
with open(os.path.join(os.environ["REPORT_FOLDER"], "rank" + os.environ["RANK"] + ".json"), "w") as file:
    json.dump(seen, file)
dist.barrier()
dist.destroy_process_group()
"""


class Job(NamedTuple):
    """A finished job: its exit status, its output, and one report per rank."""

    status: int
    output: str
    reports: list[dict]


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all sockets are open at once, so they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The slurm.conf of two idle nodes."""
    for program in ("slurmctld", "slurmd", "munge"):
        if shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") is None:
            pytest.skip(f"no {program} here; on Debian: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm with two nodes can be started by root only")
    folder = tmp_path_factory.mktemp("cluster")
    ports = [str(port) for port in free_ports(3)]
    try:
        subprocess.run(["bash", CLUSTER, "start", folder, *ports], check=True, timeout=60)
        yield folder / "slurm.conf"
    finally:
        subprocess.run(["bash", CLUSTER, "stop", folder], check=True, timeout=30)


def submit(
    conf: Path,
    folder: Path,
    arguments: list[str],
    options: tuple[str, ...] = ("--nodes=2",),
    program_text: str = RANK_PROGRAM,
) -> Job:
    """Submits train.sbatch from the folder as a user would, and waits until the job has ended."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "uvlm"
    program.write_text(program_text)
    program.chmod(0o755)
    (folder / "slurm").mkdir()
    shutil.copy(REPOSITORY / "slurm" / "env.sh", folder / "slurm")
    with (folder / "slurm" / "env.sh").open("a") as file:
        file.write(f"export PATH='{folder}/bin:{Path(sys.executable).parent}':$PATH UVLM_LOCAL_DISK='{folder}/local'\n")
    (folder / "local").mkdir()
    # gloo looks up this machine's name, which need not resolve
    environment = os.environ | {"SLURM_CONF": str(conf), "REPORT_FOLDER": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
    script = str(REPOSITORY / "slurm" / "train.sbatch")
    command = ["sbatch", "--parsable", "--output=out", *options, script, *arguments]
    job = subprocess.check_output(command, cwd=folder, env=environment, timeout=30, text=True).strip()
    waiting = ["bash", str(CLUSTER), "wait", str(conf.parent), job]
    status = int(subprocess.check_output(waiting, timeout=400))
    out = folder / "out"
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return Job(status, out.read_text() if out.exists() else "", reports)


# What `pip install` would put on the PATH.
REAL_PROGRAM = f"""#!/usr/bin/env bash
PYTHONPATH='{REPOSITORY}' exec '{sys.executable}' -m uvlm "$@"
"""


def test_a_real_training_runs_over_two_nodes(cluster: Path, tmp_path: Path) -> None:
    config = write_corpus(tmp_path / "corpus")
    job = submit(cluster, tmp_path, [str(config), "optim.steps=4"], program_text=REAL_PROGRAM)
    assert job.status == 0, job.output
    assert "2 rank(s)" in job.output
    records = [record for record in read_records(tmp_path / "corpus" / "run") if "loss/mean" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert (tmp_path / "corpus" / "run" / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "corpus" / "run" / "tensorboard").iterdir())


UGLY_ARGUMENTS = [
    "my config.yaml",
    "name=a b  c",
    "text='it''s' \"quoted\"",
    "x=1; touch split && exit",
    "y=$(touch ran)`touch ran`",
    "glob=*",
    "back\\slash",
    "",
    "--dash",
    "ünïcode",
]


@pytest.fixture(scope="module")
def finished(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """One job over two nodes that went well, and the folder it was submitted from."""
    folder = tmp_path_factory.mktemp("finished")
    job = submit(cluster, folder, UGLY_ARGUMENTS)
    assert job.status == 0, job.output
    return job, folder


def test_two_nodes_train_as_one_world(finished: tuple[Job, Path]) -> None:
    job, _ = finished
    assert [report["total"] for report in job.reports] == [2, 2], job.output
    assert [report["WORLD_SIZE"] for report in job.reports] == ["2", "2"]
    assert [report["SLURMD_NODENAME"] for report in job.reports] == ["n1", "n2"]


def test_arguments_reach_every_rank_unchanged_and_nothing_in_them_runs(finished: tuple[Job, Path]) -> None:
    job, folder = finished
    assert [report["argv"] for report in job.reports] == [["train", *UGLY_ARGUMENTS]] * 2
    assert not (folder / "ran").exists()
    assert not (folder / "split").exists()


def test_compiled_kernels_go_to_a_folder_of_the_node_that_is_removed_at_the_end(finished: tuple[Job, Path]) -> None:
    job, folder = finished
    caches = [Path(report["TORCH_EXTENSIONS_DIR"]).parent for report in job.reports]
    assert len(set(caches)) == 2
    assert all(cache.parent == folder / "local" for cache in caches)
    assert not any(cache.exists() for cache in caches)


def test_every_gpu_of_a_node_gets_a_process(cluster: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, ["config.yaml"], ("--nodes=2", "--gpus-per-node=2"))
    assert job.status == 0, job.output
    places = [(report["SLURMD_NODENAME"], report["LOCAL_RANK"]) for report in job.reports]
    assert places == [("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")]
    assert [report["total"] for report in job.reports] == [4, 4, 4, 4]


def test_a_port_that_somebody_else_holds_is_passed_over(cluster: Path, tmp_path: Path) -> None:
    taken = range(10000, 10040)  # where all jobs of this small cluster would meet
    with contextlib.ExitStack() as stack:
        for port in taken:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # held by yet somebody else, which serves as well
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier run's port may linger
                listener.bind(("127.0.0.1", port))
                listener.listen()
        job = submit(cluster, tmp_path, ["config.yaml"])
    assert job.status == 0, job.output
    assert {int(report["MASTER_PORT"]) for report in job.reports}.isdisjoint(taken)


def test_one_failing_node_ends_the_job_everywhere(cluster: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, ["config.yaml", "fail-on-second-node"])
    assert job.status != 0
    assert "exitcode  : 3" in job.output  # the second node's own failure is what the log shows
    assert job.reports == []  # the first node, alone in the rendezvous, would wait there for half an hour


def test_a_job_without_config_is_refused_with_the_command_to_type(cluster: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, [])
    assert job.status == 2
    assert "sbatch --nodes=N slurm/train.sbatch CONFIG" in job.output


def test_a_missing_env_file_is_named(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UVLM_ENV", str(tmp_path / "nowhere.sh"))
    job = submit(cluster, tmp_path, ["config.yaml"])
    assert job.status == 2
    assert str(tmp_path / "nowhere.sh") in job.output


def srun(conf: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two tasks, one on each node, of `python ARGUMENTS`, without train.sbatch and torchrun."""
    environment = os.environ | {"SLURM_CONF": str(conf), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, *arguments]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_srun_alone_trains_over_two_nodes(cluster: Path, tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    result = srun(cluster, "-m", "uvlm", "train", str(config), "optim.steps=3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("2 rank(s)") == 1
    records = [record for record in read_records(tmp_path / "run") if "loss/mean" in record]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_ranks_left_over_in_the_environment_of_srun_are_refused(cluster: Path, tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    result = srun(cluster, "-m", "uvlm", "train", str(config), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert result.returncode != 0  # that of the task that was refused first, or of the other that srun then ended
    assert "error: srun started SLURM_STEP_NUM_TASKS=2 tasks, but WORLD_SIZE=1 with RANK=0" in result.stderr
    assert not (tmp_path / "run").exists()


WHERE_TASKS_MEET = """
import os, time
from uvlm.distributed import export_world, world
try:
    export_world()
except ValueError as error:
    raise SystemExit(str(error))
if world().rank:
    time.sleep(600)  # as long as a rank waits for the first one
print(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
"""


def test_a_taken_port_ends_srun_with_a_sentence(cluster: Path) -> None:
    with contextlib.ExitStack() as stack:
        for port in range(10000, 10200):  # where all jobs of this small cluster would meet
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", port))
                listener.listen()
        result = srun(cluster, "-c", WHERE_TASKS_MEET)
    assert result.returncode != 0
    assert "is taken (Address already in use); set MASTER_PORT to a free one before srun" in result.stderr


def test_a_batch_script_of_several_tasks_is_one_process_without_srun(cluster: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\n{sys.executable} -c 'import uvlm.distributed as d; print(d.world())'\n")
    environment = os.environ | {"SLURM_CONF": str(cluster), "PYTHONPATH": str(REPOSITORY)}
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks=2", f"--output={tmp_path / 'out'}", str(script)]
    job = subprocess.check_output(command, env=environment, timeout=30, text=True).strip()
    subprocess.run(["bash", CLUSTER, "wait", cluster.parent, job], check=True, timeout=60, capture_output=True)
    assert (tmp_path / "out").read_text() == "World(rank=0, size=1, local_rank=0)\n"
