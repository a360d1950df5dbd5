"""What has become of a run that was submitted, and how to stop it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from uvlm import slurm_commands
from uvlm.folders import is_run_folder
from uvlm.slurm_commands import Job
from uvlm.submit import Submission, submissions

_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")


def status(home: Path) -> list[str]:
    """Lines that say where the run stands: jobs, steps, checkpoints, what happened last, where to look."""
    known = _known(home)
    queued = slurm_commands.jobs([entry.job for entry in known])
    lines = [
        f"{entry.kind:<10} {_state(entry, queued)}" for entry in known if entry.job in queued or entry is known[-1]
    ]
    lines += [f"{name:<10} {value}" for name, value in _training(home)]
    return lines + _told(home, known[-1].job, is_over=known[-1].job not in queued)


def stop(home: Path, now: bool = False) -> list[str]:
    """Ask the jobs of this folder to end: a training that runs saves first, unless `now`; others are cancelled.

    Returns what was done, as sentences.
    """
    known = submissions(home)
    if not known and not is_run_folder(home):
        raise ValueError(f"{home} is no run folder; give the folder that `uvlm train` or `uvlm submit` printed")
    # The file comes first: a job that goes back to the queue in this moment finds it when it starts.
    (home / "STOP").touch()
    queued = slurm_commands.jobs([entry.job for entry in known]) if known else {}
    if not queued:
        stop_file = home / "STOP"
        return [f"no job of {home} waits or runs; what was started otherwise finds {stop_file} and saves, then ends"]
    said = []
    for entry in known:
        if (job := queued.get(entry.job)) is None:
            continue
        if entry.kind == "train" and job.state in _RUNNING and not now:
            said.append(f"job {entry.job} saves after its current step and ends; `uvlm status {home}` shows it")
        else:
            slurm_commands.cancel(entry.job)
            said.append(f"job {entry.job} was {job.state.lower()} and is cancelled")
    return said


def _known(home: Path) -> list[Submission]:
    known = submissions(home)
    if not known:
        raise ValueError(f"nothing was submitted for {home} (it has no jobs/*/job.json); `uvlm submit` does that")
    return known


def _state(entry: Submission, queued: dict[str, Job]) -> str:
    job = queued.get(entry.job)
    attempts = [path.read_text() for path in entry.folder.glob("attempts*")]
    restarts = sum(max(0, text.count("begin\t") - 1) for text in attempts)
    limit = f"restarts: {restarts}"
    if job is None:
        return f"job {entry.job}, not in the queue any more; {limit}"
    if job.state in _RUNNING:
        return f"job {entry.job} {job.state} on {job.nodes}, {job.left} left; {limit}"
    if job.reason == "DependencyNeverSatisfied":
        return f"job {entry.job} will never start, as a job of --after failed or was stopped; `uvlm stop` it"
    expected = f", expected to start at {job.start}" if job.start not in ("N/A", "") else ""
    return f"job {entry.job} {job.state} ({job.reason}){expected}; {limit}"


def _told(home: Path, job: str, is_over: bool) -> list[str]:
    """The last words of the batch script; of an array, of those tasks that have not finished."""
    one = home / "logs" / f"job_{job}.log"
    logs = [one] if one.is_file() else sorted((home / "logs").glob(f"job_{job}_*.log"))
    lines: list[str] = []
    for log in logs:
        said = [line[6:] for line in log.read_text(errors="replace").splitlines() if line.startswith("uvlm: ")]
        if log == one or said[-1:] != ["finished"]:
            errors = _errors(log) if is_over else []
            lines += [f"{'job log':<10} {log}", *(f"{'':<10} {line}" for line in [*said[-3:], *errors])]
    return lines or [f"{'job logs':<10} {len(logs)} tasks finished"] * bool(logs)


def _errors(log: Path) -> list[str]:
    """What the ranks of the last attempt gave as reason where it failed: the first sentence that is found."""
    attempts = sorted(log.with_suffix("").glob("attempt_*"), key=lambda path: int(path.name.removeprefix("attempt_")))
    for rank in sorted(attempts[-1].glob("rank_*.log")) if attempts else []:
        found = [line for line in rank.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if found:
            return [f"{rank.name}: {found[-1]}"]
    return []


def _training(home: Path) -> Iterator[tuple[str, str]]:
    """What the run folder of a training tells, in pairs of name and value."""
    from uvlm.checkpoint_files import complete
    from uvlm.metrics import read_records

    if not (home / "config.yaml").is_file():
        return
    records = [record for record in read_records(home) if "loss/mean" in record]
    if records:
        last = records[-1]
        yield "step", f"{last['step']:,}, loss {last['loss/mean']:.3f}, {last['speed/tokens_per_second']:,.0f} tokens/s"
    checkpoints = complete(home / "checkpoints")
    if checkpoints:
        age = (time.time() - checkpoints[-1].stat().st_mtime) / 60
        yield "checkpoint", f"{checkpoints[-1].name}, {age:,.0f} minutes old"
    elif not (home / "checkpoints").is_dir():
        yield "checkpoint", "none yet"
    if (home / "model").is_dir():
        yield "model", str(home / "model")
    events = home / "events.jsonl"
    if events.is_file():
        for line in events.read_text().splitlines()[-3:]:
            with contextlib.suppress(ValueError, KeyError):  # a crash may have cut the line
                event = json.loads(line)
                yield "event", f"{event['time']} {event['event']}"
    rank_0 = home / "logs" / "rank_0.log"
    if rank_0.is_symlink():
        yield "rank 0 log", str(rank_0)
