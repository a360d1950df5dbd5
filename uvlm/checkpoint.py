"""Checkpoints: engine state, data state of what was *consumed*, and what the run must agree with.

`Saver.save` copies the state of this rank and returns; a thread of each rank writes it into a folder with a temporary
name while the training goes on. `Saver.finish` is called by all ranks once all have written: rank 0 adds `state.json`,
which lists every file with its size and checksum and whose presence marks a checkpoint complete, and renames the
folder. So a half-written one is never taken for the latest. Where a disk is full, one sentence is printed, what had
been written is removed, older checkpoints stay, and the training goes on.

`load_latest` compares every file with its checksum before DeepSpeed unpickles any, each rank those that it wrote, and
all ranks refuse together. A checkpoint of another number of ranks is converted on the way.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from data_pipeline.loader import DataState
from uvlm import checkpoint_files
from uvlm.backbone import fingerprint
from uvlm.checkpoint_files import (
    MARKER,
    FileRecord,
    damage,
    publish,
    read_marker,
    remove,
    remove_leftovers,
    step_of,
    write_marker,
)
from uvlm.collectives import from_rank_0, on_all_ranks
from uvlm.config import Config
from uvlm.conversion import load_converted
from uvlm.engine import Engine
from uvlm.trust import why_not

FORMAT_VERSION = 2
_POLL_SECONDS = 0.2
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
    "optim.embedding_rate",
    "optim.projection_rate",
)


class Position(NamedTuple):
    """Where a run stands: steps done and the state of each row after them."""

    step: int
    data_state: DataState | None


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    step: int
    data_state: DataState
    metrics: Mapping[str, float]


class _Part(NamedTuple):
    """What a rank has written of a checkpoint, or why it could not."""

    files: list[FileRecord]
    error: str | None
    data_state: DataState


class Saver:
    """Writes the checkpoints of a run. All ranks make the same calls at the same steps.

    Args:
        fixed: what `fixed_values` gave for this run.
        waiting: called now and then while `finish` waits for the disk.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        fixed: Mapping[str, Any],
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._waiting = waiting
        self._engine = engine
        self._config = config
        self._fixed = fixed
        self._folder = config.run / "checkpoints"
        self._pending: _Pending | None = None
        self._complete: _Pending | None = None  # the newest of this start
        self._num_bytes = 0

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, or could not. `finish` should follow once it is so on all."""
        return self._engine.is_written

    def save(self, step: int, data_state: DataState, metrics: Mapping[str, float]) -> bool:
        """Copy the state after `step` steps and begin to write checkpoints/step_*; the one before is finished first.

        Args:
            data_state: state by row of this rank's rows, after the packs of step `step - 1`.
            metrics: the last record, to be read beside the checkpoint.

        Returns:
            False, after a sentence, where the disk has no room for it, or without `checkpoint.background` where it
            could not be written.
        """
        self.finish()
        last = self._complete
        if last and last.step == step and on_all_ranks(last.data_state == data_state, self._engine.device):
            return True
        folder = _partial(step)
        if sentence := from_rank_0(lambda: self._prepare(folder)):
            return self._left_out(step, sentence)
        self._engine.save(self._folder, folder)
        self._pending = _Pending(step, data_state, metrics)
        return self._config.checkpoint.background or self.finish()

    def finish(self) -> bool:
        """Wait until all ranks have written what `save` began, and make it complete; nothing to do is well done.

        Returns:
            False, after a sentence, where a rank could not write. Older checkpoints are then as they were.
        """
        if self._pending is None:
            return True
        # Not one long collective: a slow disk is no hung rank.
        while not on_all_ranks(self.is_written, self._engine.device):
            self._waiting()
            time.sleep(_POLL_SECONDS)
        pending, self._pending = self._pending, None
        try:
            part = _Part(self._engine.written(), None, pending.data_state)
        except OSError as error:
            sentence = f"rank {dist.get_rank()} could not write {error.filename} ({error.strerror})"
            part = _Part([], sentence, pending.data_state)
        parts: list[_Part] | None = [part] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(part, parts)
        if failed := from_rank_0(lambda: self._make_complete(pending, parts or [])):
            return self._left_out(pending.step, failed)
        self._complete = pending
        return True

    def _left_out(self, step: int, sentence: str) -> bool:
        if dist.get_rank() == 0:
            print(f"no checkpoint of step {step}: {sentence}; older ones are untouched", flush=True)
        return False

    def _prepare(self, name: str) -> str | None:
        """On rank 0: make an empty folder, or say why there is no use in writing."""
        try:
            remove_leftovers(self._folder)
            (self._folder / name).mkdir(parents=True)
            free, needed = shutil.disk_usage(self._folder).free, self._num_bytes or self._engine.checkpoint_bytes
        except OSError as error:
            return f"{self._folder} cannot be written ({error.strerror})"
        if free >= needed:
            return None
        (self._folder / name).rmdir()
        return f"{self._folder} needs {needed / 1e6:,.0f} MB for it and its disk has {free / 1e6:,.0f} MB free"

    def _make_complete(self, pending: _Pending, parts: list[_Part]) -> str | None:
        """On rank 0: marker, final name, retention; or a clause about what could not be written, and nothing left."""
        folder = self._folder / _partial(pending.step)
        failed = next((part.error for part in parts if part.error), None)
        if not failed:
            try:
                write_marker(folder, self._state(pending, parts))
                publish(folder, self._folder / _name(pending.step))
            except OSError as error:
                failed = f"rank 0 could not write {error.filename or folder} ({error.strerror})"
        if failed:
            shutil.rmtree(folder, ignore_errors=True)
            return failed
        self._num_bytes = sum(file.num_bytes for part in parts for file in part.files)
        self._retain(pending.step)
        return None

    def _state(self, pending: _Pending, parts: list[_Part]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": pending.step,
            "world_size": len(parts),
            "fixed": self._fixed,
            "policy": self._config.policy.model_dump(mode="json"),
            "metrics": dict(pending.metrics),
            "rows": {str(row): state for part in parts for row, state in part.data_state.items()},
            "files": {
                file.name: {"bytes": file.num_bytes, "sha256": file.sha256, "rank": rank}
                for rank, part in enumerate(parts)
                for file in part.files
            },
        }

    def _retain(self, newest_step: int) -> None:
        """Remove what is neither among the newest nor kept for good.

        Checkpoints of later steps than the one just written are not this start's, which fell back behind them: they do
        not count, and are not touched.
        """
        rule = self._config.checkpoint
        written = [folder for folder in complete(self._config.run) if step_of(folder) <= newest_step]
        try:
            for folder in written[: -rule.keep]:
                if not rule.keep_every or step_of(folder) % rule.keep_every:
                    remove(folder)
        except OSError as error:
            print(f"an old checkpoint cannot be removed ({error}); remove it by hand", flush=True)


def complete(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return checkpoint_files.complete(run / "checkpoints")


def load_latest(
    engine: Engine, config: Config, fixed: Mapping[str, Any] | None = None, trust: bool = False
) -> Position:
    """Bring the engine to the newest complete checkpoint, or stay at the start where there is none. All ranks call it.

    Nothing is deleted. With `checkpoint.fall_back`, damaged ones are passed over, with a sentence.

    Args:
        fixed: what `fixed_values` gave, at a start; none is needed where a run goes back to its own checkpoint.
        trust: open a checkpoint that is not this user's own (trust.py).

    Raises:
        ValueError: on all ranks; it is damaged, of another run (`check_fits`), or cannot be loaded here.
    """
    found = from_rank_0(lambda: complete(config.run))
    while found:
        folder = found.pop()
        state = from_rank_0(partial(read_marker, folder))
        wrong = state if isinstance(state, str) else _wrong_somewhere(folder, state)
        if isinstance(state, str) or wrong:
            _refuse_unless_older(str(wrong), found, config)
            if dist.get_rank() == 0:
                print(f"{wrong}; this checkpoint is passed over and stays as it is", flush=True)
            continue
        if fixed is not None:
            _check_state(folder, state, config, fixed)
        if sentence := from_rank_0(partial(why_not, folder, config.run, trust)):
            raise ValueError(sentence)
        if state["world_size"] == dist.get_world_size():
            engine.load(folder, trust=trust)
        else:
            load_converted(engine, folder, state["world_size"], trust)
        if dist.get_rank() == 0:
            print(f"goes on from step {state['step']}: {folder}", flush=True)
        return Position(state["step"], {int(row): value for row, value in state["rows"].items()})
    return Position(0, None)


def _wrong_somewhere(folder: Path, state: Mapping[str, Any]) -> str | None:
    """A clause, the same on all ranks, about a file that is not as it was written; each rank looks at its share."""
    if state["format_version"] != FORMAT_VERSION:
        return None  # refused for that
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    share = [
        FileRecord(name, file["bytes"], file["sha256"])
        for name, file in state["files"].items()
        if file["rank"] % num_ranks == rank
    ]
    wrong: list[str | None] = [None] * num_ranks
    dist.all_gather_object(wrong, damage(folder, share))
    return next(filter(None, wrong), None)


def _refuse_unless_older(wrong: str, older: list[Path], config: Config) -> None:
    """ValueError where a checkpoint is damaged, unless there is an older one that may be used."""
    if not older:
        raise ValueError(f"{wrong}, and {config.run} has no older checkpoint; start a new run folder")
    if not config.checkpoint.fall_back:
        raise ValueError(f"{wrong}; checkpoint.fall_back=true goes on from step {step_of(older[-1])}")


def check_fits(config: Config, fixed: Mapping[str, Any]) -> None:
    """Raise ValueError, with both values and a remedy, where the newest checkpoint cannot go on with this config.

    It needs no other ranks and reads no more than a marker, so it comes before anything is built.
    """
    found = complete(config.run)
    if not found and (incomplete := sorted((config.run / "checkpoints").glob("step_*"))):
        raise ValueError(
            f"{incomplete[-1]} is there, but it has no {MARKER}, and {config.run} has no complete checkpoint; move "
            f"{config.run} away to begin anew, or put the file back"
        )
    while found:
        folder = found.pop()
        state = read_marker(folder)
        if not isinstance(state, str):
            return _check_state(folder, state, config, fixed)
        _refuse_unless_older(state, found, config)


def refuse_newer(folder: Path, state: Mapping[str, Any]) -> None:
    """ValueError where a checkpoint has a format that only a newer uvlm reads."""
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{folder} was written by a newer uvlm (format {state['format_version']}); update uvlm")


def _check_state(folder: Path, state: Mapping[str, Any], config: Config, fixed: Mapping[str, Any]) -> None:
    refuse_newer(folder, state)
    if state["format_version"] < FORMAT_VERSION:
        raise ValueError(
            f"{folder} was written by an older uvlm (format {state['format_version']}), without checksums; finish the "
            "run with that one, or start a new run folder, with its trained model as model.init_from"
        )
    for key in {**state["fixed"], **fixed}:
        value = fixed.get(key)
        if state["fixed"].get(key) != value:
            raise ValueError(
                f"{folder} was written with {key}={state['fixed'].get(key)!r}, this config has {value!r}; "
                "set it back, or start a new run folder"
            )
    last_step = config.optim.steps
    if state["step"] > last_step:
        raise ValueError(
            f"{folder} has more steps than optim.steps={last_step}; set optim.steps to {state['step']} or more, "
            "or start a new run folder"
        )
    if state["step"] == last_step and state["policy"] != config.policy.model_dump(mode="json"):
        raise ValueError(
            f"{config.run} has done all of optim.steps={last_step} with another policy than this; set optim.steps to "
            "more to go on with this one, or start a new run folder"
        )


def fixed_values(config: Config, vocab: str, zero_stage: int) -> dict[str, Any]:
    """What a run may not change under its own checkpoints, by name. `vocab`: fingerprint of the vocabulary."""
    tree = config.model_dump(mode="json", exclude={"model": {"init_from"}})  # a folder may move
    values: dict[str, Any] = {
        "vocabulary": vocab,
        "data.train (names)": [source.source().name for source in config.data.train],
        "zero_optimization.stage": zero_stage,
    }
    for key in _FIXED:
        value = tree
        for part in key.split("."):
            value = value[part]
        values.update({f"{key}.{name}": part for name, part in value.items()} if key == "model" else {key: value})
    if config.model.init_from:
        values["model.init_from (its config.json)"] = fingerprint(config.model.init_from)
    if any(own := config.policy.own_projections(config.model.num_layers)):
        values["policy.input_projections and policy.target_projections, by layer"] = own
    return values


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _partial(step: int) -> str:
    return f".partial_{_name(step)}"
