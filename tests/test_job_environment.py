"""What a task of a job finds around it: env.sh, where the ranks meet, folders for kernels, and the copy of the code."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fake_slurm import ONE_TASK, Job, job

__all__ = ["job"]  # a fixture


def test_env_sh_may_read_variables_that_are_not_set(job: Job) -> None:
    (job.folder / "env.sh").write_text('export UVLM_LOCAL_DISK="$PWD/local disk$nothing"\n')
    assert job.run()[0] == 0
    assert job.slurm.variables("srun")["UVLM_CACHE"] == f"{job.here}/local disk/uvlm-42-0"


def test_env_sh_may_use_the_names_of_the_scripts_own_variables(job: Job) -> None:
    names = ("home", "folder", "job", "attempt", "attempts", "logs", "stop_file", "step", "cpus", "tasks_per_node")
    lines = [f"{name}='{job.here}/elsewhere'" for name in names]
    (job.folder / "env.sh").write_text("\n".join([*lines, "max_restarts=0", "stop_before=0", "command=(false)"]))
    job.ranks("save 10; exit 1")
    code, said = job.run()
    assert (code, job.was_requeued, job.outcomes) == (1, True, ["failed"])
    assert "back to the queue for attempt 1\n" in said
    call = job.slurm.calls("srun")[0]
    assert (call[-1], call[1:3]) == ("program", ["--ntasks-per-node=1", "--cpus-per-task=4"])
    assert job.slurm.variables("srun")["PYTHONPATH"] == f"{job.folder}/code"


def test_an_env_sh_that_fails_is_a_failed_attempt_and_the_job_comes_back(job: Job) -> None:
    (job.folder / "env.sh").write_text("false\n")  # a module that one node lacks, say
    code, said = job.run()
    assert (code, job.num_starts, job.was_requeued, job.outcomes) == (1, 0, True, ["failed"])
    assert "attempt 0 failed with exit code 1; saved so far: step 0" in said


def test_a_start_at_which_Slurm_does_not_answer_is_a_failed_attempt_and_the_job_comes_back(job: Job) -> None:
    job.slurm.program("scontrol", "[[ $1 == requeue ]]")
    code, said = job.run()
    assert (code, job.num_starts, job.was_requeued, job.outcomes) == (1, 0, True, ["failed"])
    assert "back to the queue for attempt 1\n" in said


def test_where_ranks_meet_can_be_set_in_env_sh(job: Job) -> None:
    (job.folder / "env.sh").write_text("export MASTER_ADDR=127.0.0.9 MASTER_PORT=1234\n")
    job.run()
    given = job.slurm.variables("srun")
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("127.0.0.9", "1234")


def test_folders_for_kernels_can_be_set_in_env_sh(tmp_path: Path) -> None:
    names = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    job = Job(tmp_path, command=["printenv", *names])
    (job.folder / "env.sh").write_text("".join(f"export {name}=/shared/{name}\n" for name in names))
    job.ranks(ONE_TASK)
    job.run()
    (log,) = (job.home / "logs" / "job_42" / "attempt_0").glob("rank_*.log")
    assert log.read_text().splitlines() == [f"/shared/{name}" for name in names]


def test_the_code_is_that_of_the_job_and_not_of_the_folder_it_was_submitted_from(tmp_path: Path) -> None:
    job = Job(tmp_path, command=[sys.executable, "-m", "uvlm"])
    for folder in (job.here, job.folder / "code"):
        (folder / "uvlm").mkdir(parents=True)
        (folder / "uvlm" / "__init__.py").touch()
        (folder / "uvlm" / "__main__.py").write_text("import uvlm\nprint(uvlm.__file__)\n")
    job.ranks(ONE_TASK)
    assert job.run()[0] == 0
    (log,) = (job.home / "logs" / "job_42" / "attempt_0").glob("rank_*.log")
    assert log.read_text() == f"{job.folder}/code/uvlm/__init__.py\n"
