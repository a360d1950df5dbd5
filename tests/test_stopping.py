"""Two real ranks that are asked to stop or to save, and that meet losses which make no sense."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data_pipeline.loader import Loader
from data_pipeline.vocab import Vocab
from tests.corpus import launch, losses, rank_process, uvlm, write_corpus
from uvlm.checkpoint import complete
from uvlm.checkpoint_files import read_marker, write_marker
from uvlm.config import Config, load_config
from uvlm.life import EXIT_STOPPED
from uvlm.metrics import read_records

pytestmark = pytest.mark.slow

NUM_STEPS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> Path:
    run = config.parent / "uninterrupted"
    launch(config, 2, f"run={run}", "checkpoint.every=5", "checkpoint.keep=9")
    return run


def _assert_same(run: Path, other: Path) -> None:
    got, expected = losses(run), losses(other)
    assert got.keys() == expected.keys() == set(range(1, NUM_STEPS + 1))
    assert got == pytest.approx(expected, abs=1e-6)


Act = Callable[[int], None]  # with the launcher's process id


def _launch_until(
    config: Path, run: Path, line: str, act: Act, *overrides: str, then: tuple[str, Act] | None = None
) -> tuple[int, str]:
    """Start two ranks and act when a line of their output says so, and once more when another one does."""
    command = [sys.executable, "-m", "uvlm", "launch", str(config), "--nproc=2", f"run={run}", *overrides]
    output, acts = "", [(line, act)] + ([then] if then else [])
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(240, process.kill)  # a run that hangs fails the test
        limit.start()
        for text in process.stdout:
            output += text
            if acts and acts[0][0] in text:
                acts.pop(0)[1](process.pid)
        limit.cancel()
    assert not acts, output
    return process.returncode, output


def _rank(launcher: int, rank: int) -> psutil.Process:
    process = rank_process(launcher, rank)
    assert process, f"there is no rank {rank}"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_a_code_of_its_own(
    config: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    code, output = _launch_until(
        config, run, "step 3/", lambda launcher: _rank(launcher, 1).send_signal(number), "checkpoint.every=100"
    )
    assert code == EXIT_STOPPED, output
    assert "Traceback" not in output
    (checkpoint,) = complete(run)
    stopped_at = max(losses(run))
    assert checkpoint.name == f"step_{stopped_at:08d}", "the step that was being done is the last one"
    assert f"stopped after step {stopped_at}: another rank was asked to; the same command goes on" in output
    assert not (run / "model").exists()
    launch(config, 2, f"run={run}", "checkpoint.every=100")
    _assert_same(run, uninterrupted)


def test_a_file_stops_a_run_and_another_only_saves(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, output = _launch_until(
        config, run, "step 2/", lambda _: (run / "SAVE").touch(), f"optim.steps={NUM_STEPS}", "checkpoint.every=100"
    )
    assert code == 0, output
    saved, last = complete(run)
    assert last.name == f"step_{NUM_STEPS:08d}"
    assert saved.name < last.name
    _assert_same(run, uninterrupted)
    assert not (run / "SAVE").exists()
    run = tmp_path / "stopped"
    code, output = _launch_until(config, run, "step 2/", lambda _: (run / "STOP").touch(), "checkpoint.every=100")
    assert code == EXIT_STOPPED, output
    assert f"{run / 'STOP'} was found; the same command goes on from here" in output
    assert (run / "STOP").exists()  # until the next start, so that a job does not come back
    launch(config, 2, f"run={run}", "checkpoint.every=100")
    _assert_same(run, uninterrupted)


def test_a_time_budget_ends_in_time_with_a_checkpoint(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = uvlm("launch", str(config), "--nproc=2", f"run={run}", "life.hours=0.001", "optim.steps=100000")
    assert result.returncode == EXIT_STOPPED, result.stderr
    assert "life.hours=0.001 are nearly over; the same command goes on from here" in result.stdout
    (checkpoint,) = complete(run)
    assert read_marker(checkpoint)["step"] == max(losses(run))  # type: ignore[index]


def test_a_run_that_stops_without_its_checkpoint_says_so_and_fails(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("no folder")
    result = uvlm("launch", str(config), "--nproc=2", f"run={run}", "life.hours=0.001", "optim.steps=100000")
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"no checkpoint of step 1: {run / 'checkpoints'} cannot be written" in result.stdout
    assert "error: the checkpoint of step 1 could not be written, for the reason above" in result.stderr
    assert "goes on from here" not in result.stdout


def test_a_rank_that_stands_still_is_named_and_the_others_end(config: Path, tmp_path: Path) -> None:
    """Frozen in the middle: it answers nobody. The launcher cannot end it either, so that is done here at the end."""
    frozen: list[psutil.Process] = []

    def freeze(launcher: int) -> None:
        frozen.append(_rank(launcher, 1))
        frozen[0].suspend()

    limits = ("life.collective_timeout=20", "optim.steps=100000", "checkpoint.every=100000", "log_every=1")
    code, output = _launch_until(
        config, tmp_path / "run", "step 5/", freeze, *limits, then=("last heard of", lambda _: frozen[0].kill())
    )
    assert code not in (0, EXIT_STOPPED)
    assert re.search(r"rank 1 \(host .*\) was last heard of \d+ s ago", output), output
    assert re.search(r"rank 0 .*wait", output), output


def _faulty(config: Path, run: Path, fault: dict[str, Any], *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.life_worker", json.dumps(fault)]
    command += ["--", "train", str(config), f"run={run}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.parametrize(("stage", "dtype"), [(3, "bf16"), (3, "fp32"), (2, "bf16"), (1, "fp32"), (1, "bf16")])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(
    config: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    """Two micro-steps a step: the fault is in the second one of step 4 and in the first of step 5, on rank 1."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}} | _ADAM))
    result = _faulty(
        config,
        tmp_path / "run",
        {"rank": 1, "steps": [7, 9], "factor": "nan"},
        f"dtype={dtype}",
        f"deepspeed={tmp_path / 'ds.json'}",
        "optim.steps=8",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records = [record for record in read_records(tmp_path / "run") if "health/skipped_steps" in record]
    assert [record["health/skipped_steps"] for record in records] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert ["loss/mean" in record for record in records] == [True] * 3 + [False] * 2 + [True] * 3
    assert all(math.isfinite(record["loss/mean"]) for record in records if "loss/mean" in record)
    assert records[5]["loss/mean"] < records[0]["loss/mean"], "it goes on where it was"


_ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


def test_too_many_skipped_steps_end_the_run_with_a_sentence(config: Path, tmp_path: Path) -> None:
    fault = {"rank": 0, "steps": [4, 1000], "factor": "nan"}
    result = _faulty(config, tmp_path / "run", fault, "life.max_skipped_steps=3", "checkpoint.every=1")
    assert result.returncode == 1
    assert (
        "error: the loss or its gradient was not finite in 3 steps in a row, the last of them step 5" in result.stderr
    )


def test_after_a_spike_the_weights_go_back_and_the_packs_since_then_are_left_out(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The spike is in step 12, the last checkpoint of step 10. What follows is what a run would do that starts from
    that checkpoint with the data state of step 12."""
    run, expected = tmp_path / "run", tmp_path / "expected"
    overrides = ("checkpoint.every=5", "checkpoint.keep=9", "life.spike={factor: 3.0, window: 5}")
    result = _faulty(config, run, {"rank": None, "steps": [22, 24], "factor": "10"}, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    sentence = "back to the checkpoint of step 10, leaving out the packs of the 2 steps since"
    assert sentence in result.stdout
    assert sentence in (run / "events.jsonl").read_text()

    shutil.copytree(uninterrupted, expected)
    for checkpoint in complete(expected)[2:]:
        shutil.rmtree(checkpoint)
    checkpoint = complete(expected)[-1]
    state = read_marker(checkpoint)
    assert isinstance(state, dict)
    assert state["step"] == 10
    rows = _data_state(load_config(config), 12)
    again = read_marker(run / "checkpoints" / checkpoint.name)
    assert isinstance(again, dict)
    assert again["rows"] == rows, "a start after a crash leaves them out too"
    write_marker(checkpoint, {**state, "rows": rows})
    launch(config, 2, f"run={expected}", "checkpoint.every=5", "checkpoint.keep=9")
    _assert_same(run, expected)
    assert losses(run)[11] != pytest.approx(losses(uninterrupted)[11], abs=1e-4), "the packs are others"


def _data_state(config: Config, num_steps: int) -> dict[str, Any]:
    """The state of all rows after so many steps."""
    data = config.data
    loader = Loader(
        [source.source() for source in data.train],
        Vocab.load(data.tokenizer),
        pack_tokens=data.pack_tokens,
        num_rows=data.num_rows,
        seed=config.seed,
    )
    _, state = next(itertools.islice(loader, num_steps - 1, None))
    return {str(row): row_state for row, row_state in state.items()}


def test_spikes_again_and_again_end_the_run(config: Path, tmp_path: Path) -> None:
    fault = {"rank": None, "steps": [20, 1000], "factor": "10"}
    result = _faulty(
        config, tmp_path / "run", fault, "checkpoint.every=5", "life.spike={factor: 3.0, window: 5, max_rollbacks: 2}"
    )
    assert result.returncode == 1
    assert "after 2 rollbacks of this start; lower optim.learning_rate" in result.stderr
    assert [folder.name for folder in complete(tmp_path / "run")] == ["step_00000005", "step_00000010"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; DeepSpeed has no fp16 on a CPU")
def test_fp16_learns_with_a_loss_scale(config: Path, tmp_path: Path) -> None:
    launch(config, 1, f"run={tmp_path / 'run'}", "dtype=fp16")
    got = losses(tmp_path / "run")
    assert got[NUM_STEPS] < got[1]
