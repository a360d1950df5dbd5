"""Rehearse a job before it starts: chosen ranks of its world, each for real but alone, on this machine.

Each rank is a process of its own (rehearsal_rank.py) that builds the model, reads its own rows and takes a few steps
with DeepSpeed's real code; its group moves nothing, so a world of a thousand needs no more memory than its ranks. What
comes out is each rank's memory by phase, and the list of its collectives in order. Ranks of which these lists differ
would hang in the real job, or add up what does not belong together: the first difference is told by rank and module.

Cost (run, two cores): the demo's model at a world of 1,024, four ranks and two steps: 38 s of CPU time, 0.7 GB a rank;
66 s by the clock beside other work. A third of it is starting Python and importing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uvlm.config import Config, dump_config
from uvlm.distributed import end_with_parent, hold_signals, listed

# What a group that moves nothing makes meaningless or keeps from happening, by name, and what is left out beside it.
SWITCHED_OFF = {
    "loss values": "gathered weights are this rank's shard over and over, so no loss is shown",
    "gradient norm and clipping": "sums over ranks hold this rank's part alone",
    "overflow checks": "sums are made finite and held within -1 and 1, so no rank skips an update",
    "the guard's comparison": "a reduced digest is always this rank's own; the lists are compared instead",
    "DeepSpeed's comparison of its lists with rank 0's": "nothing comes from rank 0; these lists are compared here",
    "the watchdog": "nobody waits for anybody",
    "spike rollback": "it looks at the loss",
    "the preflight": "it compares nodes and links, and there are none",
    "checkpoints": "none is read or written: the model starts as a new one",
    "validation, logging and stopping": "only the start and whole optimizer steps are rehearsed",
    "loader workers": "the rank reads its packs itself; they are the same",
}
LIMIT = (
    "a CPU shows the order in which each rank issues its collectives, not how NCCL runs them: streams, overlap, "
    "timeouts and the links themselves are not rehearsed"
)
_LAST_LINES = 12
_OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "PMI", "OMPI_")


class Collective(NamedTuple):
    """A collective as one rank issued it.

    operation: torch's name. elements: of each tensor that the rank gives to it. step: from 1, 0 is the start. module:
    in whose forward or backward it was issued; "" where in none.
    """

    operation: str
    dtype: str
    elements: tuple[int, ...]
    group_size: int
    step: int
    phase: str
    module: str

    def __str__(self) -> str:
        several = f" in {len(self.elements)} tensors" if len(self.elements) > 1 else ""
        what = f" of {sum(self.elements):,} {self.dtype} elements{several}" if self.elements else ""
        where = f"{self.phase} of {self.module}" if self.module else self.phase
        return f"issued {self.operation}{what} among {self.group_size} ranks in the {where}"


class Call(NamedTuple):
    """A module with parameters was "called", or a parameter "received the gradient of" itself."""

    what: str
    name: str
    step: int

    def __str__(self) -> str:
        return f"{self.what} {self.name}"


class Result(NamedTuple):
    """What was seen of one rank. Bytes; seconds from its entry, without imports.

    calls: modules and gradients, in order. ZeRO fills buckets in the order of gradients, and weights that always stay
    whole are never gathered, so ranks can differ here and not in their collectives: gradients then end up in each
    other's place.
    peaks: of live tensors, by phase and kind (parameters, gradients, optimizer, other, all). resident: the process'
    peak up to the end of each phase. tasks: documents it read, by task. error: why it ended early.
    """

    rank: int
    collectives: list[Collective]
    calls: list[Call]
    peaks: dict[str, dict[str, int]]
    resident: dict[str, int]
    tasks: dict[str, int]
    seconds: float
    error: str = ""


class Report(NamedTuple):
    """A rehearsal. `problems`: sentences; the job would work, as far as this shows, where there is none."""

    world_size: int
    num_steps: int
    results: list[Result]
    planned_shard: dict[str, int]
    problems: list[str]
    seconds: float

    @property
    def verdict(self) -> str:
        """A sentence, where there is no problem."""
        num_collectives = len(self.results[0].collectives)
        tasks = Counter[str]()
        for result in self.results:
            tasks.update(result.tasks)
        read = ", ".join(f"{number:,} {task}" for task, number in sorted(tasks.items()))
        return (
            f"{listed([result.rank for result in self.results])} of {self.world_size:,} issued the same "
            f"{num_collectives:,} collectives in {self.num_steps} step(s), with documents of their own ({read}); "
            f"{self.seconds:.0f} s"
        )

    def measured(self, kind: str) -> int:
        """The most bytes of this kind on any of the ranks, in any phase."""
        return max(peaks.get(kind, 0) for result in self.results for peaks in [*result.peaks.values(), {}])

    def as_json(self) -> str:
        """Everything, with each rank's list of collectives."""
        results = []
        for result in self.results:
            collectives = [one._asdict() for one in result.collectives]
            results.append({**result._asdict(), "collectives": collectives})
            del results[-1]["calls"]
        measured = {kind: self.measured(kind) for kind in self.planned_shard}
        others = {"measured_shard": measured, "switched_off": SWITCHED_OFF, "limit": LIMIT}
        return json.dumps({**self._asdict(), **others, "results": results}, indent=2)


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


