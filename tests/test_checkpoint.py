"""Checkpoints: complete or not there, and refused where they do not fit. Real ranks resume in test_train.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from tests.helpers import tiny_model
from uvlm import checkpoint
from uvlm.checkpoint import MARKER, Position, check_fits, complete, fixed_values, load_latest
from uvlm.config import Config, load_config
from uvlm.engine import Engine


class WritingEngine:
    """Stands for DeepSpeed's files, so that the order of writing can be watched without ranks."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def save(self, folder: Path, tag: str) -> None:
        assert not (folder / tag / MARKER).exists(), "the marker comes last"
        (folder / tag).mkdir()
        (folder / tag / "weights").write_text(tag)

    def load(self, folder: Path, tag: str) -> None:
        self.loaded.append(tag)


class DyingEngine(WritingEngine):
    def save(self, folder: Path, tag: str) -> None:
        super().save(folder, tag)
        raise OSError("No space left on device")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(Path("demo"), [f"run={tmp_path}", "checkpoint={every: 1, keep: 2}"])


def _save(config: Config, step: int, engine: WritingEngine | None = None) -> None:
    data_state = {row: {"packs": step} for row in range(4)}
    checkpoint.save(
        cast("Engine", engine or WritingEngine()), config, step, data_state, fixed_values(config, "vocab", 3)
    )


def _load(config: Config) -> tuple[Position, list[str]]:
    engine = WritingEngine()
    return load_latest(cast("Engine", engine), config.run), engine.loaded


def test_the_newest_checkpoint_comes_back_with_its_data_state(config: Config) -> None:
    for step in (1, 2, 3):
        _save(config, step)
    position, loaded = _load(config)
    assert position == Position(3, {row: {"packs": 3} for row in range(4)})
    assert loaded == ["step_00000003"]


def test_only_the_newest_are_kept(config: Config) -> None:
    for step in (1, 2, 10):
        _save(config, step)
    assert [folder.name for folder in complete(config.run)] == ["step_00000002", "step_00000010"]


def test_without_a_checkpoint_a_run_starts_at_the_beginning(config: Config) -> None:
    assert _load(config) == (Position(0, None), [])


def test_a_checkpoint_that_died_while_it_was_written_is_never_loaded_and_later_removed(config: Config) -> None:
    _save(config, 1)
    with pytest.raises(OSError, match="No space"):
        _save(config, 2, DyingEngine())
    assert _load(config)[1] == ["step_00000001"]
    _save(config, 3)
    assert sorted(p.name for p in (config.run / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize(
    ("overrides", "vocab", "change", "sentence"),
    [
        (["seed=1"], "vocab", {}, "was written with seed=0, this config has 1; set it back"),
        (["data.num_rows=8"], "vocab", {}, "was written with data.num_rows=2, this config has 8"),
        (["optim.weight_decay=0.2"], "vocab", {}, "was written with optim.weight_decay=0.1, this config has 0.2"),
        (["model.num_layers=5"], "vocab", {}, "was written with model="),
        (["data.train=[{path: other}]"], "vocab", {}, "was written with data.train"),
        ([], "other", {}, "was written with vocabulary='vocab', this config has 'other'"),
        ([], "vocab", {"fixed": {}}, "this config has"),
        ([], "vocab", {"world_size": 2}, "was written by 2 ranks and this start has 1; start it with 2 ranks"),
        ([], "vocab", {"step": 9}, "has more steps than optim.steps=5; set optim.steps to 9 or more"),
        ([], "vocab", {"format_version": 99}, r"was written by a newer uvlm \(format 99\); update uvlm"),
    ],
    ids=["seed", "rows", "decay", "model", "sources", "vocabulary", "nothing", "ranks", "steps", "format"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_values(
    config: Config, overrides: list[str], vocab: str, change: dict[str, Any], sentence: str
) -> None:
    _save(config, 1)
    marker = complete(config.run)[-1] / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **change}))
    other = load_config(Path("demo"), [f"run={config.run}", *overrides])
    with pytest.raises(ValueError, match=sentence):
        check_fits(other.run, fixed_values(other, vocab, 3), world_size=1, last_step=5)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}'])
def test_a_damaged_marker_is_refused_with_the_way_back(config: Config, text: str) -> None:
    _save(config, 1)
    (complete(config.run)[-1] / MARKER).write_text(text)
    with pytest.raises(ValueError, match=r"state.json is damaged; remove .*step_00000001 to go on from"):
        _load(config)


def test_what_may_change_within_a_run_may_change(config: Config) -> None:
    _save(config, 1)
    other = load_config(Path("demo"), [f"run={config.run}", "optim.steps=9999", "log_every=3"])
    check_fits(other.run, fixed_values(other, "vocab", 3), world_size=1, last_step=5)


def test_a_finished_run_is_not_given_a_policy_it_was_not_trained_with(config: Config) -> None:
    _save(config, 5)
    other = load_config(Path("demo"), [f"run={config.run}", "policy={name: ffn_skip}"])
    fixed, policy = fixed_values(other, "vocab", 3), other.policy.model_dump(mode="json")
    with pytest.raises(ValueError, match=r"has done all of optim.steps=5 with another policy"):
        check_fits(other.run, fixed, world_size=1, last_step=5, policy=policy)
    check_fits(other.run, fixed, world_size=1, last_step=6, policy=policy)
    check_fits(other.run, fixed, world_size=1, last_step=5, policy=config.policy.model_dump(mode="json"))


def test_a_run_that_began_with_pretrained_weights_keeps_what_their_config_says(config: Config, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "moved", tmp_path / "other"]
    for folder, rope_theta in zip(folders, (1e4, 1e4, 1e6), strict=True):
        tiny_model("qwen3").backbone.config.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": rope_theta}))
    run = f"run={config.run}"
    one, moved, other = (load_config(Path("demo"), [run, f"model={{init_from: {folder}}}"]) for folder in folders)
    sizes = one.model.model_dump(mode="json", exclude={"init_from"})
    fresh = load_config(Path("demo"), [run, f"model={json.dumps(sizes)}"])
    _save(one, 1)
    check_fits(config.run, fixed_values(moved, "vocab", 3), world_size=1, last_step=5)
    for start in (other, fresh):
        with pytest.raises(ValueError, match=r"was written with model.init_from \(its config.json\)='"):
            check_fits(config.run, fixed_values(start, "vocab", 3), world_size=1, last_step=5)
    folders[0].joinpath("config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json; a run that began there needs it to go on"):
        fixed_values(one, "vocab", 3)


def test_projections_of_images_cannot_change_within_a_run(config: Config) -> None:
    plain, own = (
        load_config(Path("demo"), [f"run={config.run}", f"policy.input_projections={value}"])
        for value in ("shared", "kv")
    )
    for before, after in ((plain, own), (own, plain)):
        _save(before, 1)
        with pytest.raises(ValueError, match=r"policy.input_projections and policy.target_projections, by layer"):
            check_fits(config.run, fixed_values(after, "vocab", 3), world_size=1, last_step=5)
        check_fits(config.run, fixed_values(before, "vocab", 3), world_size=1, last_step=5)
