"""Checkpoints: complete or not there, checked before they are read, removed when they may be. Real ranks are in
test_survival.py, what does not fit in test_checkpoint_fits.py."""

import errno
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.one_rank import FILES, OneRank, change_state, checkpoint_config, contents, load, names, save, saver_of
from uvlm import checkpoint_files
from uvlm.checkpoint import Position, check_fits, complete, fixed_values
from uvlm.checkpoint_files import MARKER, publish, read_marker, remove, to_host
from uvlm.config import Config

pytestmark = pytest.mark.usefixtures("alone")


class FullDisk(OneRank):
    """The second file lies on a device that is always full."""

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag / FILES[1]).symlink_to("/dev/full")
        super().save(folder, tag)


class Killed(OneRank):
    def save(self, folder: Path, tag: str) -> None:
        super().save(folder, tag)
        raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return checkpoint_config(tmp_path)


def test_the_newest_checkpoint_comes_back_with_its_data_state(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert save(config, 1, 2, 10)
    position, engine = load(config)
    assert position == Position(10, {row: {"packs": 10} for row in range(4)})
    assert engine.loaded == ["step_00000010"]
    assert f"goes on from step 10: {config.run / 'checkpoints' / 'step_00000010'}" in capsys.readouterr().out


def test_a_checkpoint_holds_what_was_trained_when_it_was_asked_for(config: Config) -> None:
    gate, engine = threading.Event(), OneRank()
    engine._gate = gate
    saver = saver_of(config, engine)
    assert saver.save(1, {0: {}}, {})
    assert engine.weights.eq(1).all(), "training goes on"
    assert not saver.is_written
    assert complete(config.run) == []
    gate.set()
    assert saver.finish()
    assert saver.is_written
    assert load(config)[1].weights.eq(0).all()


def test_without_background_a_checkpoint_is_complete_when_save_returns(tmp_path: Path) -> None:
    config = checkpoint_config(tmp_path, background=False)
    assert saver_of(config, OneRank(background=False)).save(1, {0: {}}, {})
    assert [folder.name for folder in complete(config.run)] == ["step_00000001"]
    assert load(config)[1].weights.eq(0).all()


def test_a_save_brings_the_one_before_to_its_end(config: Config) -> None:
    saver = saver_of(config)
    for step in (1, 2):
        assert saver.save(step, {0: {"packs": step}}, {})
    assert names(config) == [".partial_step_00000002", "step_00000001"]
    assert saver.finish()
    assert names(config) == ["step_00000001", "step_00000002"]


def test_the_marker_says_what_is_in_the_checkpoint(config: Config) -> None:
    save(config, 3)
    state = read_marker(complete(config.run)[0])
    assert isinstance(state, dict)
    assert {key: state[key] for key in ("format_version", "step", "world_size", "metrics")} == {
        "format_version": 2,
        "step": 3,
        "world_size": 1,
        "metrics": {"loss/mean": 1.5},
    }
    assert state["fixed"]["zero_optimization.stage"] == 3
    assert state["fixed"]["dtype"] == "bf16"
    for name in FILES:
        path = complete(config.run)[0] / name
        with path.open("rb") as file:
            sha256 = checkpoint_files.hashlib.file_digest(file, "sha256").hexdigest()
        assert state["files"][name] == {"bytes": path.stat().st_size, "sha256": sha256, "rank": 0}


def test_only_the_newest_and_those_for_good_are_kept(tmp_path: Path) -> None:
    config = checkpoint_config(tmp_path, keep=2, keep_every=4)
    save(config, *range(1, 12))
    assert names(config) == [f"step_{step:08d}" for step in (4, 8, 10, 11)]


def test_nothing_is_removed_before_the_new_one_is_complete(tmp_path: Path) -> None:
    config = checkpoint_config(tmp_path, keep=1)
    save(config, 1)
    saver = saver_of(config)
    assert saver.save(2, {0: {}}, {})
    assert "step_00000001" in names(config)
    assert saver.finish()
    assert names(config) == ["step_00000002"]


def test_the_same_state_is_written_once_and_another_of_that_step_replaces_it(config: Config) -> None:
    engine = OneRank()
    saver = saver_of(config, engine)
    for packs in (1, 1, 2):
        assert saver.save(5, {0: {"packs": packs}}, {})
        assert saver.finish()
    assert engine.weights.eq(2).all(), "the second call had nothing to write"
    assert load(config)[0] == Position(5, {0: {"packs": 2}})
    assert names(config) == ["step_00000005"]


@pytest.mark.parametrize("function", ["_put_aside", "rename", "_delete"])
def test_a_checkpoint_that_is_replaced_by_a_process_that_dies_is_not_lost(
    config: Config, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(config, 5)

    def die(*arguments: Any, **keys: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if function == "rename":
            real: Callable[..., Path] = Path.rename
            patch.setattr(Path, "rename", lambda a, b: die() if a.name.startswith(".partial") else real(a, b))
        else:
            patch.setattr(checkpoint_files, function, die)
        with pytest.raises(KeyboardInterrupt):
            save(config, 5)
    assert load(config)[0].step == 5
    save(config, 6)
    assert names(config) == ["step_00000005", "step_00000006"] or function == "rename"
    assert load(config)[0].step == 6


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_complete(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(config, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove(complete(config.run)[0])
    assert [folder.name for folder in complete(config.run)] == ["step_00000002"]
    save(config, 3)
    assert names(config) == ["step_00000002", "step_00000003"]


def test_without_a_checkpoint_a_run_starts_at_the_beginning(config: Config) -> None:
    assert load(config)[0] == Position(0, None)


def test_what_died_while_it_was_written_or_converted_is_never_loaded_and_later_removed(config: Config) -> None:
    save(config, 1)
    with pytest.raises(KeyboardInterrupt):
        save(config, 2, engine=Killed())
    shutil.copytree(config.run / "checkpoints" / "step_00000001", config.run / "checkpoints" / ".universal_step_9_x")
    assert load(config)[1].loaded == ["step_00000001"]
    save(config, 3)
    assert names(config) == ["step_00000001", "step_00000003"]


def test_a_full_disk_costs_one_checkpoint_and_no_more(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    save(config, 1)
    before = contents(config.run)
    saver = saver_of(config, FullDisk())
    assert saver.save(2, {0: {}}, {}), "the state is copied; that it cannot be written shows later"
    assert not saver.finish()
    path = config.run / "checkpoints" / ".partial_step_00000002" / FILES[1]
    sentence = f"no checkpoint of step 2: rank 0 could not write {path} (No space left on device)"
    assert capsys.readouterr().out == f"{sentence}; older ones are untouched\n"
    assert contents(config.run) == before
    assert saver.finish(), "it has been told once"
    assert save(config, 3)
    assert names(config) == ["step_00000001", "step_00000003"]


def test_a_write_that_fails_for_another_reason_than_the_disk_is_no_sentence(config: Config) -> None:
    engine = OneRank()
    engine.weights = cast("torch.Tensor", threading.Lock())  # cannot be pickled
    with pytest.raises(TypeError):
        save(config, 1, engine=engine)


def test_without_room_a_checkpoint_is_left_out(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(config, 1)
    before = contents(config.run)
    engine = OneRank()
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(config.run)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
        assert not saver_of(config, engine).save(2, {0: {}}, {})
    assert engine.weights.eq(0).all(), "nothing was copied"
    assert "no checkpoint of step 2" in (out := capsys.readouterr().out)
    assert "needs 0 MB for it and its disk has 0 MB free" in out
    assert contents(config.run) == before


def test_a_folder_that_cannot_be_written_costs_a_checkpoint(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    (config.run / "checkpoints").write_text("a file")
    assert not saver_of(config).save(1, {0: {}}, {})
    assert "cannot be written (Not a directory)" in capsys.readouterr().out


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (FILES[0], _truncate, r"is damaged: it has \d,\d+ bytes, \d,\d+ were written"),
    "corrupted": (FILES[1], _flip_a_bit, "is damaged: its checksum is not that of what was written"),
    "missing": (FILES[1], Path.unlink, "is missing"),
    "unreadable": (FILES[0], _put_a_folder, r"cannot be read \(Is a directory\)"),
    "marker": (MARKER, _flip_a_bit, "is damaged: it is not what was written"),
    "truncated marker": (MARKER, _truncate, "is damaged: it is not what was written"),
    "empty marker": (MARKER, lambda path: path.write_bytes(b""), "is damaged: it is not what was written"),
    "other marker": (MARKER, lambda path: path.write_text("[]"), "is damaged: it is not what was written"),
    "binary marker": (MARKER, lambda path: path.write_bytes(b"\xff"), "is damaged: it is not what was written"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_way_out_or_passed_over_where_that_is_allowed(
    config: Config, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, damage, sentence = DAMAGES[kind]
    save(config, 1, 2)
    path = complete(config.run)[-1] / name
    damage(path)
    before = contents(config.run)
    monkeypatch.setattr(torch, "load", lambda path: {"weights": path})  # must not happen to what is damaged
    with pytest.raises(ValueError, match=rf"^{path} {sentence}; checkpoint.fall_back=true goes on from step 1$"):
        load(config)
    capsys.readouterr()
    allowed = checkpoint_config(config.run, fall_back=True)
    check_fits(allowed, fixed_values(allowed, "vocab", 3))
    position, engine = load(allowed)
    assert position.step == 1
    assert engine.loaded == ["step_00000001"]
    passed_over, goes_on = capsys.readouterr().out.splitlines()
    assert passed_over.startswith(f"{path} ")
    assert passed_over.endswith("; this checkpoint is passed over and stays as it is")
    assert goes_on.startswith("goes on from step 1: ")
    assert contents(config.run) == before, "nothing is deleted"


def test_a_damaged_marker_is_refused_before_anything_is_built(config: Config) -> None:
    save(config, 1, 2)
    _truncate(complete(config.run)[-1] / MARKER)
    with pytest.raises(ValueError, match=r"state.json is damaged.*checkpoint.fall_back=true goes on from step 1"):
        check_fits(config, fixed_values(config, "vocab", 3))


def test_where_all_are_damaged_the_start_is_refused(tmp_path: Path) -> None:
    config = checkpoint_config(tmp_path, fall_back=True)
    save(config, 1, 2)
    for folder in complete(config.run):
        (folder / FILES[0]).unlink()
    with pytest.raises(ValueError, match=rf"is missing, and {config.run} has no older checkpoint; start a new run"):
        load(config)


def test_after_a_fall_back_the_damaged_one_stays_until_its_step_is_done_again(tmp_path: Path) -> None:
    config = checkpoint_config(tmp_path, keep=1, fall_back=True)
    save(config, 10)
    save(checkpoint_config(tmp_path, keep=2), 20)
    (complete(config.run)[-1] / FILES[0]).unlink()
    assert load(config)[0].step == 10
    save(config, 15)
    assert names(config) == ["step_00000015", "step_00000020"], "what the run goes on from is never removed"
    save(config, 20)
    assert names(config) == ["step_00000020"]
    assert load(config)[0].step == 20


def test_what_is_kept_for_good_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.keep_every=250: no multiple of checkpoint.every=100; use 300"):
        checkpoint_config(tmp_path, every=100, keep_every=250)


def test_a_copy_keeps_what_is_shared_shared_and_drags_nothing_along() -> None:
    """What DeepSpeed saves: weights that are views of one buffer, tied ones among them."""
    buffer = torch.arange(1000.0)
    embedding, norm = buffer[:600].view(20, 30), buffer[600:608]
    state = OrderedDict(embedding=embedding.detach(), head=embedding.detach(), norm=norm, other=[(norm, 3)], rest=None)
    state._metadata = {"version": 1}  # type: ignore[attr-defined]  # as torch does
    twin = to_host(state)
    buffer.zero_()
    assert twin["embedding"][-1, -1] == 599
    assert twin["head"] is twin["embedding"]
    assert twin["norm"].untyped_storage().nbytes() == 8 * 4
    assert twin["other"] == [(twin["norm"], 3)]
    assert twin._metadata == {"version": 1}
    assert norm.eq(0).all()


def test_a_full_disk_is_named_however_late_it_shows(tmp_path: Path) -> None:
    for num_numbers in (1, 10_000_000):  # at the end, when buffers are flushed, and in the middle of a tensor
        (tmp_path / f"{num_numbers}").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            checkpoint_files.write_state({"weights": torch.zeros(num_numbers)}, tmp_path / f"{num_numbers}")
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(tmp_path / f"{num_numbers}")


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power finds whole files under the final name, or no final name."""
    events: list[str] = []
    real_fsync, real_publish = os.fsync, publish

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def published(partial: Path, folder: Path) -> None:
        events.append("rename")
        real_publish(partial, folder)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("uvlm.checkpoint.publish", published)
    save(config, 1)
    partial = ".partial_step_00000001"
    assert events == [*FILES, partial, f"{MARKER}.tmp", partial, "rename", "checkpoints"]


def test_without_room_to_convert_it_the_start_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    save(config, 1)
    change_state(config, world_size=2)
    before = contents(config.run)
    usage = shutil.disk_usage(config.run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
    with pytest.raises(ValueError, match=r"by 2 ranks, to convert it takes 0 MB and the disk has 0 MB free; free some"):
        load(config)
    assert contents(config.run) == before


def test_a_run_whose_checkpoints_lost_their_markers_does_not_begin_anew(config: Config) -> None:
    assert save(config, 1, 2)
    for folder in complete(config.run):
        (folder / MARKER).unlink()
    with pytest.raises(ValueError, match=r"step_00000002 is there, but it has no state.json, and .* no complete check"):
        check_fits(config, fixed_values(config, "vocab", 3))
    assert names(config) == ["step_00000001", "step_00000002"]


def test_a_copy_under_another_name_is_none_of_the_runs_checkpoints(config: Config) -> None:
    assert save(config, 1)
    (folder,) = complete(config.run)
    for name in ("step_00000009_copy", "step_00000009.bak", "step_abc"):
        shutil.copytree(folder, folder.with_name(name))
    assert complete(config.run) == [folder]
