"""Records of a run: TensorBoard, metrics.jsonl and metrics.json, written by rank 0 alone.

One folder serves the whole life of a run. On resume, TensorBoard gets `purge_step` and metrics.jsonl loses the records
after the checkpoint, so each step stands there once.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.files import replace_file


class MetricWriter:
    """Scalars and images by step. `resume_step`: optimizer steps already done when this attempt starts."""

    def __init__(self, run: Path, resume_step: int) -> None:
        self._run = run
        self._path = run / "metrics.jsonl"
        self._has_failed = False
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read_records(self._run) if record["step"] <= resume_step]
        replace_file(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        # Records carry the number of steps done, so the first new one is resume_step + 1.
        self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=resume_step + 1, flush_secs=20)

    def rewind(self, step: int) -> None:
        """Forget the records after `step`: the run goes on from there."""
        self._board.close()
        self._open(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values under `step`, the number of optimizer steps done."""
        with self._spared():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        with self._spared(), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """No record may stop a run: where the disk is full it is lost, and that is said once."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                print(f"records of {self._run} cannot be written and are lost ({error})", flush=True)
            self._has_failed = True

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [height, width, 3]."""
        with self._spared():
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def text(self, step: int, name: str, value: str) -> None:
        self._board.add_text(name, value, step)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._spared():
            self._board.close()


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a line that is none, cut by a crash say, is left out: no log may stop a run."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = (_object(line) for line in lines)
    return [record for record in records if isinstance(record.get("step"), int)]


def read_summary(run: Path) -> dict[str, Any]:
    """RUN/metrics.json; empty where it is not there or damaged."""
    path = run / "metrics.json"
    return _object(path.read_bytes()) if path.exists() else {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def update_summary(run: Path, values: Mapping[str, Any]) -> None:
    """Merge values into RUN/metrics.json, whole or not at all."""
    replace_file(run / "metrics.json", json.dumps({**read_summary(run), **values}, indent=2) + "\n")


def median_of(run: Path, name: str) -> float | None:
    """Median of one metric over the records that have it."""
    values = [record[name] for record in read_records(run) if name in record]
    return statistics.median(values) if values else None
