"""Submitting: what can be refused is refused here, then everything the job needs is put into its folder, once.

    HOME/jobs/001/   job.sbatch  env.sh  code/  job.json  attempts      one folder for each submission
                     config.yaml  deepspeed.json                       of a training: as submitted, with all overrides
    HOME/logs/       job_42.log                                        what the batch script says, over all attempts
                     job_42/attempt_0/rank_0000_NODE.log  srun.log     what each rank says

HOME is the run folder, or OUT.jobs beside the shards that an array makes. The job runs the code, the settings and the
env.sh in its folder, and nothing of where it was submitted from: a job that waits for a week, and one that comes back
after each time limit, runs what was checked. The copy of the code takes 0.13 s and 2.7 MB, compiled (run).
"""

from __future__ import annotations

import compileall
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import data_pipeline
import uvlm
from data_pipeline.files import replace_file
from uvlm import job_script, slurm_commands
from uvlm.folders import is_run_folder
from uvlm.job_script import Request

if TYPE_CHECKING:
    from uvlm.config import Config


class Submitted(NamedTuple):
    """A job in the queue, or, of a dry run, the script alone."""

    job: str
    home: Path
    script: str
    expected_start: str
    warning: str = ""


class Submission(NamedTuple):
    """What was submitted: the job's number, what it does, and its folder jobs/NNN."""

    job: str
    kind: str
    folder: Path


class _Work(NamedTuple):
    """What a job does: `arguments` of uvlm, given the submission's folder, where `fill` writes what it needs."""

    kind: str
    home: Path
    arguments: Callable[[Path], list[str]]
    fill: Callable[[Path], None] = lambda folder: None
    array: int | None = None


def submit_training(
    config_path: Path,
    overrides: Sequence[str],
    request: Request,
    env_file: Path,
    *,
    step_seconds: float | None = None,
    trust: bool = False,
    rehearse: bool = False,
    dry_run: bool = False,
) -> Submitted:
    """Check a training for this many processes and put it into the queue.

    Args:
        config_path: YAML, a shipped name, or the folder of a run that is to go on.
        step_seconds: what a step is expected to take; else as measured in this run folder before, else not known.
        trust: as of `uvlm train`.
        rehearse: first let some of the ranks take two steps here, each alone (rehearse.py).
        dry_run: make nothing; only the script is of use.

    Raises:
        ValueError: it could not work, or Slurm refuses it; nothing was made.
    """
    from uvlm import run_folder
    from uvlm.attention import missing_backend
    from uvlm.check import check
    from uvlm.config import dump_config
    from uvlm.deepspeed_config import read_deepspeed_json

    if rehearse and request.after:
        raise ValueError("--rehearse reads the data, which may not be there before --after's jobs end; leave out one")
    _check_cluster(request)
    config = _config_of(config_path, overrides)
    on_gpus = request.gpus_per_node > 0
    tree = check(
        config,
        request.world_size,
        data_is_there=not request.after,
        on_gpus=on_gpus,
        ranks_per_node=request.tasks_per_node,
    )
    _check_time(request, config.checkpoint.every, step_seconds or measured_step_seconds(config.run))
    _check_not_queued(config.run, request.after)
    if rehearse:
        _rehearse(config, request)
    user_json = json.dumps(read_deepspeed_json(config.deepspeed), indent=2) + "\n"

    def fill(folder: Path) -> None:
        (folder / "deepspeed.json").write_text(user_json)
        submitted = config.model_copy(update={"deepspeed": folder / "deepspeed.json"})
        (folder / "config.yaml").write_text(dump_config(submitted))
        run_folder.prepare(submitted, tree)
        _forget_stop(config.run)

    def arguments(folder: Path) -> list[str]:
        return ["train", str(folder / "config.yaml"), "--preflight", *["--trust"] * trust]

    done = _submit(_Work("train", config.run, arguments, fill), request, env_file, dry_run)
    # Not an error: the image of a container, say, may hold what this machine lacks.
    return done._replace(warning=missing_backend(config.dtype, on_gpus) or "")


