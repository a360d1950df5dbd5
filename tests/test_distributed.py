"""A process knows its place under torchrun, srun and DeepSpeed's launcher, and leftovers of another start are refused.

The `deepspeed` launcher is run for real, on this machine as one node and as two that were started one by one
(--no_ssh). Its way over pdsh and ssh is not: it ends in the same command on each node. srun is run in test_slurm.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from tests.corpus import write_corpus
from tests.slurm_lab import free_ports
from uvlm import torchrun
from uvlm.cli import app
from uvlm.distributed import World, device_index, export_world, world
from uvlm.metrics import read_records

MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
TORCHRUN |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
# What a task of `srun -N2 -n4` sees of interest, and a batch script of `sbatch -n4` (Slurm 22.05).
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NODELIST": "n[0-7]", "SLURM_JOB_ID": "20007", "SLURM_STEP_ID": "0"}
BATCH = {"SLURM_JOB_ID": "20007", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def _nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what started the tests; everything that a test exports is forgotten after it."""
    for name in {*MEETING, *TORCHRUN, *SRUN, *BATCH, "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"}:
        monkeypatch.setenv(name, "")  # so that even a variable that is set by the code is put back
        monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, *environments: dict[str, str]) -> None:
    for environment in environments:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)


def _failed(monkeypatch: pytest.MonkeyPatch, seconds_by_code: dict[int, int]) -> int:
    """The exit code of our torchrun where ranks 0, 1 ... ended with these codes, so long after the first."""
    failures = {}
    for rank, (code, seconds) in enumerate(seconds_by_code.items()):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        failures[rank].timestamp = seconds

    def main(arguments: object) -> None:
        raise ChildFailedError("ranks", failures)

    monkeypatch.setattr(torchrun, "main", main)
    monkeypatch.setattr("logging.disable", lambda level: None)
    return torchrun._quiet_main()


def test_a_killed_rank_is_the_cause_though_one_that_misses_it_is_seen_to_end_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _failed(monkeypatch, {1: 0, -signal.SIGKILL: 2}) == 128 + signal.SIGKILL
    assert capsys.readouterr().err.startswith("rank 1 was ended by SIGKILL")
    assert _failed(monkeypatch, {1: 0, -signal.SIGTERM: 0}) == 1, "torchrun itself has ended the other"
    assert _failed(monkeypatch, {1: 0, -signal.SIGKILL: 30}) == 1, "the same, of one that did not listen"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of this name for two nodes that answers in Slurm's words."""
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '"show hostnames n[1-2]") echo n1; echo n2 ;;\n'
        '"show node -o n1") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1 Port=6818" ;;\n'
        "*) exit 1 ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world() == World(0, 1, 0)
    export_world()
    assert [os.environ[name] for name in MEETING] == ["0", "1", "0", "127.0.0.1", "0"]


@pytest.mark.parametrize("environment", [BATCH, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_a_batch_script_and_a_step_of_one_task_are_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, environment)
    assert world() == World(0, 1, 0)


def test_the_place_under_torchrun_is_the_one_it_gives_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, TORCHRUN)
    assert world() == World(5, 8, 1)
    export_world()
    assert [os.environ[name] for name in MEETING] == ["5", "8", "1", "n1", "29500"]


def test_one_torchrun_per_node_inside_of_srun_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, TORCHRUN)
    assert world() == World(5, 8, 1)
    # One process per node: as many ranks as tasks, and torchrun may number the nodes in its own way.
    _set(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert world() == World(0, 2, 0)


@pytest.mark.usefixtures("scontrol")
def test_srun_alone_starts_ranks_that_agree_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN)
    assert world() == World(3, 4, 1)
    export_world()
    assert [os.environ[name] for name in MEETING] == ["3", "4", "1", "10.1.2.3", "10007"]
    assert world() == World(3, 4, 1)
    export_world()  # a second time changes nothing


