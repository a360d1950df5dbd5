"""A trial of `uvlm tune`: a few steps of real training in processes of their own, measured.

`run_trial` starts the ranks (torchrun on this machine; inside a Slurm allocation an srun over its nodes), waits no
longer than a deadline and says what became of them; they may run out of memory, be killed or hang without harm. In each
rank, `python -m uvlm.tune_trial FOLDER` takes the path of `uvlm train` (its model, Engine, Loader and
Trainer.train_step) in a scratch run folder, without checkpoints, validation or log, and leaves its times in a file.
Nothing but FOLDER is written to.

    FOLDER/config.yaml  deepspeed.json  trial.json        what is to be measured
    FOLDER/log  rank_0.json ...  locks_0 ...              what the ranks said, and found; what they have locked

A rank that hangs ends itself at the deadline, whatever it waits in, and says where in the log: so nodes that we cannot
reach are freed too. Cost (run, the demo model, two ranks on two cores): 10 s before the first timed step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from data_pipeline.files import replace_file
from uvlm import distributed
from uvlm.distributed import prepare_environment
from uvlm.resident import peak_resident_bytes

if TYPE_CHECKING:
    from data_pipeline.loader import DataState

NUM_WARM_UP = 2  # steps; under ZeRO-3 the first one records what the second prefetches
MIN_STEPS, MAX_STEPS = 3, 200  # timed ones
_LOST_PEER = ("connection closed", "connection reset", "gloo", "nccl", "disterror", "distbackend")  # not the cause
_GRACE = 15.0  # seconds between a rank's own deadline and ours, and for srun to end its tasks


@dataclass(frozen=True)
class Outcome:
    """What a trial found. `failure` is a sentence where it found nothing."""

    failure: str | None = None
    rates: list[float] = field(default_factory=list)  # useful tokens/s of each timed step, all ranks together
    step_seconds: list[float] = field(default_factory=list)  # of the slowest rank
    peak_bytes: list[int] = field(default_factory=list)  # by rank: of the GPU's allocator; on a CPU resident
    num_too_long: int = 0  # documents left out because a pack is too small for them
    device: str = ""
    device_bytes: int = 0  # memory of a rank: of its GPU; on a CPU its share of the machine
    seconds: float = 0.0  # of everything, from the start of the processes to their end


@dataclass(frozen=True)
class Place:
    """Where trials run.

    Attributes:
        nproc: ranks on each node. num_nodes: those of the Slurm allocation; 1 without one.
        in_slurm: start them with srun.
        module: what each rank runs; tests hurt it in modules of their own.
    """

    nproc: int
    num_nodes: int = 1
    in_slurm: bool = False
    module: str = "uvlm.tune_trial"

    @property
    def num_ranks(self) -> int:
        return self.nproc * self.num_nodes

    @staticmethod
    def of_environment(nproc: int | None) -> Place:
        """The allocation that this process runs in, else this machine; ValueError where it has no number of ranks,
        or where this process is one of several.

        Args:
            nproc: ranks on each node; else as the allocation says, else the machine's GPUs.
        """
        environment = os.environ
        if distributed.world().size > 1:
            raise ValueError("uvlm tune starts the ranks itself; run it once, without srun or torchrun before it")
        in_slurm = "SLURM_JOB_ID" in environment and shutil.which("srun") is not None
        num_nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1")) if in_slurm else 1
        if nproc is None and in_slurm:
            told = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or ""
            nproc = int(told) if told.isdigit() else None
        if nproc is None:
            import torch

            nproc = torch.cuda.device_count()
        if nproc < 1:
            raise ValueError("the number of ranks is not known on a machine without GPUs; give --nproc, such as 2")
        return Place(nproc, num_nodes, in_slurm)

    def command(self, folder: Path) -> list[str]:
        """What starts the ranks of the trial in `folder`."""
        rank = ["-m", self.module, str(folder)]
        if not self.in_slurm:
            launcher = [sys.executable, "-m", "uvlm.torchrun", "--nnodes=1", f"--nproc-per-node={self.nproc}"]
            return [*launcher, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", *rank]
        told = os.environ.get("SLURM_CPUS_PER_TASK")
        cores = int(told) if told else int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) // self.nproc
        # --overlap: an interactive shell of the allocation may be a step too, which holds what ours would wait for.
        step = ["srun", "--export=ALL", "--overlap", f"--nodes={self.num_nodes}", f"--ntasks={self.num_ranks}"]
        step += [f"--ntasks-per-node={self.nproc}", f"--cpus-per-task={max(1, cores)}"]
        return [*step, "--kill-on-bad-exit=1", "--wait=30", sys.executable, *rank]


def run_trial(folder: Path, place: Place, seconds: float, deadline: float) -> Outcome:
    """Measure what lies in `folder` (config.yaml), for about `seconds` of timed steps.

    Args:
        deadline: seconds after which the processes are ended.
    """
    started = time.monotonic()
    replace_file(folder / "trial.json", json.dumps({"seconds": seconds, "deadline": deadline}))
    for old in [*folder.glob("rank_*.json"), *folder.glob("locks_*")]:
        old.unlink()
    with (folder / "log").open("wb") as log:
        code = _run(place, folder, log, deadline)
    shutil.rmtree(folder / "run", ignore_errors=True)
    taken = time.monotonic() - started
    found = {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("rank_*.json")}
    if code == 0 and len(found) == place.num_ranks and not any("failure" in rank for rank in found.values()):
        return _joined([found[rank] for rank in sorted(found)], taken)
    _remove_locks(folder)
    reason = _reason(code, found, place.num_ranks, deadline, taken, folder / "log")
    told: dict[str, Any] = next((rank for rank in found.values() if "device" in rank), {})
    return Outcome(
        reason, device=told.get("device", ""), device_bytes=told.get("device_bytes", 0), seconds=round(taken, 2)
    )


def _run(place: Place, folder: Path, log: Any, deadline: float) -> int | None:
    """The exit code of the launcher; None where it was ended by us. Whatever happens to us, it ends first."""
    environment = dict(os.environ)
    if not place.in_slurm:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.nproc)))
    environment["PYTHONUNBUFFERED"] = "1"
    process = None
    try:
        with distributed.hold_signals():
            process = subprocess.Popen(
                place.command(folder),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for us, who end it
                preexec_fn=distributed.end_with_parent,
            )
        return process.wait(deadline + _GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process:
            _end(process, gently=place.in_slurm)


def _end(process: subprocess.Popen[bytes], gently: bool) -> None:
    """End the launcher and all below it, each by its id: torchrun gives each rank a session of its own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    if gently and process.poll() is None:
        process.terminate()  # srun tells its tasks on all nodes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=_GRACE)


