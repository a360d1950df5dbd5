"""What cannot be exported is refused in one sentence, and nothing is written. Untrusted files: test_trust.py."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.corpus import write_corpus
from tests.test_export import load, make_run
from uvlm.checkpoint_files import write_marker, write_state
from uvlm.cli import app
from uvlm.export import export


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config.yaml."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    """A finished run folder of its own for each test."""
    make_run(corpus, tmp_path / "run")
    return tmp_path / "run"


def make_checkpoint(run: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of RUN/model's weights, as training without ZeRO writes it, and its state."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    weights = load_file(run / "model" / "model.safetensors")
    state = {"module": {f"backbone.{name}": tensor for name, tensor in weights.items()}}
    file = write_state(state, folder / "mp_rank_00_model_states.pt")
    marker = {
        "format_version": 2,
        "step": step,
        "fixed": {"vocabulary": json.loads((run / "model" / "config.json").read_text())["uvlm_vocabulary"]},
        "files": {file.name: {"bytes": file.num_bytes, "sha256": file.sha256, "rank": 0}},
    }
    write_marker(folder, marker)
    return folder, marker


def refusal(run: Path, out: Path, **options: Any) -> str:
    """The sentence of an export that is refused, and of which nothing is left."""
    before = sorted(out.rglob("*")) if out.is_dir() else out.exists()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the callers look at what it says
        export(run, out, **options)
    assert (sorted(out.rglob("*")) if out.is_dir() else out.exists()) == before
    assert not list(out.parent.glob(".partial_*"))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_folder_that_holds_something_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert "is no folder" in refusal(run, out)
    out.unlink()
    out.symlink_to(tmp_path)
    assert "is no folder" in refusal(run, out)
    out.unlink()
    out.mkdir()
    export(run, out)  # empty
    assert "is not empty; give the path of a new folder" in refusal(run, out)


def test_a_run_without_anything_to_export_is_refused(corpus: Path, run: Path, tmp_path: Path) -> None:
    assert "is no run folder" in refusal(tmp_path, tmp_path / "out")
    assert "has neither a trained model nor a complete checkpoint" in refusal(run, tmp_path / "out", step=3)
    make_run(corpus, tmp_path / "begun", finished=False)
    assert "has neither a trained model nor a complete checkpoint" in refusal(tmp_path / "begun", tmp_path / "out")
    make_checkpoint(run, 10)
    assert "has no checkpoint of step 3; its steps are 10" in refusal(run, tmp_path / "out", step=3)
    assert "there is no dtype int8; use bf16, fp16, fp32" in refusal(run, tmp_path / "out", dtype="int8")


def test_image_projections_of_their_own_are_refused(corpus: Path, run: Path, tmp_path: Path) -> None:
    make_run(corpus, tmp_path / "own", "policy.input_projections=qkv", "policy.target_projections=qkv")
    for options in ({}, {"dense": True}):
        assert "for which a model of transformers has no place" in refusal(
            tmp_path / "own", tmp_path / "out", **options
        )
    save_file({"0.input_q.weight": torch.zeros(1)}, run / "model" / "image_projections.safetensors")
    assert "for which a model of transformers has no place" in refusal(run, tmp_path / "out")


def test_a_model_that_leaves_tokens_out_is_exported_only_where_that_is_wanted(corpus: Path, tmp_path: Path) -> None:
    policy = "policy={input: {name: himix, layers: [1]}, target: {name: dense}}"
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(corpus, run, policy)
    assert "leaves out image tokens (input: himix)" in refusal(run, out)
    result = CliRunner().invoke(app, ["export", str(run), str(out), "--dense"])
    assert result.exit_code == 0, result.output
    assert "Trained to leave out image tokens (himix)" in (out / "README.md").read_text()
    make_run(corpus, tmp_path / "tail", policy, "policy.full_tail=0.5")
    export(tmp_path / "tail", tmp_path / "dense")  # the finished model leaves out none
    assert "leave out" not in (tmp_path / "dense" / "README.md").read_text()


def test_a_model_of_another_vocabulary_is_refused(corpus: Path, run: Path, tmp_path: Path) -> None:
    path = run / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "uvlm_vocabulary": "other"}))
    assert "was trained with vocabulary other" in refusal(run, tmp_path / "out")


def test_weights_that_are_damaged_missing_or_of_another_shape_are_refused(run: Path, tmp_path: Path) -> None:
    path, out = run / "model" / "model.safetensors", tmp_path / "out"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert "is damaged" in refusal(run, out)
    path.write_bytes(whole)
    weights = load_file(path)
    norm = weights.pop("model.norm.weight")
    save_file(weights, path)
    assert "has no model.norm.weight" in refusal(run, out)
    save_file({**weights, "model.norm.weight": norm[:-1].clone()}, path)
    assert "has model.norm.weight of shape [63]" in refusal(run, out)


def test_a_disk_that_is_too_full_is_found_before_and_leaves_nothing_if_it_fills_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
        assert "MB for the exported model" in refusal(run, tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("uvlm.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_checkpoint_that_is_damaged_newer_or_of_other_words_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_checkpoint(run, 10)
    folder, marker = make_checkpoint(run, 15)
    path = folder / "mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    assert "is damaged: its checksum" in refusal(run, out, step=15)
    path.unlink()
    assert f"{path.name} is missing; give --step with another checkpoint" in refusal(run, out, step=15)
    path.write_bytes(whole)
    write_marker(folder, {**marker, "fixed": {"vocabulary": "other"}})
    assert "was trained with vocabulary other" in refusal(run, out, step=15)
    write_marker(folder, {**marker, "format_version": 99})
    assert "was written by a newer uvlm (format 99)" in refusal(run, out, step=15)
    (folder / "state.json").write_text("{}")
    assert "is damaged" in refusal(run, out, step=15)
    (folder / "state.json").unlink()
    assert "has no checkpoint of step 15; its steps are 10" in refusal(run, out, step=15), "it is not complete"
    export(run, out, step=10)  # the one before is whole
    expected = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(out).state_dict().items())


def test_a_checkpoint_of_another_model_or_with_image_projections_is_refused(run: Path, tmp_path: Path) -> None:
    folder, marker = make_checkpoint(run, 15)
    path = folder / "mp_rank_00_model_states.pt"
    state = torch.load(path)
    write_marker(folder, {**marker, "files": {}})
    for name, tensor, sentence in (
        ("backbone.model.norm.weight", torch.zeros(3), r"has model.norm.weight of shape [3]"),
        ("image_projections.0.input_q.weight", torch.zeros(3), "has image projections of its own"),
    ):
        write_state({"module": {**state["module"], name: tensor}}, path)
        assert sentence in refusal(run, tmp_path / "out", step=15)