def default_ranks(world_size: int, gpus_per_node: int) -> list[int]:
    """The first, the second, one in the middle (of another node than theirs, if there is one) and the last."""
    middle = max(world_size // 2, min(gpus_per_node, world_size - 1))
    return sorted({rank for rank in (0, 1, middle, world_size - 1) if rank < world_size})


def parse_ranks(text: str) -> list[int]:
    """Of "0,1,517"; ValueError where it is something else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--ranks={text} must be numbers with commas between them, such as 0,1,517") from None


def difference(
    lists: Mapping[int, Sequence[Collective | Call]], unfinished: Sequence[int] = (), noun: str = "collective"
) -> str | None:
    """The first place at which ranks differ, in words: those that do something else than most. None where none does.

    Args:
        lists: by rank, in the order in which things were done.
        unfinished: ranks that failed; they have no say beyond their end.
    """
    for place in range(max(map(len, lists.values()), default=0)):
        here = {
            rank: lists[rank][place] if place < len(lists[rank]) else None
            for rank in sorted(lists)
            if place < len(lists[rank]) or rank not in unfinished
        }
        if len(set(here.values())) > 1:
            break
    else:
        return None
    usual = Counter(here.values()).most_common(1)[0][0]  # the lowest rank's, among equals
    odd = next(one for one in here.values() if one != usual)
    odd_ranks = [rank for rank, one in here.items() if one == odd]
    usual_ranks = [rank for rank, one in here.items() if one == usual]
    step = next(one for one in (odd, usual) if one is not None).step
    before = sum(one.step == step for one in lists[odd_ranks[0]][:place])
    return (
        f"{listed(odd_ranks)} {odd or 'did nothing more'} as {noun} {before + 1} of "
        f"{f'step {step}' if step else 'the start'}, where {listed(usual_ranks)} {usual or 'did nothing more'}"
    )


def problems_of(results: Sequence[Result]) -> list[str]:
    """A sentence for each rank that failed, and one for the first difference between them."""
    problems = [result.error for result in results if result.error]
    failed = [result.rank for result in results if result.error]
    if sentence := difference({result.rank: result.collectives for result in results}, failed):
        problems.append(f"ranks differ, and the job would hang or mix up its weights: {sentence}")
    elif sentence := difference({result.rank: result.calls for result in results}, failed, "call or gradient"):
        problems.append(f"ranks differ, and the job would mix up its gradients: {sentence}")
    return problems


def rehearse(
    config: Config,
    world_size: int,
    ranks: Sequence[int] | None = None,
    *,
    num_steps: int = 2,
    gpus_per_node: int = 8,
    progress: Callable[[str, int, int], None] = silent,
    worker: Sequence[str] = ("-m", "uvlm.rehearsal_rank"),
) -> Report:
    """Run ranks of a world of `world_size`, as many at once as there are cores. Nothing is written into the run folder.

    Args:
        ranks: `default_ranks` unless given.
        num_steps: optimizer steps; DeepSpeed prefetches from the second on.
        progress: update(what, done, total).
        worker: what Python runs for a rank.

    Raises:
        ValueError: what `check` refuses for so many ranks, or a rank outside of the world.
    """
    from uvlm.check import check

    started = time.monotonic()
    ranks = sorted(set(default_ranks(world_size, gpus_per_node) if ranks is None else ranks))
    if not ranks or not 0 <= ranks[0] <= ranks[-1] < world_size:
        given = ",".join(map(str, ranks))
        raise ValueError(
            f"--ranks={given}: a world of {world_size} has ranks 0 to {world_size - 1}; give some of these"
        )
    tree = check(config, world_size)
    with tempfile.TemporaryDirectory(prefix="uvlm-rehearsal-") as name:
        folder = Path(name)
        data = config.data.model_copy(update={"num_workers": 0})
        alone = config.model_copy(update={"run": folder / "run", "data": data})
        (folder / "config.yaml").write_text(dump_config(alone))
        (folder / "deepspeed.json").write_text(json.dumps(tree))
        results = _run_ranks(folder, world_size, ranks, num_steps, gpus_per_node, progress, worker)
    planned = _planned_shard(config, tree, world_size)
    return Report(world_size, num_steps, results, planned, problems_of(results), time.monotonic() - started)


def _run_ranks(
    folder: Path,
    world_size: int,
    ranks: Sequence[int],
    num_steps: int,
    gpus_per_node: int,
    progress: Callable[[str, int, int], None],
    worker: Sequence[str],
) -> list[Result]:
    """Start each rank as soon as a core is free; those that still run are ended with us."""
    at_once = min(len(ranks), len(os.sched_getaffinity(0)))
    num_threads = len(os.sched_getaffinity(0)) // at_once
    waiting, running, results = list(ranks), dict[int, subprocess.Popen[bytes]](), list[Result]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                rank = waiting.pop(0)
                files = [folder / name for name in ("config.yaml", "deepspeed.json", f"rank_{rank}.json")]
                command = [sys.executable, *worker, str(files[0]), str(files[1]), str(num_steps), str(files[2])]
                with (folder / f"rank_{rank}.log").open("wb") as log, hold_signals():
                    running[rank] = subprocess.Popen(
                        command,
                        env=_environment(rank, world_size, gpus_per_node, num_threads),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        preexec_fn=end_with_parent,
                    )
            time.sleep(0.05)
            for rank in [rank for rank, process in running.items() if process.poll() is not None]:
                results.append(_result(folder, rank, running.pop(rank).returncode))
                progress("ranks", len(results), len(ranks))
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return sorted(results, key=lambda result: result.rank)


def _environment(rank: int, world_size: int, gpus_per_node: int, num_threads: int) -> dict[str, str]:
    """The place of a rank, on a machine without GPU; what launchers around us have set would contradict it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    return environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % gpus_per_node),
        "LOCAL_WORLD_SIZE": str(min(gpus_per_node, world_size)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _result(folder: Path, rank: int, code: int) -> Result:
    """What a rank that has ended leaves: its result, and a sentence where it failed."""
    tree: dict[str, Any] = {"rank": rank, "collectives": [], "calls": [], "peaks": {}, "resident": {}, "tasks": {}}
    with contextlib.suppress(OSError, ValueError):
        tree = json.loads((folder / f"rank_{rank}.json").read_text())
    tree["collectives"] = [Collective(*one)._replace(elements=tuple(one[2])) for one in tree["collectives"]]
    tree["calls"] = [Call(*one) for one in tree["calls"]]
    tree["error"] = _failure(rank, code, folder / f"rank_{rank}.log") if code else ""
    return Result(**{"seconds": 0.0, **tree})


def _failure(rank: int, code: int, log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
    how = f"failed with exit code {code}"
    if code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", as Linux does where memory runs out: rehearse fewer ranks at once (--ranks), or on a larger machine"
    if len(lines) == 1 and code == 1:  # a sentence of ours
        return f"rank {rank} failed: {lines[0].removeprefix(f'rank {rank}: ')}"
    said = "\n    ".join(lines) or "nothing"
    return f"rank {rank} {how}. Its last lines:\n    {said}"


def _planned_shard(config: Config, tree: dict[str, Any], world_size: int) -> dict[str, int]:
    """Bytes of what a rank keeps of the training state, as `uvlm plan` predicts them; none where it is offloaded."""
    from data_pipeline.vocab import Vocab
    from uvlm.memory_plan import Activations, meta_model, plan_memory, shapes_of

    shapes = shapes_of(meta_model(config, Vocab.load(config.data.tokenizer).size), config)
    memory = plan_memory(shapes, tree, world_size, config.data.num_rows // world_size, Activations(0, 0, 0, 0))
    return {} if memory.host else {kind: getattr(memory, kind) for kind in ("parameters", "gradients", "optimizer")}


def show(report: Report) -> None:
    """Print the report for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def table(title: str, first: str, *columns: str) -> Table:
        made = Table(first, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            made.add_column(column, justify="right")
        return made

    console = Console(soft_wrap=not sys.stdout.isatty())
    phases = ("build", "engine", "data", "forward", "backward", "step")
    memory = table("Live tensors at most, and the whole process, MB", "rank", *phases, "process")
    for result in report.results:
        live = [result.peaks.get(phase, {}).get("all", 0) for phase in phases]
        process = max(result.resident.values(), default=0)
        memory.add_row(f"{result.rank}", *map(_megabytes, [*live, process]))
    console.print(memory)
    shard = table("Training state that a rank keeps, MB", "", "measured", "planned", "difference")
    for kind, planned in report.planned_shard.items():
        measured = report.measured(kind)
        shard.add_row(kind, _megabytes(measured), _megabytes(planned), f"{measured / max(1, planned) - 1:+.1%}")
    if report.planned_shard:
        console.print(shard)
    else:
        print("With offload, what is the device's and what the host's is one memory here: not held against the plan.\n")
    last = [one for one in report.results[0].collectives if one.step == report.num_steps]
    calls = table(f"Collectives of a step, rank {report.results[0].rank}", "", "ranks", "calls", "elements")
    for (operation, dtype, group_size), count in Counter(one[:2] + one[3:4] for one in last).most_common():
        elements = sum(sum(one.elements) for one in last if one[:2] + one[3:4] == (operation, dtype, group_size))
        calls.add_row(f"{operation} {dtype}", f"{group_size:,}", f"{count:,}", f"{elements:,}")
    console.print(calls)
    print("Switched off or left out:")
    print("\n".join(f"- {name}: {reason}" for name, reason in SWITCHED_OFF.items()))
    print(f"Not seen: {LIMIT}.\n")
    print("\n".join(report.problems) or report.verdict)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}" if num_bytes < 1e8 else f"{num_bytes / 1e6:,.0f}"
