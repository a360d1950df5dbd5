"""Records: each step once whatever happens, and files that are whole or not there."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uvlm.metrics import MetricWriter, median_of, read_records, read_summary, update_summary


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    for resume_step, last in ((0, 3), (0, 7), (4, 9)):
        with MetricWriter(tmp_path, resume_step) as writer:
            for step in range(resume_step + 1, last + 1):
                writer.scalars(step, {"loss": float(step + resume_step)})
    want = [1.0, 2.0, 3.0, 4.0, 9.0, 10.0, 11.0, 12.0, 13.0]
    assert [record["loss"] for record in read_records(tmp_path)] == want
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == want
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 10))


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\nno json\n3\n{"step": 2, "a')
    assert read_records(tmp_path) == [{"step": 1, "a": 2.0}]
    with MetricWriter(tmp_path, 1) as writer:
        writer.scalars(2, {"a": 3.0})
    assert median_of(tmp_path, "a") == 2.5


def test_a_full_disk_costs_records_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricWriter(tmp_path, 0) as writer:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        writer.scalars(1, {"a": 1.0})
        writer.scalars(2, {"a": 2.0})
        (tmp_path / "metrics.jsonl").unlink()
        writer.scalars(3, {"a": 3.0})
    assert read_records(tmp_path) == [{"step": 3, "a": 3.0}]
    assert capsys.readouterr().out.count("cannot be written and are lost ([Errno 28] No space left on device)") == 1


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, 0) as writer:
        writer.image(3, "generated", np.zeros((4, 6, 3), np.uint8))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("generated")
    assert (event.step, event.width, event.height) == (3, 6, 4)


def test_the_summary_is_merged(tmp_path: Path) -> None:
    update_summary(tmp_path, {"a": 1, "b": 2})
    update_summary(tmp_path, {"b": 3})
    assert read_summary(tmp_path) == {"a": 1, "b": 3} == json.loads((tmp_path / "metrics.json").read_text())
    assert median_of(tmp_path, "nothing") is None
