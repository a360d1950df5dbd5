"""The commands that know before a job starts: check, plan, rehearse, tune."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML, a shipped name, or a run folder")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="config keys to set, such as optim.steps=100")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, max=100_000, help="number of nodes")]
Gpus = Annotated[int, typer.Option("--gpus-per-node", min=1, max=1024, help="ranks of each node")]
GpuMemory = Annotated[float | None, typer.Option("--gpu-memory", min=0.1, max=100_000, help="GB of one GPU")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="of GPUs; else this machine")] = None,
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="ranks of each node")] = None,
    gpu_memory: GpuMemory = None,
    json: Json = False,
) -> None:
    """Everything that can be known before a job starts. Exit code 1 where it could not work, 0 with warnings."""
    from rich.console import Console

    from uvlm.check_report import as_json, examine, show

    report = examine(config, overrides or [], nodes, gpus_per_node, gpu_memory)
    if json:
        print(as_json(report))
    else:
        show(report, Console())
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 8,
    gpu_memory: GpuMemory = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="a100, h100, h200, b200, or this: CPUs of this machine")
    ] = "h100",
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", min=1, help="where there is no tokenizer yet")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to draw as well")] = None,
    json: Json = False,
) -> None:
    """Memory of a GPU by part, FLOPs, communication, checkpoint and time of a step, over world sizes. Seconds."""
    from uvlm.config import load_config
    from uvlm.hardware import find_hardware
    from uvlm.pictures import check_png
    from uvlm.plan import Planner
    from uvlm.plan_report import WORLD_SIZES, draw_plan, plan_json, show_plan
    from uvlm.sample import take_sample

    if out:
        check_png(out)
    resolved = load_config(config, overrides or [])
    machine = find_hardware(hardware)
    limit = round(gpu_memory * 1e9) if gpu_memory else None
    planner = Planner(resolved, machine, limit, take_sample(resolved, vocab_size))
    ways = {
        way: planner.made
        if way == resolved.recompute
        else planner.made_with(resolved.model_copy(update={"recompute": way}))
        for way in ("none", "selective", "full")
    }
    worlds = [planner.at(size, gpus_per_node) for size in WORLD_SIZES]
    chosen, notes = planner.at(nodes * gpus_per_node, gpus_per_node), list(planner.sample.notes)
    if chosen.num_rows != resolved.data.num_rows:
        notes.append(
            f"data.num_rows={chosen.num_rows}, as {chosen.num_ranks} ranks do not divide {resolved.data.num_rows}"
        )
    arguments = (chosen, worlds, resolved.recompute, ways, notes)
    if json:
        print(plan_json(*arguments))
    else:
        show_plan(*arguments)
    if out:
        draw_plan(worlds, out)
        print(out)


@app.command()
def rehearse(
    config: ConfigPath,
    world: Annotated[int, typer.Option("--world", min=1, help="ranks of the job")],
    overrides: Overrides = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="such as 0,1,517; else the first two, one in the middle, the last")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="optimizer steps of each rank")] = 2,
    gpus_per_node: Gpus = 8,
    json: Json = False,
) -> None:
    """Some ranks of a world of any size, for real but each alone, here: their memory, and whether they do the same."""
    import signal

    from uvlm import rehearse as rehearsal
    from uvlm.config import load_config
    from uvlm.progress import bars

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: its ranks end, and its folder goes
    chosen = rehearsal.parse_ranks(ranks) if ranks else None
    resolved = load_config(config, overrides or [])
    with contextlib.nullcontext(rehearsal.silent) if json else bars() as update:
        report = rehearsal.rehearse(
            resolved, world, chosen, num_steps=steps, gpus_per_node=gpus_per_node, progress=update
        )
    if json:
        print(report.as_json())
    else:
        rehearsal.show(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def tune(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="ranks of each node; else as Slurm says, else all GPUs")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", min=0.1, help="minutes, over all starts")] = 10.0,
    out: Annotated[Path | None, typer.Option("--out", help="folder of the search; else RUN/tune")] = None,
    gpu_memory: GpuMemory = None,
) -> None:
    """Measure which batch shape, recomputation and DeepSpeed JSON train fastest here. Run again to go on.

    Inside a Slurm allocation (salloc, or a batch script) it takes all of its nodes, one trial after the other.
    """
    import shlex
    import signal

    from uvlm import tune as tuning
    from uvlm.config import load_config
    from uvlm.tune_trial import Place

    words = overrides or []
    resolved = load_config(config, words)
    place, out = Place.of_environment(nproc), (out or resolved.run / "tune").absolute()
    print(f"{place.num_ranks} rank(s), {budget:g} minutes; results in {out}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is ended: as Ctrl-C, the trial ends too
    memory = gpu_memory * 1e9 if gpu_memory else None
    verdict, winner = tuning.tune(resolved, place, out, budget, memory, lambda line: print(line, flush=True))
    print(f"{verdict}\nreport: {out / 'report.md'}\nto use it:")
    print(shlex.join(tuning.command(str(config), words, winner, place, out)))
