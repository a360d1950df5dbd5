"""A plan to read and to look at: tables on the terminal, JSON, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from uvlm.memory_plan import Activations, Memory
from uvlm.plan import RUNTIME, SURENESS, Plan, remedy

WORLD_SIZES = tuple(2**n for n in range(11))
_WORDS = {
    "parameters": "weights: this rank's share, and small ones that stay whole",
    "gradients": "kept between micro-steps, and their fp32 copy at a step",
    "optimizer": "fp32 weights, Adam's moments, what an update makes",
    "buffers": "gathered layers, buckets",
    "activations": "of a micro-step",
    "logits": "of a chunk of tokens, and the head's gradient",
    "workspace": "of attention",
}


def show_plan(
    plan: Plan, worlds: Sequence[Plan], recompute: str, ways: dict[str, Activations], notes: Sequence[str]
) -> None:
    """Print the tables of a plan.

    Args:
        worlds: the same run at other world sizes.
        recompute: as the config has it. ways: activations by `recompute`.
        notes: what was assumed.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    nodes = -(-plan.num_ranks // plan.gpus_per_node)
    console.print(
        f"{_count(plan.num_parameters)} parameters, {plan.num_rows} packs a step, {plan.num_ranks} rank(s) on "
        f"{nodes} node(s), {plan.hardware.name}"
    )
    console.print(_memory_table(plan))
    table = Table(
        "recompute", "activations", "logits", "workspace", "together at most", title="with and without recomputation"
    )
    for name, made in ways.items():
        parts = (made.activations, made.logits, made.workspace, made.together)
        table.add_row(f"{name}{' (set)' if name == recompute else ''}", *map(decimal, parts))
    console.print(table)
    console.print(_step_table(plan))
    console.print(_worlds_table(worlds))
    verdict = f"{decimal(plan.needed)} of {decimal(plan.memory_limit)}"
    console.print(f"fits: {verdict}" if plan.fits else f"does NOT fit: {verdict}; {remedy(recompute)}")
    for sentence in (*(f"assumed: {note}" for note in notes), *SURENESS):
        console.print(f"- {escape(sentence)}")


def plan_json(
    plan: Plan, worlds: Sequence[Plan], recompute: str, ways: dict[str, Activations], notes: Sequence[str]
) -> str:
    """The same as one JSON object; bytes, seconds, FLOPs."""
    tree: dict[str, Any] = {
        "plan": _tree(plan),
        "worlds": [_tree(each) for each in worlds],
        "recompute": recompute,
        "activations": {name: made._asdict() for name, made in ways.items()},
        "assumed": list(notes),
        "sureness": list(SURENESS),
    }
    return json.dumps(tree, indent=2)


def draw_plan(worlds: Sequence[Plan], path: Path) -> None:
    """A PNG: memory of a rank by part, and time of a step, over world sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    names = [str(plan.num_ranks) for plan in worlds]
    bottom = [0.0] * len(worlds)
    for part in _WORDS:
        heights = [getattr(plan.memory, part) / 1e9 for plan in worlds]
        memory.bar(names, heights, bottom=bottom, label=part)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    peaks = [plan.memory.total / 1e9 for plan in worlds]
    memory.plot(names, peaks, "kD", markersize=5, label="peak of the sum")
    memory.axhline(worlds[0].memory_limit / 1e9, color="black", linestyle="--", label="memory of one rank")
    memory.set(title="Memory of a rank, each part at its peak", xlabel="ranks", ylabel="GB")
    memory.legend(fontsize="small")
    speed.plot(names, [plan.step_seconds for plan in worlds], "o-", label="seconds of a step (estimate)")
    speed.set(title="Time of a step, and its share of the peak", xlabel="ranks", ylabel="s", yscale="log")
    share = speed.twinx()
    share.plot(names, [100 * plan.mfu for plan in worlds], "s--", color="tab:green", label="model FLOPs utilisation")
    share.set(ylabel="%", ylim=(0, 100))
    lines = [*speed.get_lines(), *share.get_lines()]
    speed.legend(lines, [str(line.get_label()) for line in lines], fontsize="small", loc="lower left")
    figure.savefig(path, dpi=120)


def _memory_table(plan: Plan) -> Table:
    table = Table("part", "size", "what", title="memory of one rank, each part at its peak")
    for part, words in _WORDS.items():
        table.add_row(part, decimal(getattr(plan.memory, part)), words)
    table.add_row("peak of the sum", decimal(plan.memory.total), "parts do not peak together", style="bold")
    if plan.hardware.is_gpu:
        table.add_row("runtime", decimal(RUNTIME), "CUDA, NCCL, fragments: assumed")
    if plan.memory.host:
        table.add_row("host", decimal(plan.memory.host), "a rank's share of what offload keeps in its node's memory")
    return table


def _step_table(plan: Plan) -> Table:
    table = Table("a step", "value", title="what a step takes")
    table.add_row("FLOPs", f"{_count(plan.flops, 'FLOP')}, {plan.flops / plan.dense_flops:.0%} of dense")
    if plan.executed_flops != plan.flops:
        table.add_row("with recomputation", _count(plan.executed_flops, "FLOP"))
    for task, value in plan.flops_per_token.items():
        table.add_row(f"FLOPs of a token, {task}", _count(value, "FLOP"))
    gather, reduce, inside = plan.communication
    within = f", within its group {decimal(inside)}" if inside else ""
    table.add_row("a rank sends", f"weights {decimal(gather)}{within}, gradients {decimal(reduce)}")
    table.add_row("time (estimate)", f"{plan.step_seconds:.3g} s, MFU {plan.mfu:.2f}")
    table.add_row("tokens/s (estimate)", f"{plan.tokens_per_second:,.0f}")
    table.add_row("a checkpoint", decimal(plan.checkpoint_bytes))
    return table


def _worlds_table(worlds: Sequence[Plan]) -> Table:
    columns = ("ranks", "rows", "a rank takes", "fits", "it sends a step", "s a step", "MFU", "tokens/s")
    table = Table(*columns, title="by world size (times are estimates; rows are raised to what the ranks divide)")
    for plan in worlds:
        table.add_row(
            f"{plan.num_ranks:,}",
            f"{plan.num_rows:,}",
            decimal(plan.needed),
            "yes" if plan.fits else "no",
            decimal(plan.communication.total),
            f"{plan.step_seconds:.3g}",
            f"{plan.mfu:.2f}",
            f"{plan.tokens_per_second:,.0f}",
        )
    return table


def _tree(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "hardware": plan.hardware.name, "needed": plan.needed, "fits": plan.fits}


def _count(number: float, unit: str = "") -> str:
    """Three digits and a letter: 7.73B parameters, 43.2 PFLOP."""
    letters = "KMGTPE" if unit else "KMBT"
    power = min(len(letters), max(0, int(math.log10(number) // 3))) if number >= 1 else 0
    return f"{number / 1000**power:.3g}{' ' if unit else ''}{('', *letters)[power]}{unit}"


assert set(_WORDS) | {"total", "host"} == {field.name for field in fields(Memory)}