def submit_tokenizing(
    shards: str,
    out: Path,
    tokenizer: Path,
    options: Sequence[str],
    num_tasks: int,
    request: Request,
    env_file: Path,
    *,
    dry_run: bool = False,
) -> Submitted:
    """Put `uvlm data tokenize SHARDS OUT` into the queue as a job array, whose tasks share the shards.

    Args:
        options: further ones of `uvlm data tokenize`.
    """
    from data_pipeline.split import Split

    _check_cluster(request)
    if not request.after:
        Split.open(shards)
    if (out.exists() and not out.is_dir()) or out.absolute() == Path(shards).absolute():
        raise ValueError(f"{out} is a file, or the folder of the shards themselves; give another folder for OUT")
    if not (tokenizer / "image").is_dir():
        raise ValueError(f"{tokenizer} is no tokenizer folder, it has no image/; `uvlm tokenizer train` makes one")
    place = shards if "://" in shards else str(Path(shards).absolute())
    out = out.absolute()
    home = out.with_name(out.name + ".jobs")
    command = ["data", "tokenize", place, str(out), f"--tokenizer={tokenizer.absolute()}", *options]
    _check_not_queued(home, request.after)
    work = _Work("tokenize", home, lambda folder: command, lambda folder: _forget_stop(home), num_tasks)
    return _submit(work, request, env_file, dry_run)


def submit_evaluation(run: Path, shards: Path, request: Request, env_file: Path, *, dry_run: bool = False) -> Submitted:
    """Put `uvlm eval RUN --shards SHARDS` into the queue, usually after the training of RUN."""
    from data_pipeline.split import Split
    from uvlm import run_folder

    _check_cluster(request)
    if request.after:
        run_folder.read_config(run)
    else:
        run_folder.model_folder(run)
        Split.open(str(shards))
    command = ["eval", str(run.absolute()), f"--shards={shards.absolute()}"]
    return _submit(_Work("eval", run.absolute(), lambda folder: command), request, env_file, dry_run)


def submissions(home: Path) -> list[Submission]:
    """What was submitted for this folder, oldest first."""
    files = [path for path in (home / "jobs").glob("*/job.json") if path.parent.name.isdecimal()]
    files.sort(key=lambda path: int(path.parent.name))
    found = []
    for path in files:
        try:
            entry = json.loads(path.read_text())
            found.append(Submission(str(entry["job"]), str(entry["kind"]), path.parent))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is damaged; remove its folder once `squeue --me` shows no job of it") from None
    return found


def measured_step_seconds(run: Path) -> float | None:
    """Seconds that a step of this run has taken; None where it has no records yet."""
    from uvlm.metrics import read_records

    phases = [[value for name, value in r.items() if name.startswith("time/")] for r in read_records(run)]
    return median(sum(values) for values in phases if values) if any(phases) else None


def _config_of(path: Path, overrides: Sequence[str]) -> Config:
    """Of a YAML, a shipped name, or a run folder, which may have moved."""
    from uvlm.config import load_config

    if path.is_dir() and not is_run_folder(path):
        raise ValueError(f"{path} is no run folder; give the path of a YAML, or the folder of a run")
    return load_config(path, overrides)


def _check_cluster(request: Request) -> None:
    if request.time is not None:
        job_script.seconds(request.time)
    slurm_commands.check_known(request.after)
    slurm_commands.check_request(request, slurm_commands.partitions())


def _check_time(request: Request, every: int, step_seconds: float | None) -> None:
    """ValueError where the time limit ends an attempt before its first checkpoint is due."""
    if request.time is None:
        return
    usable = job_script.seconds(request.time) - request.stop_before
    if usable <= 0:
        raise ValueError(
            f"--time {request.time} leaves nothing to train in: its last {request.stop_before} s are for saving, "
            "raise --time or lower --stop-before"
        )
    if step_seconds and every * step_seconds > usable:
        raise ValueError(
            f"--time {request.time} less the {request.stop_before} s of --stop-before ends before a first checkpoint, "
            f"checkpoint.every={every} steps of {step_seconds:.3g} s take {every * step_seconds:,.0f} s: raise "
            f"--time or set checkpoint.every={max(1, int(usable / 2 / step_seconds))}"
        )


def _rehearse(config: Config, request: Request) -> None:
    """ValueError where ranks of this job fail, or would not do the same; else a sentence is printed."""
    from uvlm.progress import bars
    from uvlm.rehearse import rehearse

    with bars() as update:
        report = rehearse(config, request.world_size, gpus_per_node=request.tasks_per_node, progress=update)
    if report.problems:
        problems = "\n".join(report.problems)
        raise ValueError(f"the rehearsal failed, and nothing was submitted: {problems}")
    print(f"rehearsal: {report.verdict}", file=sys.stderr)


