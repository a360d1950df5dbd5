"""An engine that stands for DeepSpeed, alone, and checkpoints that it writes through the real `StateWriter`."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import torch

from uvlm.checkpoint import Position, Saver, complete, fixed_values, load_latest
from uvlm.checkpoint_files import MARKER, FileRecord, StateWriter, read_marker, write_marker
from uvlm.config import Config, load_config
from uvlm.engine import Engine

FILES = ("model_states.pt", "optim_states.pt")


class OneRank:
    """Stands for DeepSpeed: two files for each checkpoint, whose tensor the training changes after every save."""

    device = torch.device("cpu")
    checkpoint_bytes = 1000

    def __init__(self, background: bool = True, gate: threading.Event | None = None) -> None:
        self.weights = torch.zeros(1000)
        self.loaded: list[str] = []
        self._writer = StateWriter(background)
        self._gate = gate

    def save(self, folder: Path, tag: str) -> None:
        assert not (folder / tag / MARKER).exists(), "the marker comes last"
        if self._gate:  # holds up the writing thread
            self._writer._thread.submit(self._gate.wait)
        for name in FILES:
            self._writer.save(state_dict={"weights": self.weights}, path=str(folder / tag / name))
        self.weights += 1

    @property
    def is_written(self) -> bool:
        return self._writer.is_done

    def written(self) -> list[FileRecord]:
        return self._writer.written()

    def not_convertible(self) -> str | None:
        return None

    def load(self, checkpoint: Path, trust: bool = False) -> None:
        self.loaded.append(checkpoint.name)
        self.weights = torch.load(checkpoint / FILES[1])["weights"]


def checkpoint_config(run: Path, **keys: Any) -> Config:
    return load_config(Path("demo"), [f"run={run}", f"checkpoint={json.dumps({'every': 1, 'keep': 2, **keys})}"])


def saver_of(config: Config, engine: OneRank | None = None) -> Saver:
    return Saver(cast("Engine", engine or OneRank()), config, fixed_values(config, "vocab", 3))


def save(config: Config, *steps: int, engine: OneRank | None = None) -> bool:
    """One saver for all steps; the weights of step n's checkpoint are those after as many saves."""
    saver = saver_of(config, engine)
    data = [{row: {"packs": step} for row in range(4)} for step in steps]
    saved = [
        saver.save(step, state, {"loss/mean": 1.5}) and saver.finish() for step, state in zip(steps, data, strict=True)
    ]
    return all(saved)


def load(config: Config) -> tuple[Position, OneRank]:
    engine = OneRank()
    return load_latest(cast("Engine", engine), config, fixed_values(config, "vocab", 3)), engine


def names(config: Config) -> list[str]:
    return sorted(path.name for path in (config.run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change_state(config: Config, **change: Any) -> None:
    """Rewrite the marker of the newest checkpoint, checksum and all."""
    folder = complete(config.run)[-1]
    state = read_marker(folder)
    assert isinstance(state, dict)
    write_marker(folder, {**state, **change})