@pytest.mark.usefixtures("scontrol")
def test_steps_of_a_job_and_the_jobs_after_it_meet_at_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in range(20007, 20057):
        for step in range(4):
            monkeypatch.delenv("MASTER_PORT", raising=False)
            _set(monkeypatch, SRUN, {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "MASTER_ADDR": "n1"})
            export_world()
            ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 200
    assert min(ports) >= 10000
    assert max(ports) < 30000


def test_a_meeting_point_that_the_user_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN, {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "4711"})
    export_world()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("elsewhere", "4711")


def test_ranks_that_srun_and_a_wrapper_name_alike_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN, {"RANK": "3", "WORLD_SIZE": "4"})
    assert world() == World(3, 4, 1)


def test_without_scontrol_the_remedy_is_to_name_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _set(monkeypatch, SRUN, {"PATH": str(tmp_path)})
    with pytest.raises(ValueError, match=r"first node of 'n\[1-2\]'.*set MASTER_ADDR to it before srun"):
        export_world()


@pytest.mark.usefixtures("scontrol")
def test_nodes_that_scontrol_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN, {"SLURM_STEP_NODELIST": "m[1-2]"})
    with pytest.raises(ValueError, match=r"'m\[1-2\]'.*set MASTER_ADDR"):
        export_world()


def test_a_taken_port_is_refused_by_the_rank_that_must_listen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        for port in range(10000, 30000):
            try:
                listener.bind(("", port))
                break
            except OSError:
                continue
        listener.listen()
        _set(monkeypatch, SRUN, {"SLURM_JOB_ID": str(port - 10000), "MASTER_ADDR": "127.0.0.1"})
        export_world()  # rank 3 only connects
        assert os.environ["MASTER_PORT"] == str(port)
        for name in MEETING[:3] + MEETING[4:]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_PROCID", "0")
        with pytest.raises(ValueError, match=f"port {port}.*is taken.*set MASTER_PORT to a free one before srun"):
            export_world()


CONTRADICTIONS: dict[str, tuple[dict[str, str], str]] = {
    "no RANK": ({"WORLD_SIZE": "4"}, r"RANK is not set, WORLD_SIZE=4, LOCAL_RANK is not set: .* unset them"),
    "no WORLD_SIZE": ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1, WORLD_SIZE is not set, LOCAL_RANK=1"),
    "only LOCAL_RANK": ({"LOCAL_RANK": "1"}, "RANK is not set"),
    "no LOCAL_RANK": ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set: a launcher sets all three"),
    "no RANK under srun": ({**SRUN, "WORLD_SIZE": "4"}, "RANK is not set, WORLD_SIZE=4"),
    "no number": ({**TORCHRUN, "RANK": "two"}, "RANK='two' must be a whole number; unset it"),
    "empty": ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID='' must be a whole number"),
    "rank beyond the world": ({**TORCHRUN, "RANK": "8"}, "RANK=8 does not lie in a world of WORLD_SIZE=8; unset both"),
    "negative rank": ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 does not lie"),
    "local rank beyond torchrun's node": (
        {**TORCHRUN, "LOCAL_RANK": "4"},
        "LOCAL_RANK=4 does not lie among the LOCAL_WORLD_SIZE=4 processes",
    ),
    "local rank beyond DeepSpeed's node": ({**TORCHRUN, "LOCAL_SIZE": "1"}, "LOCAL_RANK=1 .* LOCAL_SIZE=1 processes"),
    "left over from a start alone": (
        {**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        "SLURM_STEP_NUM_TASKS=4 tasks, but WORLD_SIZE=1 with RANK=0, so tasks would train apart; unset RANK",
    ),
    "more tasks than torchrun has ranks": (
        {**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "16"},
        "SLURM_STEP_NUM_TASKS=16 tasks, but WORLD_SIZE=8 .* start one torchrun per node",
    ),
    "left over from a start of as many": (
        {**SRUN, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        "RANK=0, but srun's SLURM_PROCID=3, both of 4 processes; unset RANK, WORLD_SIZE and LOCAL_RANK before srun",
    ),
    "a torchrun of its own on each node": (
        {**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"},
        "SLURM_STEP_NUM_NODES=2 nodes, but it joins only GROUP_WORLD_SIZE=1 of them.*--nnodes=2",
    ),
    "half of srun's words": ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set.*unset SLURM_STEP_NUM_TASKS"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_variables_that_contradict_each_other_are_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, sentence = CONTRADICTIONS[name]
    _set(monkeypatch, environment)
    with pytest.raises(ValueError, match=sentence) as raised:
        world()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_that_do_not_know_where_to_meet_are_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, TORCHRUN)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"WORLD_SIZE=8, but .*{missing} is not set"):
        export_world()


def test_each_process_of_a_node_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, TORCHRUN)
    assert device_index(4) == 1
    assert "LOCAL_RANK" in os.environ


def test_a_task_to_which_srun_gave_one_gpu_takes_that_and_says_so_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, SRUN, {"MASTER_ADDR": "n1", "MASTER_PORT": "4711"})
    export_world()
    assert device_index(1) == 0
    assert os.environ["LOCAL_RANK"] == "0"
    assert world() == World(3, 4, 0)


