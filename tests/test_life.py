"""A run that is asked to stop, or to save, or whose loss makes no sense: what each rule decides, on its own.

Real ranks that are asked: test_stopping.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from uvlm.life import Life, LifeConfig, Skips, SpikeConfig, Spikes, Wishes

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_a_wish_to_stop_inside_and_what_it_was_outside(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    life = Life(LifeConfig(), tmp_path, started=0.0, clock=lambda: 0.0)
    assert life.agree() == Wishes()
    with life.listening():
        os.kill(os.getpid(), number)
        assert life.agree() == Wishes(stop=True)
        assert life.stop_wanted(), "it stands until the run stops"
    assert life.reason == f"{number.name} was received"
    assert signal.getsignal(number) is before


def test_files_in_the_run_folder_are_wishes(tmp_path: Path) -> None:
    life = Life(LifeConfig(), tmp_path, started=0.0, clock=lambda: 0.0)
    (tmp_path / "SAVE").touch()
    wishes = life.agree()
    assert wishes == Wishes(save=True)
    life.fulfilled(wishes)
    assert life.agree() == Wishes()
    (tmp_path / "STOP").touch()
    wishes = life.agree()
    assert wishes.stop
    assert "STOP was found" in life.reason
    life.fulfilled(wishes)
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"], "it stays, for the script of a job to see"


def test_a_file_from_before_the_start_does_not_end_it_and_one_made_while_it_starts_does(tmp_path: Path) -> None:
    started = psutil.Process().create_time()
    (tmp_path / "STOP").touch()
    os.utime(tmp_path / "STOP", (started + 1, started + 1))
    assert Life(LifeConfig(), tmp_path, started=0.0, clock=lambda: 0.0).agree().stop
    os.utime(tmp_path / "STOP", (started - 1, started - 1))
    assert Life(LifeConfig(), tmp_path, started=0.0, clock=lambda: 0.0).agree() == Wishes()
    assert not (tmp_path / "STOP").exists()


def test_the_time_budget_leaves_room_for_a_step_and_a_checkpoint(tmp_path: Path) -> None:
    now = 100.0
    life = Life(LifeConfig(hours=1.0), tmp_path, started=100.0, clock=lambda: now)
    life.seconds_to_stop = 100.0
    now = 100.0 + 3499.0
    assert life.agree() == Wishes()
    now = 100.0 + 3501.0
    assert life.agree() == Wishes(stop=True)
    assert life.reason == "life.hours=1 are nearly over"


def test_what_is_unwritten_on_a_rank_is_no_wish_of_its_own(tmp_path: Path) -> None:
    wishes = Life(LifeConfig(), tmp_path, started=0.0, clock=lambda: 0.0).agree(unwritten=True)
    assert wishes == Wishes(unwritten=True)
    assert not wishes.any_save


def test_skipped_steps_are_counted_in_a_row_and_too_many_end_the_run() -> None:
    skips = Skips(limit=3, total=7)
    assert [skips.add(total, step, "bf16") for step, total in enumerate((7, 8, 9, 9, 10, 11))] == [0, 1, 1, 0, 1, 1]
    with pytest.raises(
        ValueError, match=r"not finite in 3 steps in a row, the last of them step 6; nothing was changed"
    ):
        skips.add(12, 6, "bf16")


def test_half_precision_is_told_of_the_other_one() -> None:
    with pytest.raises(ValueError, match="train in bf16"):
        Skips(limit=1, total=0).add(1, 1, "fp16")


def test_a_spike_is_measured_against_the_median_and_does_not_raise_it() -> None:
    spikes = Spikes(SpikeConfig(factor=2.0, window=4))
    assert not any(spikes.add(loss) for loss in (1.0, 9.0, 1.0, 1.0)), "the window fills first"
    assert spikes.add(2.1)
    assert spikes.add(2.1), "it has not entered the window"
    assert not spikes.add(1.9)
