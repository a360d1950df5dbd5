"""From `uvlm submit` to a finished run on a real Slurm: two nodes on this machine, real ranks, gloo between them.

What needs neither a cluster nor a rank is in test_submit, test_attempts, test_job_script and their neighbours.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from data_pipeline.split import Split
from tests.corpus import losses, write_corpus
from tests.slurm_lab import REPOSITORY, UGLY, Lab, eventually, said, tasks, trains
from tests.test_schema import make_document
from tests.test_tokenize import png, write_shards
from uvlm.life import EXIT_STOPPED
from uvlm.metrics import read_records

pytestmark = pytest.mark.slurm


def test_a_training_runs_over_two_nodes_to_its_end(uninterrupted: Path, slurm: Lab) -> None:
    """Its run folder is named by all that a shell could trip over; see conftest."""
    found = losses(uninterrupted)
    assert list(found) == list(range(1, 601)), said(uninterrupted)
    assert found[600] < found[1] - 1
    assert (uninterrupted / "model" / "model.safetensors").is_file()
    assert list((uninterrupted / "tensorboard").iterdir())
    (logs,) = (uninterrupted / "logs").glob("job_*/attempt_0")
    assert sorted(path.name for path in logs.iterdir()) == ["rank_0000_n1.log", "rank_0001_n2.log", "srun.log"]
    rank_0 = (logs / "rank_0000_n1.log").read_text()
    assert "preflight: 2 ranks on 2 nodes agree" in rank_0
    assert "2 rank(s)" in rank_0
    assert (uninterrupted / "logs" / "rank_0.log").read_text() == rank_0
    status = slurm.uvlm("status", uninterrupted).stdout
    assert "not in the queue any more; restarts: 0" in status
    assert "step       600, loss " in status
    assert status.rstrip().endswith("finished")


def test_nothing_in_a_name_or_an_argument_was_run(uninterrupted: Path) -> None:
    """The folder's name and the name of the run hold `touch` commands, quoted and not."""
    everything = {path.name for folder in (uninterrupted.parent, REPOSITORY, Path.home()) for path in folder.iterdir()}
    assert everything.isdisjoint({"ran", "split"})
    submitted = yaml.safe_load((uninterrupted / "jobs" / "001" / "config.yaml").read_text())
    assert submitted["run"] == str(uninterrupted)
    assert submitted["validation"]["prompts"] == [UGLY]


def test_every_gpu_gets_a_rank_and_kernels_go_to_the_disk_of_the_node(slurm: Lab, config: Path, tmp_path: Path) -> None:
    """On a machine where somebody else holds the ports at which the first jobs would meet."""
    run, local = tmp_path / "run", tmp_path / "local disk"
    local.mkdir()
    env = tmp_path / "env of the 'cluster'.sh"
    env.write_text(f'export SBATCH_PARTITION=test SBATCH_TIMELIMIT=30\nexport UVLM_LOCAL_DISK="{local}"\n')
    taken = range(10000, 10100)
    with contextlib.ExitStack() as stack:
        for port in taken:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # held by yet somebody else, which serves as well
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier run's port may linger
                listener.bind(("127.0.0.1", port))
                listener.listen()
        words = (f"run={run}", "optim.steps=2", f"--env={env}", "--nodes=2", "--gpus-per-node=2")
        job = slurm.submit(config, *words)
        eventually(lambda: len(tasks(job)) == 4, "the start of 4 ranks", run)
        places = [process.environ() for process in tasks(job)]
        folders = {path.name for path in local.iterdir()}
        assert slurm.wait(job) == 0, said(run)
    assert [(p["SLURMD_NODENAME"], p["SLURM_LOCALID"]) for p in places] == [
        ("n1", "0"),
        ("n1", "1"),
        ("n2", "0"),
        ("n2", "1"),
    ]
    assert {int(p["MASTER_PORT"]) for p in places}.isdisjoint(taken)
    assert folders == {f"uvlm-{job}-0-0", f"uvlm-{job}-0-1"}
    assert {Path(p["TRITON_CACHE_DIR"]).parent.name for p in places} == folders
    assert {Path(p["TORCH_EXTENSIONS_DIR"]).parent.name for p in places} == folders
    assert list(local.iterdir()) == [], "they are removed at the end"
    assert list(losses(run)) == [1, 2]


