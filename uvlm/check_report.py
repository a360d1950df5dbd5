"""`uvlm check`: all that `look` finds and learns about a run, with its memory, as one object, and as tables of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uvlm import checkpoint
from uvlm import deepspeed_schema as schema
from uvlm.check import Checked, look
from uvlm.config import Config, load_config
from uvlm.deepspeed_config import AUTOMATIC, OWNED_BY_YAML, find_faults, read_deepspeed_json
from uvlm.finding import Finding, errors

_FORMULAS = dict(zip(AUTOMATIC, ("h²", "0.9 h²", "10 h"), strict=True))
_DEFAULT_RANKS = 8  # of a node of GPUs that is not told
_NEARLY_FULL = 0.9  # of a GPU's memory


class Place(NamedTuple):
    """Where a run is to go. `gpu_memory` in GB, None where it is not known; `words` for people."""

    num_nodes: int
    ranks_per_node: int
    on_gpus: bool | None
    gpu_memory: float | None
    words: str

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


def choose_place(num_rows: int, nodes: int | None, gpus_per_node: int | None, gpu_memory: float | None) -> Place:
    """As told; a run that is told nodes, GPUs of a node or a memory is one on GPUs.

    Where neither nodes nor GPUs of a node are told: the most ranks of one node that `num_rows` divides over, of this
    machine, or of 8 GPUs where a memory is told.
    """
    if nodes or gpus_per_node:
        nodes, ranks = nodes or 1, gpus_per_node or _DEFAULT_RANKS
        return Place(nodes, ranks, True, gpu_memory, f"{nodes * ranks} ranks: {nodes} nodes of {ranks} GPUs")
    here = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    limit = _DEFAULT_RANKS if gpu_memory else here
    ranks = max(size for size in range(1, limit + 1) if num_rows % size == 0)
    if gpu_memory:
        return Place(1, ranks, True, gpu_memory, f"{ranks} ranks: one node of {ranks} GPUs")
    if torch.cuda.is_available():
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    what = "GPUs" if torch.cuda.is_available() else "cores"
    return Place(
        1, ranks, None, gpu_memory, f"{ranks} ranks: of this machine with {here} {what}; --nodes asks for more"
    )


def examine(
    path: Path, overrides: Sequence[str], nodes: int | None, gpus_per_node: int | None, gpu_memory: float | None
) -> dict[str, Any]:
    """Check a config for a place. What comes back is plain values, as `--json` prints it."""
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        findings = [Finding("error", "config", str(error)), *_json_of_a_broken_yaml(path)]
        return {"config": str(path), "ok": False, "findings": [finding._asdict() for finding in findings]}
    place = choose_place(config.data.num_rows, nodes, gpus_per_node, gpu_memory)
    memory_bytes = place.gpu_memory and place.gpu_memory * 1e9
    told = place.ranks_per_node if place.on_gpus else None
    checked = look(config, place.num_ranks, True, place.on_gpus, told, memory_bytes)
    memory = _memory(checked, config, place)
    findings = list(dict.fromkeys(checked.findings))
    names = [folder.name for folder in checkpoint.complete(config.run)] if config.run.is_dir() else []
    return {
        "config": str(path),
        "ok": not errors(findings),
        "ranks": place.num_ranks,
        "place": place.words,
        "findings": [finding._asdict() for finding in findings],
        "deepspeed": {"file": str(config.deepspeed), "values": list(_values(checked))},
        "data": checked.documents,
        "vocabulary": checked.vocab and {"fingerprint": checked.vocab.fingerprint, "tokens": checked.vocab.size},
        "parameters": sum(checked.shapes) or None,
        "checkpoints": {
            "run": str(config.run),
            "complete": names,
            "fit": not any(one.level == "error" and one.key == "run" for one in findings),
        },
        "disk": checked.disk and {"needed": checked.disk[0], "free": checked.disk[1]},
        "memory": memory,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Findings first, then what the run would be given."""
    _show_findings(report, console)
    if "place" not in report:
        return
    console.print(f"[bold]{report['place']}[/]")
    _print(console, f"DeepSpeed values: {report['deepspeed']['file']}", _values_table(report["deepspeed"]))
    facts = _table("what", "value")
    for name, value in _facts(report):
        facts.add_row(name, escape(value))
    _print(console, "Run", facts)
    if memory := report["memory"]:
        parts = _table("part", "GB")
        for name, size in memory["parts"].items():
            parts.add_row(name, f"{size / 1e9:,.3f}", style="bold" if name == "total" else "")
        _print(console, "Memory of one rank, predicted; each part at its own peak", parts)
        for note in memory["assumed"]:
            console.print(f"assumed: {escape(note)}", soft_wrap=True)


def _values_table(deepspeed: dict[str, Any]) -> Table:
    """In bold what differs from DeepSpeed's own defaults."""
    table = _table("key", "value", "default", "from")
    rows = deepspeed["values"]
    for section in dict.fromkeys(row["key"].rpartition(".")[0] for row in rows):
        if section:
            table.add_row(section, style="cyan")
        for row in rows:
            parent, _, name = row["key"].rpartition(".")
            if parent == section:
                style = "bold" if row["value"] != row["default"] else "dim"
                indent = "  " if section else ""
                table.add_row(indent + name, _word(row["value"]), _word(row["default"]), row["from"], style=style)
    return table


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, default=str)


