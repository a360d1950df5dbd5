"""Checkpoints: engine state, data state of what was *consumed*, and what the run must agree with.

A checkpoint is written into a folder with a temporary name by all ranks. Rank 0 adds `state.json`, whose presence marks
it complete, and renames the folder; so a half-written one is never taken for the latest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from data_pipeline.files import replace_file
from data_pipeline.loader import DataState
from uvlm.backbone import fingerprint
from uvlm.config import Config
from uvlm.engine import Engine

FORMAT_VERSION = 1
MARKER = "state.json"
# What a run may not change under its own checkpoints; everything else (steps, rates, logging) may.
_FIXED = (
    "seed",
    "dtype",
    "model",
    "data.pack_tokens",
    "data.num_rows",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
)


class Position(NamedTuple):
    """Where a run stands: steps done and the state of each row after them."""

    step: int
    data_state: DataState | None


def save(engine: Engine, config: Config, step: int, data_state: DataState, fixed: Mapping[str, Any]) -> None:
    """Write checkpoints/step_* and drop those beyond `checkpoint.keep`. All ranks call it at the same step.

    Args:
        data_state: state by row of this rank's rows, after the packs of step `step - 1`.
        fixed: what `fixed_values` gave for this run.
    """
    folder = config.run / "checkpoints"
    name = f"step_{step:08d}"
    partial = f".partial_{name}"
    if dist.get_rank() == 0:
        for leftover in folder.glob(".partial_*"):
            shutil.rmtree(leftover)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save(folder, partial)
    states: list[DataState] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(states, data_state)  # returns after every rank has written its part
    if dist.get_rank() == 0:
        state = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": dist.get_world_size(),
            "fixed": fixed,
            "policy": config.policy.model_dump(mode="json"),
            "rows": {str(row): state for part in states for row, state in part.items()},
        }
        replace_file(folder / partial / MARKER, json.dumps(state))
        _remove(folder / name)
        (folder / partial).replace(folder / name)
        for old in complete(config.run)[: -config.checkpoint.keep]:
            _remove(old)
    dist.barrier()


def _remove(checkpoint: Path) -> None:
    """The marker goes first, so that a removal cut short leaves nothing that looks complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def complete(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(marker.parent for marker in (run / "checkpoints").glob(f"step_*/{MARKER}"))


def load_latest(engine: Engine, run: Path) -> Position:
    """Bring the engine to the newest complete checkpoint, or stay at the start where there is none.

    `check_fits` comes before: what does not fit is refused before anything is built.
    """
    found = complete(run)
    if not found:
        return Position(0, None)
    state = _read(found[-1])
    engine.load(found[-1].parent, found[-1].name)
    return Position(state["step"], {int(row): value for row, value in state["rows"].items()})


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / MARKER).read_text())
        if isinstance(state, dict) and {"format_version", "step", "world_size", "fixed", "rows"} <= set(state):
            return state
    except ValueError:
        pass
    raise ValueError(f"{checkpoint / MARKER} is damaged; remove {checkpoint} to go on from the checkpoint before it")


def check_fits(
    run: Path, fixed: Mapping[str, Any], world_size: int, last_step: int, policy: Mapping[str, Any] | None = None
) -> None:
    """Raise ValueError, with both values and a remedy, where the newest checkpoint cannot go on with these.

    Args:
        policy: of this start, as plain values. It may change in a run, but not after the last step.
    """
    found = complete(run)
    if not found:
        return
    folder = found[-1]
    state = _read(folder)
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{folder} was written by a newer uvlm (format {state['format_version']}); update uvlm")
    for key in {**state["fixed"], **fixed}:
        value = fixed.get(key)
        if state["fixed"].get(key) != value:
            raise ValueError(
                f"{folder} was written with {key}={state['fixed'].get(key)!r}, this config has {value!r}; "
                "set it back, or start a new run folder"
            )
    if state["step"] > last_step:
        raise ValueError(
            f"{folder} has more steps than optim.steps={last_step}; set optim.steps to {state['step']} or more, "
            "or start a new run folder"
        )
    if state["step"] == last_step and policy and state.get("policy", policy) != policy:
        raise ValueError(
            f"{run} has done all of optim.steps={last_step} with another policy than this; set optim.steps to more to "
            "go on with this one, or start a new run folder"
        )
    written_by = state["world_size"]
    if written_by != world_size:
        raise ValueError(
            f"{folder} was written by {written_by} ranks and this start has {world_size}; "
            f"start it with {written_by} ranks: uvlm launch {run / 'config.yaml'} --nproc {written_by}"
        )


def fixed_values(config: Config, vocab: str, zero_stage: int) -> dict[str, Any]:
    """What a run may not change under its own checkpoints, by name. `vocab`: fingerprint of the vocabulary."""
    tree = config.model_dump(mode="json", exclude={"model": {"pretrained"}})  # a folder may move
    values: dict[str, Any] = {
        "vocabulary": vocab,
        "data.train (names)": [source.source().name for source in config.data.train],
        "zero_optimization.stage": zero_stage,
    }
    for key in _FIXED:
        value = tree
        for part in key.split("."):
            value = value[part]
        values[key] = value
    if config.model.pretrained:
        values["model.pretrained (its config.json)"] = fingerprint(config.model.pretrained)
    if any(own := config.policy.own_projections(config.model.num_layers)):
        values["policy.input_projections and policy.target_projections, by layer"] = own
    return values
