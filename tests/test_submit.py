"""Submitting: what is taken lies complete in its folder; a dry run makes nothing; the command says what it did.

Slurm's commands are fake, the corpus and the checks are real. What is refused is in test_refused_submissions.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import uvlm
from tests.fake_slurm import FakeSlurm
from tests.submitting import REQUEST, content, corpus, env_file, run, slurm, submit
from uvlm.cli_slurm import app
from uvlm.config import load_config
from uvlm.job_script import Request
from uvlm.submit import Submission, Submitted, code_origin, submissions, submit_evaluation, submit_tokenizing

__all__ = ["corpus", "env_file", "run", "slurm", "submit"]  # fixtures


def test_a_submission_has_all_that_its_job_needs(
    submit: Callable[..., Submitted], run: Path, env_file: Path, slurm: FakeSlurm, corpus: Path, repository: Path
) -> None:
    done = submit("optim.steps=30")
    folder = run / "jobs" / "001"
    assert (done.job, done.home, done.expected_start) == ("42", run, "2030-01-02T03:04:05")
    assert slurm.calls("sbatch") == [["--test-only"], ["--parsable", str(folder / "job.sbatch")]]
    script = (folder / "job.sbatch").read_text()
    assert script == done.script == (slurm.state / "script").read_text().rstrip("\n") + "\n"
    assert set(content(run)) == {
        "config.yaml",
        "deepspeed.json",
        "environment.txt",
        *(f"jobs/001/{name}" for name in ("job.sbatch", "env.sh", "config.yaml", "deepspeed.json", "job.json")),
    }
    assert (folder / "env.sh").read_text() == env_file.read_text()
    # As the user wrote it: "auto" is resolved anew for another number of ranks. RUN/deepspeed.json is resolved.
    shipped = json.loads((repository / "ds_configs" / "zero3.json").read_text())
    assert json.loads((folder / "deepspeed.json").read_text()) == shipped
    assert json.loads((run / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"] == 1
    config = load_config(folder / "config.yaml")
    assert (config.run, config.optim.steps, config.deepspeed) == (run, 30, folder / "deepspeed.json")
    assert load_config(run / "config.yaml") == config
    assert "torch==" in (run / "environment.txt").read_text()
    assert submissions(run) == [Submission("42", "train", folder)]
    entry = json.loads((folder / "job.json").read_text())
    assert entry["code"] == code_origin()
    assert entry["request"] == {**REQUEST._asdict(), "after": [], "others": []}
    assert (run / "logs").is_dir()  # Slurm does not make the folder of --output


def test_the_job_runs_the_code_as_it_was_submitted_and_need_not_compile_it(
    submit: Callable[..., Submitted], run: Path, repository: Path
) -> None:
    submit()
    code = run / "jobs" / "001" / "code"
    for package in ("uvlm", "data_pipeline"):
        wanted = {path.relative_to(repository) for path in (repository / package).rglob("*.py")}
        assert {path.relative_to(code) for path in (code / package).rglob("*.py")} == wanted
    assert all(Path(importlib.util.cache_from_source(str(path))).is_file() for path in code.rglob("*.py"))
    assert (code / "uvlm" / "configs" / "demo.yaml").is_file()


def test_the_code_is_named_by_its_version_and_in_a_clone_by_its_commit(repository: Path) -> None:
    assert code_origin().startswith(uvlm.__version__)
    if (repository / ".git").exists():
        head = subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"], text=True).strip()
        assert f" at {head}" in code_origin()


def test_each_rank_is_the_python_that_submitted_unless_it_is_in_an_image(submit: Callable[..., Submitted]) -> None:
    bare = submit("optim.steps=30", dry_run=True).script
    assert f"command=(\n    {sys.executable}\n    -m\n    uvlm\n    train\n" in bare
    assert "    --preflight\n  )" in bare
    image = REQUEST._replace(container="apptainer", image="my.sif")
    assert "command=(\n    python\n    -m\n" in submit(request=image, dry_run=True).script
    assert "    --preflight\n    --trust\n  )" in submit(trust=True, dry_run=True).script


def test_a_dry_run_asks_Slurm_and_makes_nothing(submit: Callable[..., Submitted], run: Path, slurm: FakeSlurm) -> None:
    done = submit(dry_run=True)
    assert done.job == ""
    assert shlex.quote(str(run)) in done.script
    assert slurm.calls("sbatch") == [["--test-only"]]
    assert not run.parent.exists()


def test_a_run_folder_goes_on_with_its_own_DeepSpeed_JSON_on_another_number_of_ranks(
    submit: Callable[..., Submitted], run: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 12345}}')
    submit(f"deepspeed={mine}")
    mine.unlink()
    (run / "STOP").touch()
    slurm.sbatch(submit="43")
    done = submit("optim.steps=40", config=run, request=REQUEST._replace(nodes=1))
    assert (done.job, done.home) == ("43", run)
    assert [entry.job for entry in submissions(run)] == ["42", "43"]
    again = run / "jobs" / "002"
    assert json.loads((again / "deepspeed.json").read_text())["zero_optimization"]["reduce_bucket_size"] == 12345
    config = load_config(again / "config.yaml")
    assert (config.optim.steps, config.run, config.deepspeed) == (40, run, again / "deepspeed.json")
    assert not (run / "STOP").exists()


def test_a_run_folder_that_was_moved_goes_on_where_it_is(submit: Callable[..., Submitted], run: Path) -> None:
    submit()
    moved = run.with_name("moved")
    run.rename(moved)
    assert submit(config=moved).home == moved
    submitted = yaml.safe_load((moved / "jobs" / "002" / "config.yaml").read_text())
    assert submitted["run"] == str(moved)
    assert submitted["deepspeed"] == str(moved / "jobs" / "002" / "deepspeed.json")
    assert not run.exists()


# -- tokenizing and evaluation


def test_tokenizing_is_a_job_array_with_its_folder_beside_the_shards(
    corpus: Path, tmp_path: Path, env_file: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer, shards = corpus.parent / "tokenizer", corpus.parent / "generate"
    request = Request(nodes=1, gpus_per_node=0)
    shutil.copytree(shards, tmp_path / "raw shards")
    (tmp_path / "out.jobs").mkdir()
    (tmp_path / "out.jobs" / "STOP").touch()
    done = submit_tokenizing("raw shards", Path("out"), tokenizer, ["--drop-images"], 4, request, env_file)
    home = tmp_path / "out.jobs"
    assert (done.job, done.home) == ("42", home)
    assert set(content(home)) == {"jobs/001/job.sbatch", "jobs/001/env.sh", "jobs/001/job.json"}
    assert (home / "jobs" / "001" / "code" / "uvlm" / "cli.py").is_file()
    assert "#SBATCH --array=0-3\n" in done.script
    command = ["data", "tokenize", f"'{tmp_path}/raw shards'", f"{tmp_path}/out", f"--tokenizer={tokenizer}"]
    assert "\n".join(f"    {word}" for word in [*command, "--drop-images"]) in done.script
    slurm.answer("squeue", "44|42|RUNNING|None|n1|1:00|N/A")
    with pytest.raises(ValueError, match=r"^job 42 for .*out\.jobs is running; wait"):
        submit_tokenizing("raw shards", Path("out"), tokenizer, [], 4, request, env_file)


def test_an_evaluation_needs_a_model_or_the_training_before_it(
    submit: Callable[..., Submitted], run: Path, corpus: Path, env_file: Path, slurm: FakeSlurm
) -> None:
    shards, request = corpus.parent / "understand", Request(nodes=1, gpus_per_node=1)
    submit()
    with pytest.raises(ValueError, match="has no trained model yet"):
        submit_evaluation(run, shards, request, env_file)
    with pytest.raises(ValueError, match="is no run folder"):
        submit_evaluation(run.parent, shards, request._replace(after=["42"]), env_file)
    (run / "model").mkdir()
    with pytest.raises(OSError, match=r"/nowhere has no manifest\.json"):
        submit_evaluation(run, Path("/nowhere"), request, env_file)
    submit_evaluation(run, shards, request, env_file, dry_run=True)
    slurm.answer("squeue", "42|42|RUNNING|None|n1|1:00|N/A")
    slurm.sbatch(submit="43")
    done = submit_evaluation(run, shards, request._replace(after=["42"]), env_file)
    assert f"    eval\n    {shlex.quote(str(run))}\n    --shards={shards}\n  )" in done.script
    assert [entry.kind for entry in submissions(run)] == ["train", "eval"]
    slurm.answer("squeue", "43|43|PENDING|Dependency||1:00|N/A")
    submit(config=run, dry_run=True)  # an evaluation that waits is no reason not to go on


def test_the_config_that_is_submitted_is_plain_YAML(submit: Callable[..., Submitted], run: Path) -> None:
    submit()
    tree = yaml.safe_load((run / "jobs" / "001" / "config.yaml").read_text())
    assert tree["run"] == str(run)


# -- the command


def command(corpus: Path, run: Path, *options: str) -> list[str]:
    return ["submit", str(corpus), f"run={json.dumps(str(run))}", "--nodes=1", "--gpus-per-node=2", *options]


def test_env_sh_sets_what_the_command_line_does_not(
    corpus: Path, run: Path, env_file: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVLM_ENV", str(env_file))
    env_file.write_text("export SBATCH_PARTITION=cpu SBATCH_TIMELIMIT=1:00:00 SBATCH_MEM_PER_NODE='0 '\n")
    words = command(corpus, run, "--dry-run", "--partition=gpu", "--sbatch=--constraint=a&b")
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "#SBATCH --time=1:00:00\n#SBATCH --partition=gpu\n" in done.stdout
    assert "#SBATCH --requeue\n#SBATCH '--mem=0 '\n#SBATCH '--constraint=a&b'\nset -euo" in done.stdout
    assert not run.parent.exists()


def test_the_command_says_what_it_did_and_what_to_watch_in_lines_that_can_be_pasted(
    corpus: Path, run: Path, env_file: Path, slurm: FakeSlurm
) -> None:
    done = CliRunner().invoke(app, command(corpus, run, f"--env={env_file}"), catch_exceptions=False)
    assert f"job 42 is in the queue: 1 node(s), 2 process(es), folder {run}\n" in done.stdout
    assert "expects it to start at 2030-01-02T03:04:05" in done.stdout
    (status,) = [line for line in done.stdout.splitlines() if line.startswith("watch:")]
    assert shlex.split(status) == ["watch:", "uvlm", "status", str(run)]


def test_two_containers_at_once_are_refused(corpus: Path, run: Path, slurm: FakeSlurm) -> None:
    with pytest.raises(ValueError, match="--apptainer and --pyxis are two ways into an image; give one of them"):
        CliRunner().invoke(app, command(corpus, run, "--apptainer=a", "--pyxis=b"), catch_exceptions=False)


@pytest.mark.parametrize("num_gpus", [0, 2])
def test_a_kernel_that_is_not_installed_here_is_a_warning_for_a_job_on_GPUs(
    corpus: Path, run: Path, env_file: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, num_gpus: int
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    words = command(corpus, run, f"--env={env_file}", f"--gpus-per-node={num_gpus}")
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "job 42 is in the queue" in done.stdout
    warned = [
        "warning: attention on a GPU needs flash-attn, which is not installed; install it: pip install 'uvlm[gpu]'"
    ]
    assert done.stderr.splitlines() == warned * (num_gpus > 0)