def note_locks(folder: Path) -> None:
    """Have this process note in FOLDER which locks of torch it makes.

    torch guards the building of an operator with a file that outlives who made it: the next start would wait on it for
    ever. Those of a trial that was ended go with it, and none of other jobs, which may build in the same place.
    """
    from torch.utils.file_baton import FileBaton

    own = FileBaton.try_acquire

    def try_acquire(lock: FileBaton) -> bool | None:
        acquired = own(lock)
        if acquired and lock.fd is not None:
            made = os.fstat(lock.fd)
            with (folder / f"locks_{distributed.world().rank}").open("a") as file:
                file.write(json.dumps([lock.lock_file_path, made.st_ino, made.st_mtime_ns]) + "\n")
        return acquired

    FileBaton.try_acquire = try_acquire  # type: ignore[assignment,method-assign]


def _remove_locks(folder: Path) -> None:
    """Those that ranks of the trial have made and left; a file of the same name that is not theirs stays."""
    for line in "".join(path.read_text() for path in folder.glob("locks_*")).splitlines():
        with contextlib.suppress(ValueError, OSError):  # a rank was killed while it wrote; the lock is gone
            name, number, made = json.loads(line)
            found = Path(name).stat()
            if (found.st_ino, found.st_mtime_ns) == (number, made):
                Path(name).unlink()


def _joined(ranks: Sequence[dict[str, Any]], seconds: float) -> Outcome:
    step_seconds = [max(times) for times in zip(*(rank["step_seconds"] for rank in ranks), strict=True)]
    tokens = [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)]
    return Outcome(
        rates=[round(count / time_, 1) for count, time_ in zip(tokens, step_seconds, strict=True)],
        step_seconds=[round(time_, 4) for time_ in step_seconds],
        peak_bytes=[rank["peak_bytes"] for rank in ranks],
        num_too_long=sum(rank["num_too_long"] for rank in ranks),
        device=ranks[0]["device"],
        device_bytes=ranks[0]["device_bytes"],
        seconds=round(seconds, 2),
    )