@pytest.mark.parametrize(
    ("environment", "num_devices"),
    [
        (TORCHRUN, 1),  # its processes see the same GPU
        ({**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, 1),
        ({**SRUN, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, 1),
        ({**SRUN, "SLURM_LOCALID": "2"}, 2),
    ],
)
def test_ranks_that_would_share_a_gpu_are_refused(
    environment: dict[str, str], num_devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(monkeypatch, environment, {"CUDA_VISIBLE_DEVICES": "6"})
    with pytest.raises(ValueError, match=rf"LOCAL_RANK=\d, .* {num_devices} GPU.*CUDA_VISIBLE_DEVICES=6.*one process"):
        device_index(num_devices)


def test_the_option_of_deepspeeds_launcher_must_agree_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, TORCHRUN)
    refused = CliRunner().invoke(app, ["--local_rank=0", "train", "no.yaml"])
    assert str(refused.exception).startswith("--local_rank=0 contradicts LOCAL_RANK=1;")
    accepted = CliRunner().invoke(app, ["--local_rank=1", "train", "no.yaml"])
    assert "no.yaml" in str(accepted.exception)  # the command is reached
    assert "local_rank" not in CliRunner().invoke(app, ["--help"]).output


def _deepspeed(folder: Path, hosts: str, port: int, *options: str) -> subprocess.Popen[str]:
    """The launcher, training three steps of the corpus in FOLDER; `timeout` ends its whole process group."""
    (folder / "hosts").write_text(hosts)
    command = ["timeout", "--kill-after=10", "280", str(Path(sys.executable).parent / "deepspeed")]
    command += [f"--hostfile={folder / 'hosts'}", "--master_addr=127.0.0.1", f"--master_port={port}", *options]
    command += ["--module", "uvlm", "train", str(folder / "config.yaml"), "optim.steps=3"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _trained_by_two_ranks(folder: Path, outputs: list[str]) -> None:
    assert "2 rank(s)" in "".join(outputs), outputs
    records = [record for record in read_records(folder / "run") if "loss/mean" in record]
    assert [record["step"] for record in records] == [1, 2, 3]


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_on_the_slots_of_a_hostfile(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    launcher = _deepspeed(tmp_path, "localhost slots=2\n", free_ports(1)[0], "--no_ssh_check")
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    _trained_by_two_ranks(tmp_path, [output])


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_over_two_nodes_that_are_started_one_by_one(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    hosts, port = "n1 slots=1\nn2 slots=1\n", free_ports(1)[0]
    nodes = [_deepspeed(tmp_path, hosts, port, "--no_ssh", f"--node_rank={node}") for node in range(2)]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    _trained_by_two_ranks(tmp_path, outputs)