def _check_not_queued(home: Path, after: Sequence[str]) -> None:
    """ValueError where a job of this folder waits or runs, unless this one comes after it: one would ruin the other."""
    known = [one.job for one in submissions(home) if one.kind != "eval"]
    for number, job in slurm_commands.jobs(known).items():
        if number not in after:
            raise ValueError(
                f"job {number} for {home} is {job.state.lower()}; wait for its end, `uvlm stop {home}`, or give "
                f"--after {number}"
            )
        if (home / "STOP").exists():
            raise ValueError(
                f"job {number} for {home} is being stopped; submit when it has ended (`uvlm status {home}`)"
            )


def _forget_stop(home: Path) -> None:
    (home / "STOP").unlink(missing_ok=True)


def _submit(work: _Work, request: Request, env_file: Path, dry_run: bool) -> Submitted:
    """Ask Slurm whether it would take the job, make its folder, and submit it. Where that fails, all is as before."""
    numbers = [int(path.name) for path in (work.home / "jobs").glob("*") if path.name.isdecimal()]
    folder = work.home / "jobs" / f"{max(numbers, default=0) + 1:03d}"
    python = sys.executable if request.container == "none" else "python"
    script = job_script.render(
        f"{work.kind}.sbatch.j2",
        request,
        name=f"{work.kind} {work.home.name}",
        home=work.home,
        folder=folder,
        command=[python, "-m", "uvlm", *work.arguments(folder)],
        array=work.array,
    )
    expected_start = slurm_commands.expected_start(script)
    if dry_run:
        return Submitted("", work.home, script, expected_start)
    is_new = not work.home.exists()
    _make_alone(folder)
    ours = [work.home / name for name in ("config.yaml", "deepspeed.json", "environment.txt", "STOP")]
    before = {path: path.read_bytes() if path.is_file() else None for path in ours}
    job = ""
    try:
        (work.home / "logs").mkdir(exist_ok=True)
        (folder / "job.sbatch").write_text(script)
        shutil.copyfile(env_file, folder / "env.sh")
        snapshot(folder / "code")
        work.fill(folder)
        with _uninterrupted():  # or there would be a job of which nobody has the number
            job = slurm_commands.submit(folder / "job.sbatch")
        entry = {
            "job": job,
            "kind": work.kind,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "request": request._asdict(),
            "code": code_origin(),
        }
        replace_file(folder / "job.json", json.dumps(entry, indent=2) + "\n")
    except BaseException:
        _undo(job, folder, before, is_new)
        raise
    return Submitted(job, work.home, script, expected_start)


def _undo(job: str, folder: Path, before: dict[Path, bytes | None], is_new: bool) -> None:
    """Cancel the job, if there is one, and take back what was made. `before`: the run's own files as they were."""
    if job:
        try:
            slurm_commands.cancel(job)
        except ValueError as error:
            print(f"job {job} is in the queue and cannot be cancelled ({error}); `scancel {job}`", file=sys.stderr)
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # where no other submission is
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)
    if is_new and not folder.parent.exists():
        shutil.rmtree(folder.parent.parent, ignore_errors=True)


def _make_alone(folder: Path) -> None:
    """Make it. ValueError where another `uvlm submit` works at this moment on the same run: its folder is made at once,
    and its job.json comes last, so of two at most one goes on. The other takes nothing back but its folder: all else
    may already be the first one's."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"another submission is being made in {folder}; wait for it, and try again") from None
    for other in folder.parent.iterdir():
        if other.name.isdecimal() and other != folder and not (other / "job.json").is_file():
            folder.rmdir()
            raise ValueError(
                f"another submission is being made in {other}; wait for it, or remove that folder if it was interrupted"
            )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes after this, to us and to the processes started inside."""
    came: list[int] = []
    # The mask is for the processes. Here a library's threads take the signal in spite of it (run), hence the handler.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def snapshot(folder: Path) -> None:
    """Copy the packages that run now into `folder`, for PYTHONPATH: later edits do not reach the job."""
    for module in (uvlm, data_pipeline):
        assert module.__file__ is not None
        package = Path(module.__file__).parent
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(folder, quiet=2)  # or a thousand ranks would do it at once, into one folder


def code_origin() -> str:
    """Version, and the commit where this is a clone: "0.1.0 at 1a2b3c4d, with changes"."""
    assert uvlm.__file__ is not None
    clone = Path(uvlm.__file__).parent.parent
    version = str(uvlm.__version__)
    if not (clone / ".git").exists():
        return version
    try:
        commit, changes = (
            subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True, timeout=60, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "uvlm", "data_pipeline"])
        )
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} at {commit.strip()}" + (", with changes" if changes else "")