def _reason(
    code: int | None, found: dict[int, dict[str, Any]], num_ranks: int, deadline: float, taken: float, log: Path
) -> str:
    """Why a trial gave nothing, in one line."""
    if code is None or taken >= deadline:
        return f"hung: no result within {deadline:.0f} s, so it was ended; where it stood: {log}"
    failed = {rank: told for rank, told in found.items() if "failure" in told}
    silent = [rank for rank in range(num_ranks) if not {"failure", "step_seconds"} & found.get(rank, {}).keys()]
    if failed:
        first = min(failed, key=lambda rank: float(failed[rank]["time"]))
        reason = str(failed[first]["failure"])
        if not (silent and any(word in reason.lower() for word in _LOST_PEER)):
            memory = "out of memory" in reason.lower() or "allocate memory" in reason.lower()
            return f"{'out of memory: ' if memory else ''}rank {first}: {reason}"
        if silent and code <= 128:  # which signal it was is not known
            return f"{distributed.listed(silent)} killed (out of memory?), for rank {first} says: {reason}"
    said = log.read_text(errors="replace")
    if silent and code > 128:
        told = re.search(rf"^(rank \d+) was ended by {_name(code)};", said, re.MULTILINE)  # by torchrun.py
        return f"{told[1] if told else distributed.listed(silent)} killed ({_name(code)}; out of memory?)"
    lines = said.strip().splitlines()[-3:]
    how = _name(code) if code > 128 else f"exit code {code}"
    return f"{how}: {' | '.join(line.strip()[:150] for line in lines) or 'nothing was said'}"


def _name(code: int) -> str:
    """Of the signal that a launcher's exit code of 128 and more stands for."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"signal {code - 128}"


def measure(folder: Path) -> dict[str, Any]:
    """What this rank finds: {"step_seconds", "tokens": of each timed step; "peak_bytes", "num_too_long", "device",
    "device_bytes"}."""
    import torch

    from data_pipeline.encode import TOO_LONG
    from data_pipeline.vocab import Vocab
    from uvlm import engine as deepspeed_engine
    from uvlm.checkpoint import Position
    from uvlm.collectives import from_rank_0
    from uvlm.config import load_config
    from uvlm.deepspeed_config import read_deepspeed_json, resolve
    from uvlm.engine import Engine
    from uvlm.flops import Widths
    from uvlm.train import build
    from uvlm.trainer import Trainer
    from uvlm.window import num_useful_tokens

    started = time.monotonic()
    place, config = distributed.world(), load_config(folder / "config.yaml")
    device = deepspeed_engine.start()
    hardware = _hardware(device)
    replace_file(folder / f"rank_{place.rank}.json", json.dumps(hardware))  # known even if the rest fails
    tree = resolve(read_deepspeed_json(config.deepspeed), config, place.size)
    vocab = Vocab.load(config.data.tokenizer)
    model, _ = build(config, vocab, tree)
    widths = Widths.of(model.backbone.config)
    engine = Engine(model, config, tree)
    trainer = Trainer(config, engine, vocab, device, {}, Position(0, None), widths, started, trust=False)
    batches = iter(trainer.loader)
    state: DataState = {}
    tokens: list[int] = []
    step_seconds: list[float] = []
    num_steps = NUM_WARM_UP
    seconds = json.loads((folder / "trial.json").read_text())["seconds"]
    while len(step_seconds) < num_steps:
        began = time.perf_counter()
        packs, state = next(batches)
        trainer.train_step(packs, len(step_seconds))
        if device.type == "cuda":
            torch.cuda.synchronize()
        step_seconds.append(time.perf_counter() - began)
        tokens.append(sum(map(num_useful_tokens, packs)))
        if len(step_seconds) == NUM_WARM_UP:
            last = step_seconds[-1]
            num_steps += from_rank_0(lambda: max(MIN_STEPS, min(MAX_STEPS, round(seconds / last))))  # noqa: B023
    trainer.watchdog.close()
    return {
        **hardware,
        "step_seconds": step_seconds[NUM_WARM_UP:],
        "tokens": tokens[NUM_WARM_UP:],
        "peak_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else peak_resident_bytes(),
        "num_too_long": sum(row["rejected"].get(TOO_LONG, 0) for row in state.values()),
    }


def _hardware(device: Any) -> dict[str, Any]:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "device_bytes": properties.total_memory}
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    name = f"CPU of {socket.gethostname()}, {len(os.sched_getaffinity(0))} cores for {local_size} ranks"
    return {"device": name, "device_bytes": psutil.virtual_memory().total // local_size}


def main(folder: Path) -> None:
    """One rank. It leaves its file whatever happens, unless it is killed."""
    faulthandler.dump_traceback_later(json.loads((folder / "trial.json").read_text())["deadline"], exit=True)
    distributed.end_with_launcher()
    path = folder / f"rank_{distributed.world().rank}.json"
    try:
        note_locks(folder)
        replace_file(path, json.dumps(measure(folder)))
    except Exception as error:
        told = json.loads(path.read_text()) if path.exists() else {}
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        replace_file(path, json.dumps({**told, "failure": sentence, "time": time.time()}))
        print(sentence, file=sys.stderr, flush=True)
        distributed.leave(1)
    distributed.leave()


if __name__ == "__main__":
    prepare_environment()
    main(Path(sys.argv[1]))