def _show_findings(report: dict[str, Any], console: Console) -> None:
    for level, style in (("error", "bold red"), ("warning", "yellow")):
        for finding in report["findings"]:
            if finding["level"] == level:
                reference = finding["reference"]
                source = "" if not reference else " (reproduced)" if reference == "run" else f"\n  {reference}"
                console.print(f"[{style}]{level}[/] {escape(finding['sentence'] + source)}", soft_wrap=True)
    counts = [sum(one["level"] == level for one in report["findings"]) for level in ("error", "warning")]
    console.print(f"[bold]errors: {counts[0]}, warnings: {counts[1]}[/] in {escape(report['config'])}", soft_wrap=True)


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, documents in report["data"].items():
        yield name, f"{documents:,} documents"
    if vocabulary := report["vocabulary"]:
        yield "vocabulary", f"{vocabulary['fingerprint']}, {vocabulary['tokens']:,} tokens"
    if report["parameters"]:
        yield "parameters", f"{report['parameters']:,}"
    checkpoints = report["checkpoints"]
    if names := checkpoints["complete"]:
        fits = "goes on from it" if checkpoints["fit"] else "does not fit"
        yield "checkpoints", f"{len(names)}, newest {names[-1]}: {fits}"
    else:
        yield "checkpoints", f"none in {checkpoints['run']}: starts anew"
    if disk := report["disk"]:
        yield "disk", f"{disk['needed'] / 1e9:,.2f} GB needed, {disk['free'] / 1e9:,.2f} GB free"


def _values(checked: Checked) -> Iterator[dict[str, Any]]:
    """Every value that DeepSpeed is given: the key, its value, DeepSpeed's own default, and who set it."""
    for key, value in _leaves(checked.tree or {}):
        owner = OWNED_BY_YAML.get(key) or OWNED_BY_YAML.get(key.partition(".")[0])
        written = dict(_leaves(checked.user_tree or {})).get(key)
        source = f"YAML: {owner}" if owner else "uvlm" if written is None else "JSON"
        if written == "auto" and key in _FORMULAS:
            source = f"JSON: auto, {_FORMULAS[key]}"
        yield {"key": key, "value": value, "default": schema.default(key), "from": source}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _memory(checked: Checked, config: Config, place: Place) -> dict[str, Any] | None:
    """What a rank is predicted to need, held against the memory of its GPU; None where no prediction can be made."""
    if checked.user_tree is None or errors(find_faults(checked.user_tree, config.model_dump(mode="json"))):
        return None  # it is told already
    from uvlm.hardware import HARDWARE
    from uvlm.plan import Planner, remedy

    on_gpus = torch.cuda.is_available() if place.on_gpus is None else place.on_gpus
    hardware = HARDWARE["h100"] if on_gpus else None  # no time is shown, so any GPU does
    planner = checked.ask("memory", Planner, config, hardware)
    if planner is None:
        return None
    plan = planner.at(place.num_ranks, place.ranks_per_node)
    is_told = any(one.key in ("data.train", "data.tokenizer") for one in checked.findings)
    if planner.sample.notes and not is_told:  # shards are there, and nothing of them fits into a pack, say
        checked.findings.append(Finding("error", "data.train", planner.sample.notes[0]))
    limit = place.gpu_memory and place.gpu_memory * 1e9
    if limit or not on_gpus:  # of a CPU's memory a bucket takes only what gradients have filled of it
        share = plan.needed / (limit or plan.memory_limit)
        needed = f"{plan.needed / 1e9:,.1f} GB of {(limit or plan.memory_limit) / 1e9:,.3g} GB"
        sentence = f"a rank is predicted to need {needed}; {remedy(config.recompute)}"
        if share > _NEARLY_FULL:
            checked.findings.append(Finding("error" if share > 1 and on_gpus else "warning", "memory", sentence))
    parts = asdict(plan.memory)
    host, tensors = parts.pop("host"), parts.pop("total")
    parts |= {"runtime": plan.needed - tensors, "total": plan.needed, "host": host}
    return {"parts": parts, "gpu_memory": limit, "assumed": list(planner.sample.notes)}


def _json_of_a_broken_yaml(path: Path) -> list[Finding]:
    """Faults of the JSON that a YAML names which has faults of its own."""
    try:
        tree = yaml.safe_load(path.read_text())
        return find_faults(read_deepspeed_json(Path(str(tree.get("deepspeed", "zero3.json")))), tree)
    except (OSError, yaml.YAMLError, AttributeError):
        return []
    except ValueError as error:
        return [Finding("error", "deepspeed", str(error))]


def _word(value: Any) -> str:
    return f"{value:,}" if type(value) is int else escape(json.dumps(value, default=str))


def _print(console: Console, title: str, table: Table) -> None:
    console.print(f"\n[bold]{escape(title)}[/]", table, sep="\n", soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
