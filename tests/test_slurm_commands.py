"""What is asked of Slurm's commands, and what the answers become: a sentence with a remedy. All commands are fake."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm
from uvlm.job_script import Request
from uvlm.slurm_commands import (
    Partition,
    cancel,
    check_known,
    check_request,
    env_options,
    expected_start,
    find_env,
    jobs,
    partitions,
    submit,
)

SCRIPT = Path("job.sbatch")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


# -- what sinfo says


def test_partitions_are_read_with_their_limits_and_the_gpus_of_their_nodes(slurm: FakeSlurm) -> None:
    assert partitions() == {
        "gpu": Partition("gpu", True, 86400, {8: 4, 4: 2}),
        "cpu": Partition("cpu", False, float("inf"), {0: 3}),
    }


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu:8(S:0-1)", 8),
        ("gpu:h100:8(S:0,2-3)", 8),
        ("nvme:1,gpu:a100:4", 4),
        ("gpu:a100:3(S:0),gpu:1g.5gb:14(S:0)", 17),
        ("craynetwork:4", 0),
    ],
)
def test_gpus_of_all_kinds_on_a_node_are_added(slurm: FakeSlurm, gres: str, gpus: int) -> None:
    slurm.answer("sinfo", f"p|30:00|2|{gres}\np|30:00|1|{gres}")
    assert partitions() == {"p": Partition("p", False, 1800, {gpus: 3})}


# -- what no partition can give

KNOWN = {
    "gpu": Partition("gpu", True, 86400, {8: 4, 4: 2}),
    "small": Partition("small", False, 3600, {2: 1}),
    "cpu": Partition("cpu", False, float("inf"), {0: 3}),
}


@pytest.mark.parametrize(
    "request_",
    [
        Request(4, 8),
        Request(6, 4),
        Request(6, 0, time="1-0"),
        Request(1, 2, partition="small", time="60"),
        Request(3, 0, partition="cpu", time="365-0"),
        Request(4, 8, partition="small,gpu"),  # one that can is enough
    ],
)
def test_what_a_partition_can_give_is_taken(request_: Request) -> None:
    check_request(request_, KNOWN)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(1, 1, partition="gpux"), "there is no partition 'gpux' here; give --partition one of cpu, gpu, small"),
        (Request(1, 1, partition="gpu,nope"), "there is no partition 'nope' here"),
        (Request(1, 16), "--gpus-per-node 16 is more than a node of partition gpu has; its nodes have 8: give "),
        (Request(5, 8), "--nodes 5 is more than partition gpu has: 4 with 8 GPUs; give --nodes 4 or fewer"),
        (Request(7, 4), "--nodes 7 is more than partition gpu has: 6 with 4 GPUs"),
        (Request(4, 0, partition="cpu"), "--nodes 4 is more than partition cpu has: 3; give --nodes 3"),
        (Request(1, 1, time="24:00:01"), "--time 24:00:01 is above the limit of partition gpu, 24 hours; give less"),
        (Request(1, 1, time="61", partition="small"), "above the limit of partition small, 1 hours"),
    ],
)
def test_what_no_partition_can_give_is_named_with_both_numbers(request_: Request, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"; give|: give") as refusal:
        check_request(request_, KNOWN)
    assert sentence in str(refusal.value)


def test_of_several_partitions_each_is_answered_for(slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match=r"partition small has; .*; .*partition cpu has"):
        check_request(Request(1, 4, partition="small,cpu"), KNOWN)


def test_without_a_default_partition_Slurm_is_the_judge() -> None:
    check_request(Request(99, 99), {"cpu": KNOWN["cpu"]})


# -- what sbatch answers


def test_the_expected_start_is_asked_with_the_script_on_standard_input(slurm: FakeSlurm) -> None:
    assert expected_start("#!/bin/sh\n") == "2030-01-02T03:04:05"
    assert slurm.calls("sbatch") == [["--test-only"]]
    assert (slurm.state / "script").read_text() == "#!/bin/sh\n"


@pytest.mark.parametrize("answer", ["42", "42;cluster"])
def test_a_submitted_script_has_a_number(slurm: FakeSlurm, answer: str) -> None:
    slurm.sbatch(submit=answer)
    script = Path("/runs/my run/$(x)/job.sbatch")
    assert submit(script) == "42"
    assert slurm.calls("sbatch") == [["--parsable", str(script)]]


# The sentences of Slurm 22.05. Accounts and QOS need a database (slurmdbd), which the test cluster of this project
# lacks: those two replies are recorded ones and never came from a Slurm in these tests.
REFUSALS = [
    ("allocation failure: Invalid partition name specified", "; change the request"),
    (
        "Batch job submission failed: Invalid account or account/partition combination specified",
        "; give --account one that may use this partition",
    ),
    ("allocation failure: Invalid qos specification", "; give --qos one that your account has"),
    ("allocation failure: Invalid feature specification", "; give a --constraint that nodes have"),
    ("allocation failure: Requested node configuration is not available", "; ask for less per node"),
    (
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)",
        "; give a --time that the partition allows",
    ),
    (
        "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "; ask for less, or for another --qos or --account",
    ),
]


@pytest.mark.parametrize(("answer", "remedy"), REFUSALS)
@pytest.mark.parametrize("start", ["sbatch: error: ", ""])
def test_what_Slurm_refuses_is_one_sentence_with_a_remedy(
    slurm: FakeSlurm, answer: str, remedy: str, start: str
) -> None:
    slurm.sbatch(test_only=start + answer, refuses="--test-only")
    with pytest.raises(ValueError, match=r"^Slurm refuses the job: ") as refusal:
        expected_start("#!/bin/sh\n")
    reason = answer.removeprefix("allocation failure: ")
    assert str(refusal.value).startswith(f"Slurm refuses the job: {reason}{remedy}")
    assert "\n" not in str(refusal.value)


def test_several_lines_of_a_refusal_become_one(slurm: FakeSlurm) -> None:
    answer = "sbatch: error: Unable to open file\n\nsbatch: error: Batch job submission failed: Unspecified error"
    slurm.sbatch(submit=answer, refuses="submit")
    with pytest.raises(ValueError, match=r"^Slurm refuses the job: Unable to open file; Batch job submission failed: "):
        submit(SCRIPT)


def test_a_refusal_without_a_word_says_so(slurm: FakeSlurm) -> None:
    slurm.program("sbatch", "exit 1")
    with pytest.raises(ValueError, match="Slurm refuses the job: no reason"):
        submit(SCRIPT)


@pytest.mark.parametrize("command", ["sbatch", "sinfo", "squeue", "scancel"])
def test_a_machine_without_Slurm_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    call = {
        "sbatch": lambda: submit(SCRIPT),
        "sinfo": partitions,
        "squeue": lambda: jobs(["1"]),
        "scancel": lambda: cancel("1"),
    }[command]
    with pytest.raises(ValueError, match=f"there is no {command} command here; run this where Slurm's commands are"):
        call()


def test_a_command_that_fails_is_quoted(slurm: FakeSlurm) -> None:
    said = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    slurm.program("squeue", f'echo "{said}" >&2; exit 1')
    with pytest.raises(ValueError, match=r"^squeue fails: slurm_load_jobs error: Unable to contact .*; its contr"):
        jobs(["1"])
    slurm.program("squeue", "exit 1")
    with pytest.raises(ValueError, match=r"^squeue fails: no reason; is this where the cluster is used from\?$"):
        jobs(["1"])


def test_variables_that_would_change_the_request_do_not_reach_Slurm(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = ["SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONFIG", "SQUEUE_STATES"]
    foreign += ["SINFO_PARTITION", "SCANCEL_INTERACTIVE"]
    foreign += ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"]
    foreign += ["TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"]
    kept = ["SLURM_CONF", "HF_HOME", "MY_RANK", "NCCL_DEBUG"]
    for name in [*foreign, *kept]:
        monkeypatch.setenv(name, "7")
    submit(SCRIPT)
    partitions()
    for command in ("sbatch", "sinfo"):
        seen = slurm.variables(command)
        assert not seen.keys() & set(foreign)
        assert all(seen[name] == "7" for name in kept)


# -- what squeue says


def test_jobs_are_found_by_their_number_or_that_of_their_array(slurm: FakeSlurm) -> None:
    slurm.answer(
        "squeue",
        "7|7|RUNNING|None|n[1-2]|1:00:00|2030-01-01T00:00:00\n"
        "9|8|RUNNING|None|n1|30:00|2030-01-01T00:00:00\n"
        "8|8|PENDING|JobArrayTaskLimit||1:00:00|N/A\n"
        "70|70|PENDING|Priority||1:00:00|N/A",
    )
    found = jobs(["7", "8", "5"])
    assert set(found) == {"7", "8"}
    assert found["7"] == ("RUNNING", "None", "n[1-2]", "1:00:00", "2030-01-01T00:00:00")
    assert (found["8"].state, found["8"].nodes) == ("RUNNING", "n1")


def test_nothing_is_asked_for_no_jobs(slurm: FakeSlurm) -> None:
    assert jobs([]) == {}
    assert slurm.calls("squeue") == []


# -- jobs to wait for


def test_a_job_that_Slurm_knows_can_be_waited_for(slurm: FakeSlurm) -> None:
    slurm.knows("7", "42")
    check_known(["7", "42"])
    assert slurm.calls("scontrol") == [["show", "job", "7"], ["show", "job", "42"]]


def test_a_job_that_Slurm_does_not_know_is_refused(slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match=r"^--after 43: Slurm knows no such job; give the number that `uvlm submit` "):
        check_known(["42", "43"])


@pytest.mark.parametrize("number", ["", "42_1", "42:43", "42,43", "afterany:42", "42?afterany:7", "-1", "4 2", "+42"])
def test_what_is_no_number_of_a_job_is_refused_without_asking(slurm: FakeSlurm, number: str) -> None:
    with pytest.raises(ValueError, match=r"is no number of a job; give one, and --after again for another$"):
        check_known([number])
    assert slurm.calls("scontrol") == []


# -- env.sh


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    folder = tmp_path / "it's $(touch injected); my folder"
    folder.mkdir()
    return folder / "my env.sh"


def test_options_are_read_as_the_shell_means_them(env_file: Path) -> None:
    env_file.write_text(
        "echo loading modules\nif true; then export SBATCH_PARTITION='a b'; fi\n"
        'export SBATCH_TIMELIMIT=1:00 SBATCH_MEM_PER_NODE=0 SBATCH_ACCOUNT="$(printf "x\\ny")"\nSBATCH_QOS=hidden\n'
    )
    assert env_options(env_file) == {"partition": "a b", "time": "1:00", "mem": "0", "account": "x\ny"}
    assert not list(env_file.parent.parent.glob("**/injected"))


def test_the_shipped_env_sh_asks_for_nothing(repository: Path) -> None:
    assert env_options(repository / "slurm" / "env.sh") == {}


def test_each_key_of_the_shipped_env_sh_is_one_that_is_passed_on(repository: Path, env_file: Path) -> None:
    shipped = (repository / "slurm" / "env.sh").read_text().splitlines()
    lines = [line.removeprefix("# ") for line in shipped if line.startswith("# export SBATCH_")]
    env_file.write_text("\n".join(lines))
    assert len(env_options(env_file)) == len(lines) > 5


def test_variables_of_the_caller_are_no_options(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "mine")
    monkeypatch.setenv("SBATCH_DEBUG", "1")
    monkeypatch.setenv("STRANGE", "line\nSBATCH_QOS=injected")
    env_file.write_text("export SBATCH_QOS=high\n")
    assert env_options(env_file) == {"qos": "high"}


def test_a_variable_that_is_not_passed_on_is_refused(env_file: Path) -> None:
    env_file.write_text("export SBATCH_GPUS_PER_NODE=8\n")
    with pytest.raises(ValueError, match=r"sets SBATCH_GPUS_PER_NODE, which is not passed on; remove it and give --sb"):
        env_options(env_file)


def test_the_last_words_of_an_env_sh_that_fails_are_shown(env_file: Path) -> None:
    env_file.write_text("echo first\necho 'no module cuda/99' >&2\nfalse\nexport SBATCH_QOS=high\n")
    with pytest.raises(ValueError, match=r"my env\.sh fails here \(no module cuda/99\); mend it, the job runs it too"):
        env_options(env_file)
    env_file.write_text("exit 3")
    with pytest.raises(ValueError, match=r"fails here \(without a word\)"):
        env_options(env_file)


@pytest.mark.parametrize("text", ["exit", "echo loading; exit 0\nexport SBATCH_QOS=high\n"])
def test_an_env_sh_that_would_end_the_job_is_refused(env_file: Path, text: str) -> None:
    env_file.write_text(text)
    with pytest.raises(ValueError, match=r"my env\.sh ends the shell that reads it \(`exit`\?\), .*; remove that$"):
        env_options(env_file)


def test_a_bare_name_is_the_file_here_and_not_one_on_the_PATH(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.bin / "env.sh").write_text("export SBATCH_QOS=of_another\n")
    (tmp_path / "env.sh").write_text("export SBATCH_QOS=mine\n")
    monkeypatch.chdir(tmp_path)
    assert env_options(Path("env.sh")) == {"qos": "mine"}


def test_env_sh_is_the_one_given_then_that_of_UVLM_ENV_then_the_one_here_then_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UVLM_ENV", raising=False)
    shipped = repository / "slurm" / "env.sh"
    assert find_env(None) == shipped
    (tmp_path / "slurm").mkdir()
    shutil.copy(shipped, tmp_path / "slurm" / "env.sh")
    assert find_env(None) == Path("slurm/env.sh")
    (tmp_path / "named").touch()
    monkeypatch.setenv("UVLM_ENV", str(tmp_path / "named"))
    assert find_env(None) == tmp_path / "named"
    (tmp_path / "given").touch()
    assert find_env(tmp_path / "given") == tmp_path / "given"
    with pytest.raises(ValueError, match=r"there is no nowhere; give --env \(or UVLM_ENV\) the env\.sh of this clus"):
        find_env(Path("nowhere"))
    monkeypatch.setenv("UVLM_ENV", "elsewhere")
    with pytest.raises(ValueError, match="there is no elsewhere"):
        find_env(None)
