"""What a run survives: ranks killed anywhere, other numbers of ranks, damaged checkpoints, a full disk. Real ranks.

In all of it the order of the data stays the same to the bit: the state of every row is compared in every checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.checkpoint_worker import CASES, HANG_SECONDS, NUM_STEPS
from tests.corpus import uvlm, write_corpus
from uvlm.checkpoint_files import read_marker
from uvlm.metrics import read_records

NUM_KILLS = 20
KILLED_STEPS = 90
KILLED = [f"optim.steps={KILLED_STEPS}", "checkpoint={every: 3, keep: 1, keep_every: 3}", "dtype=fp32"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_run_killed_at_twenty_random_moments_is_the_uninterrupted_run(corpus: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={whole}", *KILLED, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    dice = random.Random(5)
    moments = []
    while len(moments) < NUM_KILLS:
        output, was_killed = _run_and_kill(corpus, killed, dice)
        assert was_killed, "the run ended before it was killed often enough:\n" + output
        moments.append(_last_line(output))
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={killed}", *KILLED, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    print("killed after", *moments, sep="\n  ")
    assert _rows(killed) == _rows(whole), "data order"
    assert len(_rows(whole)) == KILLED_STEPS // 3
    losses, expected = _losses(killed), _losses(whole)
    assert len(expected) == KILLED_STEPS
    assert losses == pytest.approx(expected, abs=1e-4)
    assert not list((killed / "checkpoints").glob(".*")), "something half-written is left"


def _run_and_kill(config: Path, run: Path, dice: random.Random) -> tuple[str, bool]:
    """Start, kill a random rank at a random moment, and wait until all have ended. (output, was it killed)"""
    num_lines, while_saving, victim = dice.randint(0, 7), dice.random() < 0.4, dice.randint(0, 1)
    command = [sys.executable, "-u", "-m", "uvlm", "launch", str(config), "--nproc=2", f"run={run}", *KILLED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    was_killed = False
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        assert launcher.stdout
        for line in launcher.stdout:
            lines.append(line)
            num_steps = sum(text.startswith("step ") for text in lines)
            is_up = any("parameters, vocabulary" in text for text in lines)
            if was_killed or not is_up or num_steps < num_lines:
                continue
            if while_saving:
                _wait_for_saving(run)
            with suppress(ProcessLookupError):
                os.kill(_ranks(launcher.pid)[victim], signal.SIGKILL)
                was_killed = True
    assert not was_killed or launcher.returncode != 0
    return "".join(lines), was_killed


def _wait_for_saving(run: Path, num_looks: int = 200_000) -> None:
    """Until a checkpoint is being written; a few seconds at most."""
    for _ in range(num_looks):
        if any(name.startswith(".partial_") for name in _names(run / "checkpoints")):
            return


def _names(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def _ranks(launcher: int) -> dict[int, int]:
    """Process ids by rank, of those below `launcher`."""
    ranks = {}
    for pid in _descendants(launcher):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"LOCAL_RANK="):
                    ranks[int(variable.removeprefix(b"LOCAL_RANK="))] = pid
    return ranks


def _descendants(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


def _last_line(output: str) -> str:
    return [line for line in output.splitlines() if line.startswith(("step", "goes on", "0.1M"))][-1][:60]


def _rows(run: Path) -> dict[str, object]:
    """State of every row in every checkpoint, by the checkpoint's name."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    return {folder.name: _state(folder)["rows"] for folder in folders}


def _state(folder: Path) -> dict[str, object]:
    state = read_marker(folder)
    assert isinstance(state, dict), state
    return state


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss/mean"] for record in read_records(run) if "loss/mean" in record}
