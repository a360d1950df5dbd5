"""Submissions that are refused, fail or meet another: they leave nothing behind, or all as it was.

Slurm's commands are fake, the corpus and the checks are real. What is taken is in test_submit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm
from tests.submitting import REQUEST, content, corpus, env_file, run, slurm, submit
from uvlm.job_script import Request
from uvlm.submit import Submitted, measured_step_seconds, snapshot, submit_tokenizing

__all__ = ["corpus", "env_file", "run", "slurm", "submit"]  # fixtures


@pytest.mark.parametrize("stage", ["--test-only", "submit"])
def test_a_refused_submission_leaves_no_new_folder(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm, stage: str
) -> None:
    words = "sbatch: error: Batch job submission failed: Invalid qos specification"
    slurm.sbatch(words, words, refuses=stage)
    with pytest.raises(ValueError, match=r"Slurm refuses the job: .*Invalid qos specification; give --qos"):
        submit()
    assert not run.exists()


@pytest.mark.parametrize("stage", ["--test-only", "submit"])
def test_a_refused_submission_leaves_a_run_as_it_was(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm, stage: str
) -> None:
    submit()
    (run / "STOP").touch()
    before = content(run)
    words = "sbatch: error: Batch job submission failed: Invalid qos specification"
    slurm.sbatch(words, words, refuses=stage)
    with pytest.raises(ValueError, match="Slurm refuses the job"):
        submit("optim.steps=99", config=run)
    assert content(run) == before
    assert not (run / "jobs" / "002").exists()


def test_a_refused_submission_keeps_what_a_user_has_in_the_folder(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm
) -> None:
    """A folder that is no run yet."""
    for name in ("mine.txt", "jobs/notes.txt", "logs/old.log"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine\n")
    before = content(run)
    slurm.sbatch(refuses="submit")
    with pytest.raises(ValueError, match="Slurm refuses the job"):
        submit()
    assert before.items() <= content(run).items()
    assert not (run / "jobs" / "001").exists()


def test_a_job_that_cannot_be_written_down_is_cancelled(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("uvlm.submit.replace_file", full)
    with pytest.raises(OSError, match="no space left"):
        submit()
    assert slurm.calls("scancel") == [["42"]]
    assert not run.exists()


def test_a_job_that_was_taken_while_somebody_pressed_control_c_is_cancelled(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm
) -> None:
    slurm.program("sbatch", 'if [[ $1 == --parsable ]]; then kill -INT "$PPID" $$; echo 42; fi')
    with pytest.raises(KeyboardInterrupt):
        submit()
    assert slurm.calls("scancel") == [["42"]]
    assert not run.exists()


def test_of_two_submissions_at_the_same_moment_one_goes_on(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.mkdir(parents=True)
    (run / "STOP").touch()
    refused = []

    def meanwhile(folder: Path) -> None:
        with pytest.raises(
            ValueError, match=r"^another submission is being made in .*/jobs/001; wait for it, or "
        ) as e:
            submit()
        refused.append(e)
        snapshot(folder)

    monkeypatch.setattr("uvlm.submit.snapshot", meanwhile)
    assert submit().job == "42"
    assert len(refused) == 1
    assert [words[0] for words in slurm.calls("sbatch")] == ["--test-only", "--test-only", "--parsable"]
    assert [path.name for path in (run / "jobs").iterdir()] == ["001"]
    assert (run / "logs").is_dir()
    assert not (run / "STOP").exists()


def test_a_folder_with_a_config_that_nobody_trained_is_no_run_folder(
    submit: Callable[..., Submitted], run: Path, corpus: Path, slurm: FakeSlurm
) -> None:
    run.mkdir(parents=True)
    shutil.copy(corpus, run / "config.yaml")
    with pytest.raises(ValueError, match=r"is no run folder; give the path of a YAML, or the folder of a run$"):
        submit(config=run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_damaged_record_of_an_earlier_submission_is_named(submit: Callable[..., Submitted], run: Path) -> None:
    submit()
    (run / "jobs" / "001" / "job.json").write_text('{"job": ')
    with pytest.raises(ValueError, match=r"/jobs/001/job\.json is damaged; remove its folder once `squeue --me` shows"):
        submit(config=run)


def test_a_job_that_is_being_stopped_cannot_be_followed_by_another_of_its_run(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm
) -> None:
    """The submission would take the STOP away that the job has yet to find."""
    submit()
    (run / "STOP").touch()
    slurm.answer("squeue", "42|42|RUNNING|None|n1|1:00|N/A")
    with pytest.raises(ValueError, match=r"^job 42 for .* is being stopped; submit when it has ended \(`uvlm status "):
        submit(config=run, request=REQUEST._replace(after=["42"]))
    assert (run / "STOP").exists()


def test_a_run_whose_job_waits_or_runs_is_refused_unless_this_one_comes_after_it(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm
) -> None:
    submit()
    slurm.answer("squeue", "42|42|PENDING|Priority||1:00:00|N/A\n1|1|RUNNING|None|n1|1:00|N/A")
    with pytest.raises(ValueError, match=r"^job 42 for .* is pending; wait for its end, .*, or give --after 42$"):
        submit(config=run)
    slurm.sbatch(submit="43")
    assert submit(config=run, request=REQUEST._replace(after=["42"])).job == "43"
    assert "#SBATCH --dependency=afterok:42\n" in (run / "jobs" / "002" / "job.sbatch").read_text()


# -- refused before Slurm is asked to take it


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (REQUEST._replace(partition="nope"), "there is no partition 'nope' here; give --partition one of cpu, gpu"),
        (REQUEST._replace(gpus_per_node=9), "--gpus-per-node 9 is more than a node of partition gpu has"),
        (REQUEST._replace(nodes=7), "--nodes 7 is more than partition gpu has: 6"),
        (REQUEST._replace(time="soon"), "--time soon is no time limit"),
        (REQUEST._replace(time="2-0"), "is above the limit of partition gpu, 24 hours"),
        (REQUEST._replace(time="5:00"), "leaves nothing to train in: its last 300 s are for saving, raise --time or"),
        (REQUEST._replace(nodes=3, gpus_per_node=1), "data.num_rows=4 does not divide over 3 ranks; start 1 or 2 or 4"),
        (REQUEST._replace(after=["43"]), "--after 43: Slurm knows no such job"),
        (REQUEST._replace(after=["42_1"]), "--after '42_1' is no number of a job"),
        (REQUEST._replace(others=["--nodes=4"]), "--sbatch=--nodes=4 sets --nodes, which uvlm decides itself; leave"),
        (REQUEST._replace(nodes=4), "data.num_rows=4 does not divide over 8 ranks"),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_the_queue(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm, request_: Request, sentence: str
) -> None:
    with pytest.raises(ValueError, match=r"[;:,]") as refusal:
        submit(request=request_)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert slurm.calls("sbatch") == []
    assert not run.exists()


def test_a_run_folder_that_a_batch_script_cannot_name_is_refused(
    submit: Callable[..., Submitted], tmp_path: Path, slurm: FakeSlurm
) -> None:
    for name in ("a\nb", "back\\slash", "10:30"):
        with pytest.raises(ValueError, match=r"holds .*; leave it out|holds .*; rename the folder"):
            submit(f"run={json.dumps(str(tmp_path / 'hostile' / name))}")
    assert not (tmp_path / "hostile").exists()
    assert slurm.calls("sbatch") == []


def test_a_time_limit_below_a_checkpoint_interval_is_refused_with_one_that_fits(
    submit: Callable[..., Submitted], run: Path
) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.every=10 steps of 400 s take 4,000 s: .*checkpoint\.every=4$"):
        submit(step_seconds=400.0)
    submit("checkpoint.every=4", step_seconds=400.0, dry_run=True)
    run.mkdir(parents=True)
    seconds = [1.0, 400.0, 2.0]
    lines = [{"step": n, "time/forward": 0.75 * s, "time/step": 0.25 * s} for n, s in enumerate(seconds)]
    lines.append({"step": 4, "loss/mean": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_step_seconds(run) == 2.0
    with pytest.raises(ValueError, match=r"checkpoint\.every=2000 steps of 2 s take 4,000 s"):
        submit("checkpoint.every=2000")
    submit("checkpoint.every=2000", step_seconds=1.0, dry_run=True)  # what was said wins over what was measured
    submit("checkpoint.every=2000", request=REQUEST._replace(time=None), dry_run=True)


def test_a_run_without_records_has_no_measured_steps(tmp_path: Path) -> None:
    assert measured_step_seconds(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/mean": 2.0}\n')
    assert measured_step_seconds(tmp_path) is None


def test_data_that_cannot_be_read_is_refused_unless_a_job_before_makes_it(
    submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm
) -> None:
    missing = "data.train=[{path: /nowhere/shards}]"
    with pytest.raises(ValueError, match=r"/nowhere/shards has no manifest\.json"):
        submit(missing)
    assert not run.exists()
    assert slurm.calls("sbatch") == []
    assert submit(missing, request=REQUEST._replace(after=["42"])).job == "42"


def test_what_only_a_GPU_can_do_is_no_error_of_a_machine_without_one(
    submit: Callable[..., Submitted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert submit("dtype=fp16", dry_run=True).script
    on_cpus = REQUEST._replace(gpus_per_node=0)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found"):
        submit("dtype=bf16", request=on_cpus, dry_run=True)
    monkeypatch.delenv("CXX")
    with pytest.raises(ValueError, match="DeepSpeed trains with dtype=fp16 on GPUs only"):
        submit("dtype=fp16", request=on_cpus, dry_run=True)


def test_tokenizing_what_is_not_there_is_refused_unless_a_job_before_makes_it(
    corpus: Path, tmp_path: Path, env_file: Path, slurm: FakeSlurm
) -> None:
    request, out = Request(nodes=1, gpus_per_node=0, partition="cpu"), tmp_path / "out"
    tokenizer, missing = corpus.parent / "tokenizer", str(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere has no manifest"):
        submit_tokenizing(missing, out, tokenizer, [], 2, request, env_file)
    with pytest.raises(ValueError, match=r"is no tokenizer folder, it has no image/; `uvlm tokenizer train` makes one"):
        submit_tokenizing(str(corpus.parent / "generate"), out, tmp_path, [], 2, request, env_file)
    assert list(tmp_path.glob("out*")) == []
    after = request._replace(after=["42"])
    assert submit_tokenizing("s3://bucket/raw", out, tokenizer, [], 2, after, env_file, dry_run=True).job == ""
    assert submit_tokenizing(missing, out, tokenizer, [], 2, after, env_file).job == "42"


def test_tokenizing_into_a_file_or_into_the_shards_themselves_is_refused(
    corpus: Path, tmp_path: Path, env_file: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = corpus.parent / "generate"
    monkeypatch.chdir(shards.parent)
    file = tmp_path / "file"
    file.touch()
    for out in (file, shards, Path("generate")):
        with pytest.raises(ValueError, match=r"is a file, or the folder of the shards themselves; give another folder"):
            submit_tokenizing(str(shards), out, corpus.parent / "tokenizer", [], 2, Request(1, 0), env_file)
    assert slurm.calls("sbatch") == []
