"""Submitting: what cannot work is refused and leaves nothing behind; what is taken lies complete in its folder.

Slurm's commands are fake, the corpus and the checks are real.
"""

from __future__ import annotations

import json
import os
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
from tests.corpus import write_corpus
from tests.fake_slurm import FakeSlurm
from uvlm.cli_slurm import app
from uvlm.config import load_config
from uvlm.job_script import Request
from uvlm.submit import (
    Submitted,
    code_origin,
    measured_step_seconds,
    submissions,
    submit_evaluation,
    submit_tokenizing,
    submit_training,
)

REQUEST = Request(nodes=2, gpus_per_node=2, time="1:00:00", partition="gpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "my env.sh"
    path.write_text("export NCCL_DEBUG=WARN\n")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where no run is yet."""
    return tmp_path / "runs" / "it's my run"


@pytest.fixture
def submit(corpus: Path, run: Path, env_file: Path, slurm: FakeSlurm) -> Callable[..., Submitted]:
    """Submit the corpus' training into `run`."""

    def call(*overrides: str, config: Path = corpus, request: Request = REQUEST, **options: object) -> Submitted:
        words = [f"run={json.dumps(str(run))}", *overrides] if config == corpus else overrides
        return submit_training(config, words, request, env_file, **options)  # type: ignore[arg-type]

    return call


def content(folder: Path) -> dict[str, str]:
    """Every file below, without the code."""
    files = (path for path in folder.rglob("*") if path.is_file() and "code" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


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
    (entry,) = submissions(run)
    assert (entry["job"], entry["kind"], entry["folder"], entry["code"]) == ("42", "train", folder, code_origin())
    assert entry["request"] == {**REQUEST._asdict(), "after": [], "others": []}
    assert (run / "logs").is_dir()  # Slurm does not make the folder of --output


def test_the_job_runs_the_code_as_it_was_submitted(
    submit: Callable[..., Submitted], run: Path, repository: Path
) -> None:
    submit()
    code = run / "jobs" / "001" / "code"
    for package in ("uvlm", "data_pipeline"):
        wanted = {path.relative_to(repository) for path in (repository / package).rglob("*.py")}
        assert {path.relative_to(code) for path in (code / package).rglob("*.py")} == wanted
    assert not list(code.rglob("__pycache__"))
    assert (code / "uvlm" / "configs" / "demo.yaml").is_file()


def test_the_code_is_named_by_its_version_and_in_a_clone_by_its_commit(repository: Path) -> None:
    assert code_origin().startswith(uvlm.__version__)
    if (repository / ".git").exists():
        head = subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"], text=True).strip()
        assert f" at {head}" in code_origin()


def test_each_rank_is_the_python_that_submitted_unless_it_is_in_an_image(submit: Callable[..., Submitted]) -> None:
    bare = submit("optim.steps=30", dry_run=True).script
    assert f"command=(\n  {sys.executable}\n  -m\n  uvlm\n  train\n" in bare
    assert "  --preflight\n)" in bare
    image = REQUEST._replace(container="apptainer", image="my.sif")
    assert "command=(\n  python\n  -m\n" in submit(request=image, dry_run=True).script
    assert "  --preflight\n  --trust\n)" in submit(trust=True, dry_run=True).script


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
    assert [entry["job"] for entry in submissions(run)] == ["42", "43"]
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
    with pytest.raises(OSError, match=r"/nowhere/shards has no manifest\.json"):
        submit(missing)
    assert not run.exists()
    assert slurm.calls("sbatch") == []
    assert submit(missing, request=REQUEST._replace(after=["41"])).job == "42"


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
    assert "\n".join(f"  {word}" for word in [*command, "--drop-images"]) in done.script
    slurm.answer("squeue", "44|42|RUNNING|None|n1|1:00|N/A")
    with pytest.raises(ValueError, match=r"^job 42 for .*out\.jobs is running; wait"):
        submit_tokenizing("raw shards", Path("out"), tokenizer, [], 4, request, env_file)


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
    after = request._replace(after=["7"])
    assert submit_tokenizing("s3://bucket/raw", out, tokenizer, [], 2, after, env_file, dry_run=True).job == ""
    assert submit_tokenizing(missing, out, tokenizer, [], 2, after, env_file).job == "42"


def test_an_evaluation_needs_a_model_or_the_training_before_it(
    submit: Callable[..., Submitted], run: Path, corpus: Path, env_file: Path, slurm: FakeSlurm
) -> None:
    shards, request = corpus.parent / "understand", Request(nodes=1, gpus_per_node=1)
    submit()
    with pytest.raises(ValueError, match="has no trained model yet"):
        submit_evaluation(run, shards, request, env_file)
    with pytest.raises(ValueError, match="is no run folder"):
        submit_evaluation(run.parent, shards, request._replace(after=["42"]), env_file)
    slurm.answer("squeue", "42|42|RUNNING|None|n1|1:00|N/A")
    slurm.sbatch(submit="43")
    done = submit_evaluation(run, shards, request._replace(after=["42"]), env_file)
    assert f"  eval\n  {shlex.quote(str(run))}\n  --shards={shards}\n)" in done.script
    assert [entry["kind"] for entry in submissions(run)] == ["train", "eval"]
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
