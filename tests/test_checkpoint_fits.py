"""What a run may not change under its own checkpoints is refused, with both values; the rest may change."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from tests.helpers import tiny_model
from tests.one_rank import OneRank, change_state, checkpoint_config, load, save
from uvlm.checkpoint import check_fits, complete, fixed_values, load_latest
from uvlm.checkpoint_files import MARKER
from uvlm.config import Config, load_config
from uvlm.engine import Engine

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return checkpoint_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "vocab", "change", "sentence"),
    [
        (["seed=1"], "vocab", {}, "was written with seed=0, this config has 1; set it back"),
        (["data.num_rows=8"], "vocab", {}, "was written with data.num_rows=2, this config has 8"),
        (["optim.weight_decay=0.2"], "vocab", {}, "was written with optim.weight_decay=0.1, this config has 0.2"),
        (["model.num_layers=5"], "vocab", {}, "was written with model.num_layers=4, this config has 5"),
        (["data.train=[{path: other}]"], "vocab", {}, "was written with data.train"),
        ([], "other", {}, "was written with vocabulary='vocab', this config has 'other'"),
        ([], "vocab", {"fixed": {}}, "this config has"),
        (
            ["optim={steps: 5, learning_rate: 1}"],
            "vocab",
            {"step": 9},
            "has more steps than optim.steps=5; set ",
        ),
        ([], "vocab", {"format_version": 99}, r"was written by a newer uvlm \(format 99\); update uvlm"),
    ],
    ids=["seed", "rows", "decay", "model", "sources", "vocabulary", "nothing", "steps", "format"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_values(
    config: Config, overrides: list[str], vocab: str, change: dict[str, Any], sentence: str
) -> None:
    save(config, 1)
    change_state(config, **change)
    other = load_config(Path("demo"), [f"run={config.run}", *overrides])
    fixed = fixed_values(other, vocab, 3)
    with pytest.raises(ValueError, match=sentence):
        check_fits(other, fixed)
    engine = OneRank()
    with pytest.raises(ValueError, match=sentence):
        load_latest(cast("Engine", engine), other, fixed)
    assert not engine.loaded


def test_a_checkpoint_of_the_format_without_checksums_is_refused(config: Config) -> None:
    save(config, 1)
    (complete(config.run)[-1] / MARKER).write_text('{"format_version": 1, "step": 1}')
    for refuse in (lambda: check_fits(config, {}), lambda: load(config)):
        with pytest.raises(ValueError, match=r"was written by an older uvlm \(format 1\), without checksums; finish"):
            refuse()


def test_another_number_of_ranks_is_no_reason_to_refuse(config: Config) -> None:
    save(config, 1)
    change_state(config, world_size=2)
    check_fits(config, fixed_values(config, "vocab", 3))


def test_what_may_change_within_a_run_may_change(config: Config) -> None:
    save(config, 1)
    other = load_config(Path("demo"), [f"run={config.run}", "optim.steps=9999", "log_every=3"])
    check_fits(other, fixed_values(other, "vocab", 3))


def test_a_finished_run_is_not_given_a_policy_it_was_not_trained_with(config: Config) -> None:
    save(config, 100)
    for steps, policy in ((100, "dense"), (101, "ffn_skip"), (100, "ffn_skip")):
        keys = [f"run={config.run}", f"policy={{name: {policy}}}", f"optim.steps={steps}"]
        start = load_config(Path("demo"), keys)
        if (steps, policy) != (100, "ffn_skip"):
            check_fits(start, fixed_values(start, "vocab", 3))
            continue
        with pytest.raises(ValueError, match=r"has done all of optim.steps=100 with another policy"):
            check_fits(start, fixed_values(start, "vocab", 3))


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
    save(one, 1)
    check_fits(moved, fixed_values(moved, "vocab", 3))
    for start in (other, fresh):
        with pytest.raises(ValueError, match=r"was written with model.init_from \(its config.json\)='"):
            check_fits(start, fixed_values(start, "vocab", 3))
    folders[0].joinpath("config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json; a run that began there needs it to go on"):
        fixed_values(one, "vocab", 3)


def test_projections_of_images_cannot_change_within_a_run(config: Config) -> None:
    plain, own = (
        load_config(Path("demo"), [f"run={config.run}", f"policy.input_projections={value}"])
        for value in ("shared", "kv")
    )
    for before, after in ((plain, own), (own, plain)):
        save(before, 1)
        with pytest.raises(ValueError, match=r"policy.input_projections and policy.target_projections, by layer"):
            check_fits(after, fixed_values(after, "vocab", 3))
        check_fits(before, fixed_values(before, "vocab", 3))


def test_a_checkpoint_that_a_link_brings_into_the_run_is_opened_with_trust_alone(
    config: Config, tmp_path: Path
) -> None:
    assert save(config, 1)
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    (checkpoint,) = complete(config.run)
    shutil.move(checkpoint, elsewhere)
    checkpoint.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link to .*, which lies outside .*; opening it could .*--trust"):
        load(config)
    engine = OneRank()
    assert load_latest(cast("Engine", engine), config, fixed_values(config, "vocab", 3), trust=True).step == 1
