"""What a run survives: ranks killed anywhere, other numbers of ranks, damaged checkpoints, a full disk. Real ranks.

In all of it the order of the data stays the same to the bit: the state of every row is compared in every checkpoint.
The twenty kills take 6 minutes and the rest 5, nearly all of it starts (run, two cores).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.checkpoint_worker import CASES, FULL_CASE, FULL_FILE, HANG_SECONDS, NUM_STEPS
from tests.corpus import losses, rank_process, uvlm, write_corpus
from uvlm.checkpoint_files import read_marker

NUM_KILLS = 20
KILLED_STEPS = 90
KILLED = [f"optim.steps={KILLED_STEPS}", "checkpoint={every: 3, keep: 1, keep_every: 3}", "dtype=fp32"]
RESUMED = ["optim.steps=12", "checkpoint={every: 3, keep: 9}", "dtype=fp32"]
READ_BY_ONE = ["stage2", "stage3-frozen"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_run_killed_at_twenty_random_moments_is_the_uninterrupted_run(corpus: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={whole}", *KILLED, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    dice = random.Random(5)
    moments: list[str] = []
    num_while_saving = 0
    while len(moments) < NUM_KILLS:
        output, was_killed = _run_and_kill(corpus, killed, dice)
        assert was_killed, "the run ended before it was killed often enough:\n" + output
        moments.append(_last_line(output))
        num_while_saving += output.endswith("while saving\n")
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={killed}", *KILLED, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    print(f"{num_while_saving} times while saving; killed after", *moments, sep="\n  ")
    assert num_while_saving >= 3
    assert _rows(killed) == _rows(whole), "data order"
    assert len(_rows(whole)) == KILLED_STEPS // 3
    got, expected = losses(killed), losses(whole)
    assert len(expected) == KILLED_STEPS
    assert got == pytest.approx(expected, abs=1e-4)
    assert not list((killed / "checkpoints").glob(".*")), "something half-written is left"


def _run_and_kill(config: Path, run: Path, dice: random.Random) -> tuple[str, bool]:
    """Start, kill a random rank at a random moment, and wait until all have ended. (output, was it killed)"""
    num_lines, while_saving, victim = dice.randint(0, 9), dice.random() < 0.4, dice.randint(0, 1)
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
            if while_saving and not _waited_for_saving(run, launcher):
                continue
            with suppress(psutil.NoSuchProcess):
                if process := rank_process(launcher.pid, victim):
                    process.kill()
                    was_killed = True
    assert not was_killed or launcher.returncode != 0
    return "".join(lines) + "while saving\n" * (while_saving and was_killed), was_killed


def _waited_for_saving(run: Path, launcher: subprocess.Popen[str]) -> bool:
    """Wait until a checkpoint is being written; whether that happened before the run ended."""
    while launcher.poll() is None:
        if any(name.startswith(".partial_") for name in _names(run / "checkpoints")):
            return True
    return False


def _names(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [path.name for path in folder.iterdir()]
    return []


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


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks after six steps, with the checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={run}", *RESUMED, "optim.steps=6", timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return run


@pytest.fixture(scope="module")
def resumed(corpus: Path, stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run, brought to its end by so many ranks."""
    runs = {}
    for num_ranks in (2, 1, 4):
        runs[num_ranks] = run = tmp_path_factory.mktemp("resumed") / "run"
        shutil.copytree(stopped, run)
        result = uvlm("launch", str(corpus), f"--nproc={num_ranks}", f"run={run}", *RESUMED, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"goes on from step 6: {run / 'checkpoints' / 'step_00000006'}" in result.stdout
        assert ("converting" in result.stdout) == (num_ranks != 2)
        assert not list((run / "checkpoints").glob(".*")), "the converted checkpoint is removed"
    return runs


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_what_two_ranks_began_any_number_goes_on_with(resumed: dict[int, Path], num_ranks: int) -> None:
    expected, got = losses(resumed[2]), losses(resumed[num_ranks])
    assert _rows(resumed[num_ranks]) == _rows(resumed[2]), "data order"
    assert set(got) == set(expected) == set(range(1, 13))
    drift = {step: abs(got[step] - expected[step]) for step in range(7, 13)}
    print(
        f"{num_ranks} ranks, difference of the loss by step:", {step: f"{value:.1e}" for step, value in drift.items()}
    )
    assert drift[7] <= 1e-4
    assert max(drift.values()) <= 1e-3


def test_ranks_refuse_a_damaged_checkpoint_together_and_fall_back_where_they_may(
    corpus: Path, stopped: Path, resumed: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    shard = run / "checkpoints" / "step_00000006" / FULL_FILE  # of rank 1
    with shard.open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    result = uvlm("launch", str(corpus), "--nproc=2", f"run={run}", *RESUMED, timeout=600)
    sentence = f"{shard} is damaged: its checksum is not that of what was written"
    assert result.returncode == 1, result.stdout + result.stderr
    errors = {line for line in result.stderr.splitlines() if line.startswith("error:")}
    assert errors == {f"error: {sentence}; checkpoint.fall_back=true goes on from step 3"}
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before

    arguments = [f"run={run}", *RESUMED, "checkpoint.fall_back=true"]
    result = uvlm("launch", str(corpus), "--nproc=2", *arguments, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{sentence}; this checkpoint is passed over" in result.stdout
    assert "goes on from step 3" in result.stdout
    assert _rows(run) == _rows(resumed[2])
    assert losses(run) == pytest.approx(losses(resumed[2]), abs=1e-4)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two ranks wrote of each case and what others read, and what they said."""
    folder = tmp_path_factory.mktemp("cases")
    output = ""
    for num_ranks, mode, names in ((2, "write", list(CASES)), (4, "read", list(CASES)), (1, "read", READ_BY_ONE)):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.checkpoint_worker"]
        result = subprocess.run(
            [*command, str(folder), mode, *names],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS + 60,
            check=False,
        )
        output += result.stdout + result.stderr
    return folder, output


@pytest.mark.parametrize(("name", "num_ranks"), [(name, 4) for name in CASES] + [(name, 1) for name in READ_BY_ONE])
def test_every_stage_is_read_by_other_ranks_to_the_bit(name: str, num_ranks: int, cases: tuple[Path, str]) -> None:
    """Weights of every kind, and what is learned next: moments, counts of steps, settings of parameter groups."""
    folder, output = cases
    assert (folder / f"{name}-after-{num_ranks}.pt").exists(), output
    assert _difference(folder, f"{name}-at-{num_ranks}", f"{name}-at-2") == 0
    is_fp32 = CASES[name].dtype == "fp32"  # bf16 weights may come out a rounding apart here and there
    assert _difference(folder, f"{name}-after-{num_ranks}", f"{name}-after-2") < (1e-6 if is_fp32 else 5e-4)
    assert _difference(folder, f"{name}-after-2", f"{name}-at-2") > 2e-3, "a step is much more than that"


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_back_to_its_checkpoint_repeats_itself(name: str, cases: tuple[Path, str]) -> None:
    folder, output = cases
    assert (folder / f"{name}-again-2.pt").exists(), output
    assert _difference(folder, f"{name}-back-2", f"{name}-at-2") == 0
    assert _difference(folder, f"{name}-again-2", f"{name}-after-2") == 0


def test_a_disk_that_is_full_for_one_rank_costs_all_of_them_one_checkpoint(cases: tuple[Path, str]) -> None:
    folder, output = cases
    path = folder / FULL_CASE / "checkpoints" / ".partial_step_00000001" / FULL_FILE
    assert f"no checkpoint of step 1: rank 1 could not write {path} (No space left on device); older ones" in output
    assert _names(folder / FULL_CASE / "checkpoints") == [f"step_{NUM_STEPS:08d}"]


def _difference(folder: Path, one: str, other: str) -> float:
    """The largest mean absolute difference of a weight; those of the optimizer's groups may differ on their own."""
    ours, theirs = torch.load(folder / f"{one}.pt"), torch.load(folder / f"{other}.pt")
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().mean()) for name in ours)
