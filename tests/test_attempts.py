"""What the batch script does: it starts all ranks as they were asked for, and each end of an attempt has its decision.

The rendered script runs under the real bash; srun and scontrol are fake, so a test decides what becomes of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.fake_slurm import DEADLINE, ONE_TASK, REQUEST, Job, ended, job, wait_until

__all__ = ["job"]  # a fixture

HOSTILE = [
    "a  b",
    'it\'s "quoted"',
    "x; touch injected && exit",
    "$(touch injected)`touch injected`",
    "${HOME} $PATH !!",
    "*",
    "a\nb; touch injected\n",
    "",
    "ünï→😀",
    "--dash",
    "-n",
    "%j %A",
    "back\\slash\\",
    "# comment",
    "{{ home }} {% raw %}",
    ")\ntouch injected",
]


@pytest.mark.parametrize("home", ["it's $(touch injected) `touch injected`; * \" %j", "-n ünï {% raw %}"])
def test_hostile_arguments_and_folders_reach_the_program_and_nothing_in_them_runs(tmp_path: Path, home: str) -> None:
    report = tmp_path / "report"
    program = tmp_path / "the program"
    program.write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >"$REPORT"; echo "$PYTHONPATH $TRITON_CACHE_DIR $OMP_NUM_THREADS"'
    )
    program.chmod(0o755)
    job = Job(tmp_path, home, command=[str(program), *HOSTILE])
    job.ranks(ONE_TASK)
    code, said = job.run(REPORT=str(report))
    assert code == 0, said
    assert report.read_text().split("\0")[:-1] == HOSTILE
    assert job.slurm.calls("srun")[0][-len(HOSTILE) :] == HOSTILE
    assert {path.name for path in job.here.iterdir()} == {"uvlm-42-0-1"}  # the caches, which a fake srun leaves there
    log = job.home / "logs" / "job_42" / "attempt_0" / "rank_0003_n2.log"
    assert log.read_text() == f"{job.folder}/code {job.here}/uvlm-42-0-1/triton 4\n"
    assert (job.home / "logs" / "rank_0.log").readlink() == Path("job_42/attempt_0/rank_0000_n1.log")


@pytest.mark.parametrize("container", ["apptainer", "pyxis"])
def test_the_image_and_the_mounts_of_a_container_are_single_arguments(tmp_path: Path, container: str) -> None:
    image = "my image; $(touch injected)\n.sif"
    request = REQUEST._replace(container=container, image=image)  # type: ignore[arg-type]
    job = Job(tmp_path, request=request, command=["python", *HOSTILE])
    assert job.run(UVLM_MOUNTS="/my data")[0] == 0
    (call, _) = job.slurm.calls("srun")
    if container == "apptainer":
        bind = f"{job.home},{job.here},/my data"
        assert call[-len(HOSTILE) - 7 :] == ["apptainer", "exec", "--nv", "--bind", bind, image, "python", *HOSTILE]
    else:
        mounts = f"--container-mounts={job.home}:{job.home},{job.here}:{job.here},/my data"
        assert call[call.index("bash") - 2 : call.index("bash")] == [f"--container-image={image}", mounts]
        assert call[-len(HOSTILE) - 1 :] == ["python", *HOSTILE]
    assert list(job.here.iterdir()) == []


def test_all_processes_are_started_by_one_srun_that_is_told_its_cores(job: Job) -> None:
    job.run()
    assert job.slurm.calls("srun")[0][:5] == [
        "--export=ALL",
        "--ntasks-per-node=1",
        "--cpus-per-task=4",
        "--kill-on-bad-exit=1",
        "--wait=60",
    ]
    given = job.slurm.variables("srun")
    assert given["MASTER_ADDR"] == "127.0.0.1"
    assert int(given["MASTER_PORT"]) >= 10042


def test_a_run_that_has_finished_does_not_come_back(job: Job) -> None:
    assert job.run()[0] == 0
    assert job.num_starts == 1
    assert not job.was_requeued


def test_srun_that_lost_its_tasks_and_says_0_does_not_end_a_training(job: Job) -> None:
    (job.home / "model").mkdir()  # of an earlier end, before optim.steps was raised
    os.utime(job.home / "model", (0, 0))
    job.ranks("save 10; exit 0")
    code, said = job.run()
    assert code == 1
    assert job.was_requeued
    assert "failed with exit code 0; saved so far: step 10" in said


@pytest.mark.parametrize("template", ["eval.sbatch.j2", "tokenize.sbatch.j2"])
def test_other_work_ends_when_srun_says_so(tmp_path: Path, template: str) -> None:
    job = Job(tmp_path, template=template)
    job.ranks("exit 0")
    assert job.run()[0] == 0
    assert not job.was_requeued


def test_ranks_that_were_asked_to_stop_come_back(job: Job) -> None:
    job.ranks("save 10; exit 75")
    code, said = job.run()
    assert code == 75
    assert job.was_requeued
    assert "stopped as it was asked to; saved so far: step 10" in said
    assert "back to the queue for attempt 1\n" in said
    assert job.outcomes == ["stopped"]


def test_a_rank_that_left_as_asked_makes_a_stop_of_what_srun_calls_a_failure(job: Job) -> None:
    job.ranks('save 10; echo "srun: error: n2: task 1: Exited with exit code 75" >&2; exit 143')
    code, said = job.run()
    assert (code, job.was_requeued, job.outcomes) == (143, True, ["stopped"])
    assert "stopped as it was asked to; saved so far: step 10" in said


def test_a_job_that_finds_STOP_starts_nothing(job: Job) -> None:
    (job.home / "STOP").touch()
    code, said = job.run()
    assert (code, job.num_starts, job.was_requeued) == (75, 0, False)
    assert f"{job.home}/STOP is there, so nothing is started; uvlm submit removes it" in said


def test_a_job_whose_ranks_obeyed_STOP_does_not_come_back(job: Job) -> None:
    job.ranks('save 10; touch "$home/STOP"; exit 75')
    code, said = job.run()
    assert (code, job.was_requeued) == (75, False)
    assert f"{job.home}/STOP is there: the job ends here; uvlm submit goes on" in said


def test_an_evaluation_runs_and_comes_back_though_STOP_is_left_from_the_training(tmp_path: Path) -> None:
    job = Job(tmp_path, template="eval.sbatch.j2")
    (job.home / "STOP").touch()
    job.ranks("exit 1")
    assert job.run()[0] == 1
    assert (job.num_starts, job.was_requeued) == (1, True)


def test_a_job_that_somebody_cancels_does_not_come_back(job: Job) -> None:
    os.mkfifo(job.slurm.state / "release")
    job.ranks('touch "$state/ready"; read -r code <"$state/release"; exit "$code"')
    process = job.start()
    wait_until((job.slurm.state / "ready").exists, process)
    process.send_signal(signal.SIGTERM)
    (job.slurm.state / "release").write_text("143\n")
    code, said = ended(process)
    assert (code, job.was_requeued, job.outcomes) == (143, False, ["ended"])
    assert "Slurm ended this attempt: cancelled, or sent back to the queue from outside" in said


AFTER_USR2 = "trap 'kill $!; {}' USR2\nsleep 60 >&- 2>&- & touch \"$state/ready\"; wait $!"


def near_the_limit(job: Job, ranks: str) -> tuple[int, str]:
    """An attempt whose ranks do this when the signal before the time limit comes."""
    job.ranks(AFTER_USR2.format(ranks))
    process = job.start()
    wait_until((job.slurm.state / "ready").exists, process)
    process.send_signal(signal.SIGUSR2)
    return ended(process)


@pytest.mark.parametrize("ranks", ["save 10; exit 75", "save 10; exit 143"])
def test_the_signal_before_the_time_limit_reaches_the_ranks_and_the_job_comes_back(job: Job, ranks: str) -> None:
    code, said = near_the_limit(job, ranks)
    assert code != 0
    assert job.was_requeued
    assert "the time limit is near: the ranks save and leave\n" in said
    assert "stopped as it was asked to; saved so far: step 10" in said


@pytest.mark.parametrize(("stop_before", "comes_back"), [(300, False), (1, True)])
def test_a_job_that_is_ended_after_that_signal_comes_back_if_its_limit_was_reached(
    tmp_path: Path, stop_before: int, comes_back: bool
) -> None:
    job = Job(tmp_path, request=REQUEST._replace(stop_before=stop_before))
    code, said = near_the_limit(job, 'save 10; kill -TERM "$PPID"; exit 143')
    assert code != 0
    assert job.was_requeued == comes_back
    assert job.outcomes == ["stopped" if comes_back else "ended"]
    assert ("Slurm ended this attempt: cancelled, or sent back to the queue from outside; saved" in said) != comes_back


def test_a_signal_that_comes_when_the_ranks_have_left_changes_nothing(job: Job) -> None:
    os.mkfifo(job.slurm.state / "release")
    job.ranks("save 10; exit 75", remove_caches='touch "$state/ready"; read -r _ <"$state/release"')
    process = job.start()
    wait_until((job.slurm.state / "ready").exists, process)
    process.send_signal(signal.SIGUSR2)
    (job.slurm.state / "release").write_text("\n")
    assert ended(process)[0] == 75
    assert job.was_requeued


def test_at_the_cap_of_restarts_the_job_ends_and_names_node_and_rank(tmp_path: Path) -> None:
    job = Job(tmp_path, request=REQUEST._replace(max_restarts=1))
    job.ranks('save 10; echo "srun: error: n2: task 1: Killed" >&2; exit 137')
    code, said = job.run()
    assert (code, job.was_requeued) == (137, True)
    assert "  node n2, rank 1: Killed\n" in said
    (job.slurm.state / "scontrol.argv").unlink()
    job.ranks('save 20; echo "srun: error: n2: tasks 1,3-5: Exited with exit code 7" >&2; exit 7')
    code, said = job.run(1)
    assert (code, job.was_requeued) == (7, False)
    assert "  node n2, rank 1,3-5: Exited with exit code 7\n" in said
    assert "not again: this would be restart 2 after a failure, and --max-restarts is 1" in said


ENDED_FROM_OUTSIDE = 'kill -TERM "$PPID"; exit 143'


def test_only_failures_count_towards_the_cap_of_restarts(tmp_path: Path) -> None:
    job = Job(tmp_path, request=REQUEST._replace(max_restarts=1))
    for attempt, end in enumerate(["exit 75", ENDED_FROM_OUTSIDE, "exit 75", "exit 1"]):
        job.ranks(f"save {attempt + 1}; {end}")
        job.run(attempt)
    assert job.outcomes == ["stopped", "ended", "stopped", "failed"]
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 3  # who is ended from outside does not ask
    job.ranks("save 9; exit 1")
    assert "not again: this would be restart 2 after a failure, and --max-restarts is 1" in job.run(4)[1]


def test_a_node_that_failed_is_named(job: Job) -> None:
    job.ranks('echo "srun: error: Node failure on n2" >&2; exit 1')
    assert "  Node failure on n2\n" in job.run()[1]


def test_thousands_of_failed_ranks_are_three_lines_and_the_job_comes_back(job: Job) -> None:
    job.ranks('for i in {1..9000}; do echo "srun: error: node$i: task $i: Killed"; done >&2; exit 137')
    code, said = job.run()
    assert (code, job.was_requeued) == (137, True)
    assert said.count(": Killed") == 3


def test_two_attempts_in_a_row_without_a_new_step_are_enough(job: Job) -> None:
    job.ranks("save 10; exit 1")
    assert job.run()[0] == 1  # saved 10
    assert job.run(1)[0] == 1  # no more
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 2
    code, said = job.run(2)
    assert code == 1
    assert "not again: two attempts in a row have saved no step after step 10" in said
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 2


def test_ranks_that_save_nothing_twice_end_with_an_error_though_they_were_only_stopped(job: Job) -> None:
    job.ranks("exit 75")
    assert job.run()[0] == 75
    assert job.run(1)[0] == 1


def test_attempts_that_Slurm_ended_from_outside_are_none_without_a_new_step(job: Job) -> None:
    job.ranks(ENDED_FROM_OUTSIDE)
    for attempt in range(3):
        job.run(attempt)
    job.ranks("exit 1")
    job.run(3)
    assert (job.num_starts, job.was_requeued) == (4, True)
    assert "not again: two attempts in a row have saved no step after step 0" in job.run(4)[1]


def test_a_third_start_by_Slurm_itself_is_refused_too(job: Job) -> None:
    """Where nodes fail, the batch script dies with them and Slurm starts it again."""
    job.ranks('echo "srun: error: n1: task 0: Killed" >&2; kill -KILL "$PPID"')
    for attempt in range(2):
        process = job.start(attempt)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -signal.SIGKILL
    code, said = job.run(2)
    assert (code, job.num_starts) == (1, 2)
    assert "not again: two attempts in a row have saved no step after step 0" in said
    assert "  node n1, rank 0: Killed\n" in said


def test_a_saved_step_between_gives_two_more_attempts(job: Job) -> None:
    for attempt, ranks in enumerate(["exit 1", "save 9; exit 1", "exit 1"]):
        job.ranks(ranks)
        job.run(attempt)
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 3
    lines = [line.split("\t") for line in (job.folder / "attempts").read_text().splitlines()]
    begun = [line[1:3] + line[4:] for line in lines if line[0] == "begin"]
    assert begun == [["0", "0", "n[1-2]"], ["1", "0", "n[1-2]"], ["2", "9", "n[1-2]"]]
    assert [line[1:] for line in lines if line[0] == "end"] == [[str(attempt), "failed"] for attempt in range(3)]


def test_a_checkpoint_that_was_never_completed_is_no_progress(job: Job) -> None:
    job.ranks('mkdir -p "$home/checkpoints/step_$RANDOM$RANDOM" "$home/checkpoints/step_x"; exit 1')
    job.run()
    assert "saved so far: step 0" in job.run(1)[1]
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 1


def test_steps_with_leading_zeros_are_compared_as_numbers(job: Job) -> None:
    job.ranks("save 00000090; save 00000100; exit 75")
    assert "saved so far: step 100" in job.run()[1]


def test_a_job_that_Slurm_does_not_take_back_says_so_after_some_time(job: Job) -> None:
    job.slurm.program("sleep", "")
    job.slurm.program("scontrol", "[[ $1 != requeue ]]")
    job.ranks("save 10; exit 75")
    code, said = job.run()
    assert code == 75
    assert "Slurm does not take the job back; uvlm submit goes on" in said
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 5
    assert sum(int(seconds) for (seconds,) in job.slurm.calls("sleep")) >= 60


def test_a_controller_that_is_away_for_a_moment_is_asked_again(job: Job) -> None:
    job.slurm.program("sleep", 'touch "$state/slept"')
    job.slurm.program("scontrol", '[[ $1 != requeue || -e "$state/slept" ]]')
    job.ranks("save 10; exit 75")
    assert "back to the queue for attempt 1\n" in job.run()[1]
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 2


def test_a_job_that_is_cancelled_while_it_asks_does_not_ask_again(job: Job) -> None:
    job.slurm.program("sleep", 'kill -TERM "$PPID"')
    job.slurm.program("scontrol", "[[ $1 != requeue ]]")
    job.ranks("save 10; exit 75")
    assert "uvlm: cancelled\n" in job.run()[1]
    assert job.slurm.calls("scontrol").count(["requeue", "42"]) == 1


def test_each_task_of_an_array_has_its_own_attempts_and_logs(tmp_path: Path) -> None:
    job = Job(tmp_path, template="tokenize.sbatch.j2", array=4)
    job.ranks("exit 1")
    for attempt in range(3):  # no steps are known, so only the cap ends this
        job.run(attempt, SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="3")
    assert job.slurm.calls("scontrol") == [["requeue", "41_3"]] * 3  # 42 may be the array's own number: all its tasks
    assert (job.folder / "attempts_3").read_text().count("begin\t") == 3
    assert (job.home / "logs" / "job_41_3" / "attempt_2").is_dir()


def test_a_port_at_which_somebody_answers_is_passed_over(job: Job) -> None:
    with socket.socket() as listener:
        for number in range(1, 20000):
            with contextlib.suppress(OSError):  # held by somebody else
                listener.bind(("127.0.0.1", 10000 + number))
                break
        listener.listen()
        job.run(SLURM_JOB_ID=str(20000 + number))
        assert int(job.slurm.variables("srun")["MASTER_PORT"]) > 10000 + number