def test_a_chain_of_tokenizing_training_and_evaluating_ends_well_though_a_task_was_killed(
    slurm: Lab, config: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a 'b' ; c"
    folder.mkdir()
    documents = [
        make_document(
            f"{number:06d}", (None, "what color is it?", " red"), image_bytes={"0.png": png(number)}, codes={}
        )
        for number in range(32)
    ]
    shards = write_shards(folder / "shards", documents)
    tokens, tokenizer = folder / "tokens", config.parent / "tokenizer"
    words = (
        "--min-psnr=0",
        "--tasks=4",
        "--gpus-per-node=0",
        "--sbatch=--hold",
    )  # or it ends while the rest is submitted
    array = slurm.submit("submit-tokenize", shards, tokens, f"--tokenizer={tokenizer}", *words)
    training = slurm.submit(
        config,
        f"run={folder / 'run'}",
        f"data.train=[{{path: {json.dumps(str(tokens))}}}]",
        "data.valid=[]",
        "optim.steps=2",
        "--nodes=1",
        "--gpus-per-node=1",
        f"--after={array}",
    )
    evaluation = slurm.submit(
        "submit-eval", folder / "run", f"--shards={tokens}", "--gpus-per-node=0", f"--after={training}"
    )
    home = folder / "tokens.jobs"
    slurm.command("scontrol", "release", array)

    def victims() -> list[psutil.Process]:
        """Of the task whose own number is that of the array: requeueing by it would start all of them again."""
        return tasks(array, SLURM_ARRAY_TASK_ID="3")

    eventually(victims, "the start of task 3", home)
    for process in victims():
        process.send_signal(signal.SIGKILL)
    assert slurm.wait(evaluation) == 0, said(home) + said(folder / "run")
    begun = [(home / "jobs" / "001" / f"attempts_{task}").read_text().count("begin") for task in range(4)]
    assert begun == [1, 1, 1, 2]
    assert len(Split.open(tokens)) == 32
    assert list(losses(folder / "run")) == [1, 2]
    (log,) = (folder / "run" / "logs" / f"job_{evaluation}" / "attempt_0").glob("rank_0000_*.log")
    assert "answer accuracy" in log.read_text()


REFUSED = {
    "there is no partition 'gold' here; give --partition one of test, urgent": ["--partition=gold"],
    "--gpus-per-node 3 is more than a node of partition test has; its nodes have 2": ["--gpus-per-node=3"],
    "--time 2:00:00 is above the limit of partition urgent, 1 hours": ["--partition=urgent", "--time=2:00:00"],
    "--nodes 5 is more than partition test has: 2 with 1 GPUs": ["--nodes=5"],
    "checkpoint.every=10 steps of 100 s take 1,000 s": ["--time=0:20:00", "--step-seconds=100"],
    "/nowhere has no manifest.json, so it is no finished folder of shards": ["data.train=[{path: /nowhere}]"],
    "Slurm refuses the job: Invalid feature specification": ["--sbatch=--constraint=none_has_it"],
    "data.num_rows=5 does not divide over 2 ranks": ["data.num_rows=5"],
}


@pytest.mark.parametrize(("sentence", "words"), REFUSED.items())
def test_what_cannot_run_is_refused_before_the_queue(
    sentence: str, words: list[str], slurm: Lab, config: Path, tmp_path: Path
) -> None:
    result = slurm.uvlm("submit", config, f"run={tmp_path / 'run'}", "--nodes=2", "--gpus-per-node=1", *words)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert slurm.command("squeue", "--noheader") == ""
    assert not (tmp_path / "run").exists()


def test_the_commands_of_the_readme_for_a_cluster_work(slurm: Lab, config: Path, tmp_path: Path) -> None:
    known = {"my.yaml": str(config), "runs/mine": str(tmp_path / "run"), "8": "1"}
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    submit, status, stop = (line.split() for line in lines if line.startswith(("    uvlm s",)))
    more = [f"run={tmp_path / 'run'}", "optim.steps=100000"]
    job = slurm.submit(*[known.get(word, word) for word in submit[2:]], *more)
    eventually(trains(tmp_path / "run", 0), "a step", tmp_path / "run")
    shown = slurm.uvlm(*[known.get(word, word) for word in status[1:]])
    assert f"job {job} RUNNING on n[1-2]" in shown.stdout
    assert f"job {job} saves after its current step" in slurm.uvlm(*[known.get(word, word) for word in stop[1:]]).stdout
    assert slurm.wait(job) == EXIT_STOPPED, said(tmp_path / "run")


def test_a_job_that_is_cancelled_does_not_come_back_though_its_time_was_nearly_over(
    slurm: Lab, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(config, f"run={run}", "optim.steps=1000", "--nodes=1", "--gpus-per-node=1")
    eventually(trains(run, 0), "a step", run)
    slurm.command("scancel", "--batch", "--signal=USR2", job)  # as Slurm does when the time limit is near
    eventually(lambda: "the time limit is near" in said(run), "the signal", run)
    slurm.command("scancel", job)
    slurm.wait(job)
    assert slurm.command("squeue", "--noheader") == ""
    assert (run / "jobs" / "001" / "attempts").read_text().count("begin") == 1
    assert "Slurm ended this attempt: cancelled" in said(run)


def test_a_waiting_job_that_is_stopped_leaves_the_queue(slurm: Lab, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(config, f"run={run}", "--nodes=1", "--gpus-per-node=1", "--sbatch=--begin=now+1day")
    assert f"job {job} PENDING (BeginTime)" in slurm.uvlm("status", run).stdout
    assert f"job {job} was pending and is cancelled" in slurm.uvlm("stop", run).stdout
    slurm.wait(job)
    assert slurm.command("squeue", "--noheader") == ""
    assert (run / "STOP").exists()


def srun(slurm: Lab, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two tasks, one on each node, of `python ARGUMENTS`, as somebody starts them who does not use `uvlm submit`."""
    command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, *arguments]
    return subprocess.run(
        command, env=slurm.environment | variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_srun_alone_trains_over_two_nodes(slurm: Lab, tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    result = srun(slurm, "-m", "uvlm", "train", str(config), "optim.steps=3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("2 rank(s)") == 1
    records = [record for record in read_records(tmp_path / "run") if "loss/mean" in record]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_ranks_left_over_in_the_environment_of_srun_are_refused(slurm: Lab, tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    result = srun(slurm, "-m", "uvlm", "train", str(config), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
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


def test_a_taken_port_ends_srun_with_a_sentence(slurm: Lab) -> None:
    with contextlib.ExitStack() as stack:
        for port in range(10000, 10200):  # where all jobs of this small cluster would meet
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", port))
                listener.listen()
        result = srun(slurm, "-c", WHERE_TASKS_MEET)
    assert result.returncode != 0
    assert "is taken (Address already in use); set MASTER_PORT to a free one before srun" in result.stderr


def test_a_batch_script_of_several_tasks_is_one_process_without_srun(slurm: Lab, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\n{sys.executable} -c 'import uvlm.distributed as d; print(d.world())'\n")
    job = slurm.command("sbatch", "--parsable", "--nodes=2", "--ntasks=2", f"--output={tmp_path / 'out'}", script)
    assert slurm.wait(job.strip()) == 0
    assert (tmp_path / "out").read_text() == "World(rank=0, size=1, local_rank=0)\n"
