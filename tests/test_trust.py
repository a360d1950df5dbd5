"""Untrusted input never runs code: each file here would leave a canary behind if anything of it were run.

Elsewhere: pickled codes and pictures that are programs in shards (test_hostile_documents.py), members of tars that
climb out (test_hostile.py), an image tokenizer's pickled weights (test_image_tokens.py), chat templates that would
leave the sandbox (test_convert_chat.py).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.image_tokenizer_training import ImageTraining, train_image_tokenizer
from data_pipeline.image_tokens import ImageTokenizer
from data_pipeline.vocab import Vocab
from tests.corpus import launch, uvlm, write_corpus
from tests.test_export import make_run
from tests.test_export_refused import refusal
from uvlm.check import check
from uvlm.checkpoint_files import read_marker, write_marker, write_state
from uvlm.config import load_config
from uvlm.engine import checkpoint_weights, data_only
from uvlm.export import export
from uvlm.run_folder import load_model
from uvlm.trust import check_trusted


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config.yaml."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nothing may make. Whoever is asked whether code may run says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "canary"


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    """A finished run folder."""
    make_run(corpus, tmp_path / "run")
    return tmp_path / "run"


def program(canary: Path) -> str:
    """A module of the names that the folders below point at, which writes the canary where it is imported."""
    return (
        f"import os\nos.mkdir({str(canary)!r})\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM\n"
        "class Config(PretrainedConfig):\n    model_type = 'mystery'\n"
        "class Model(Qwen3ForCausalLM): pass\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )


def with_code(folder: Path, canary: Path, model_type: str | None = None) -> Path:
    """Put code of its own into a folder of transformers, under every name that its loaders look for."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "program.Config", "AutoModelForCausalLM": "program.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type or config["model_type"]}))
    (folder / "program.py").write_text(program(canary))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["program.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def with_pickled_weights(folder: Path, canary: Path) -> Path:
    """Replace a folder's safetensors by a pickle that would run code."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"model.norm.weight": Payload(canary)}, folder / "pytorch_model.bin")
    return folder


def test_these_payloads_are_live(run: Path, canary: Path) -> None:
    from transformers import AutoConfig

    folder = with_pickled_weights(run / "model", canary)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    canary.rmdir()  # it was there
    AutoConfig.from_pretrained(with_code(folder, canary, "mystery"))  # asks, and is told yes
    canary.rmdir()


def test_a_start_from_pickled_weights_is_refused(corpus: Path, run: Path, tmp_path: Path, canary: Path) -> None:
    folder = with_pickled_weights(run / "model", canary)
    config = load_config(corpus, [f"run={tmp_path / 'new'}", f"model={{init_from: {folder}}}"])
    with pytest.raises(ValueError, match="as safetensors"):
        check(config, world_size=1)
    assert not canary.exists()


def test_a_start_from_a_model_with_code_of_its_own_reads_data_only(
    corpus: Path, run: Path, tmp_path: Path, canary: Path
) -> None:
    overrides = [f"run={tmp_path / 'new'}", f"model={{init_from: {with_code(run / 'model', canary)}}}"]
    check(load_config(corpus, overrides), world_size=1)  # its family is known: all that is read is sizes and weights
    assert not canary.exists()
    with_code(run / "model", canary, "mystery")
    with pytest.raises(ValueError, match="holds a mystery model; the families are llama, qwen2, qwen3"):
        load_config(corpus, overrides)
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["qwen3", "mystery"])
def test_a_finished_run_with_code_in_its_model_is_data_or_damaged(
    corpus: Path, run: Path, tmp_path: Path, canary: Path, model_type: str
) -> None:
    with_code(run / "model", canary, model_type)
    vocab = Vocab.load(corpus.parent / "tokenizer")
    if model_type == "qwen3":
        load_model(run, vocab)
        export(run, tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*.py")), "it is not handed on"
    else:
        with pytest.raises(ValueError, match="is damaged"):
            load_model(run, vocab)
        assert "is damaged" in refusal(run, tmp_path / "out")
    assert not canary.exists()


def test_a_finished_run_with_pickled_weights_is_refused(corpus: Path, run: Path, tmp_path: Path, canary: Path) -> None:
    with_pickled_weights(run / "model", canary)
    with pytest.raises(ValueError, match="is damaged"):
        load_model(run, Vocab.load(corpus.parent / "tokenizer"))
    assert "has no model.embed_tokens.weight" in refusal(run, tmp_path / "out")
    assert not canary.exists()


def test_a_tokenizer_folder_with_code_of_its_own_is_data_or_refused(corpus: Path, tmp_path: Path, canary: Path) -> None:
    folder = Path(shutil.copytree(corpus.parent / "tokenizer", tmp_path / "tokenizer"))
    (folder / "text" / "config.json").write_text('{"model_type": "mystery"}')
    with_code(folder / "text", canary)
    with_code(folder / "image", canary)
    Vocab.load(folder)
    ImageTokenizer.load(folder / "image")
    with_code(folder / "image", canary, "mystery")
    with pytest.raises(ValueError, match="is of model_type 'mystery'"):
        ImageTokenizer.load(folder / "image")
    assert not canary.exists()


def test_the_state_of_a_tokenizer_training_is_data_or_refused(tmp_path: Path, canary: Path) -> None:
    torch.save({"identity": Payload(canary)}, tmp_path / "image.training.pt")
    pictures = np.zeros((16, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"image\.training\.pt is no state of a training; remove it"):
        train_image_tokenizer(pictures, pictures, tmp_path / "image", ImageTraining(image_size=8, steps=1))
    assert not canary.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_config_that_asks_for_objects_of_python_is_no_yaml(corpus: Path, canary: Path, tag: str) -> None:
    value = f"{tag} [{canary}]"
    path = canary.with_name("config.yaml")
    path.write_text(f"{corpus.read_text()}\nseed: {value}\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(path)
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(corpus, [f"seed={value}"])
    assert not canary.exists()


def hostile_checkpoint(folder: Path, canary: Path, vocabulary: str) -> Path:
    """A complete checkpoint without ZeRO that runs code where it is unpickled; its marker fits its files."""
    folder.mkdir(parents=True)
    torch.save({"module": {"backbone.model.norm.weight": Payload(canary)}}, folder / "mp_rank_00_model_states.pt")
    fixed = {"vocabulary": vocabulary}
    write_marker(folder, {"format_version": 2, "step": 7, "world_size": 1, "fixed": fixed, "files": {}, "rows": {}})
    return folder


def test_a_checkpoint_that_would_run_code_is_opened_only_with_trust(
    corpus: Path, run: Path, tmp_path: Path, canary: Path
) -> None:
    """It lies in the run and belongs to this user, as all of a run folder does that somebody unpacked."""
    fingerprint = Vocab.load(corpus.parent / "tokenizer").fingerprint
    folder = hostile_checkpoint(run / "checkpoints" / "step_00000007", canary, fingerprint)
    sentence = refusal(run, tmp_path / "out", step=7)
    assert "which is no data; opening it could run code; if you know who wrote it" in sentence
    assert not canary.exists()
    with pytest.raises(ValueError, match=r"has no model\.embed_tokens\.weight"):
        export(run, tmp_path / "out", step=7, trust=True)
    canary.rmdir()  # the payload was live
    # DeepSpeed's own reader of sharded files, which asks torch to unpickle whatever there is.
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="which is no data"):
        checkpoint_weights(folder)
    assert not canary.exists()
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint_weights(folder, trust=True)
    canary.rmdir()


def test_what_deepspeed_itself_puts_into_checkpoints_is_data(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scalers = [LossScaler(4.0), DynamicLossScaler(2.0**16, 1000, 1, 2, False, dtype=torch.half)]
    torch.save([*scalers, ZeroStageEnum.weights, fragment_address(numel=3, start=5)], tmp_path / "state.pt")
    with data_only(tmp_path):
        static, dynamic, stage, fragment = torch.load(tmp_path / "state.pt", weights_only=False)  # as DeepSpeed asks
    assert (static.cur_scale, dynamic.cur_scale, stage, fragment.start) == (4.0, 2.0**16, 3, 5)


@pytest.mark.slow
def test_a_run_whose_checkpoint_would_run_code_does_not_go_on(corpus: Path, tmp_path: Path, canary: Path) -> None:
    run = tmp_path / "run"
    launch(corpus, 1, f"run={run}", "optim.steps=2", "checkpoint.every=2")
    folder = run / "checkpoints" / "step_00000002"
    state = read_marker(folder)
    assert isinstance(state, dict)
    for path in folder.glob("*.pt"):
        whole = torch.load(path, weights_only=False)
        record = write_state({**whole, "hook": Payload(canary)}, path)
        state["files"][path.name] = {"bytes": record.num_bytes, "sha256": record.sha256, "rank": 0}
    write_marker(folder, state)  # all checksums fit
    result = uvlm("launch", str(corpus), "--nproc=1", f"run={run}", "optim.steps=3")
    assert result.returncode == 1
    assert "which is no data; opening it could run code" in result.stderr
    assert not canary.exists()


def test_a_checkpoint_that_a_link_brings_in_from_elsewhere_is_opened_only_with_trust(
    corpus: Path, run: Path, tmp_path: Path, canary: Path
) -> None:
    fingerprint = Vocab.load(corpus.parent / "tokenizer").fingerprint
    foreign = hostile_checkpoint(tmp_path / "foreign" / "step_00000007", canary, fingerprint)
    link = run / "checkpoints" / "step_00000007"
    link.parent.mkdir()
    link.symlink_to(foreign)
    assert f"{link} is a link to {foreign}, which lies outside {run}" in refusal(run, tmp_path / "out", step=7)
    link.unlink()
    link.mkdir()
    for path in foreign.iterdir():  # one file after the other
        (link / path.name).symlink_to(path)
    assert "is a link to" in refusal(run, tmp_path / "out", step=7)
    shutil.rmtree(link)
    link.parent.rmdir()
    link.parent.symlink_to(foreign.parent)  # the whole folder of checkpoints
    assert "is a link to" in refusal(run, tmp_path / "out", step=7)
    assert not canary.exists()
    check_trusted(link, run, trust=True)


def test_a_link_inside_the_run_and_a_link_to_the_run_are_its_own(run: Path, tmp_path: Path) -> None:
    (run / "elsewhere" / "step_00000007").mkdir(parents=True)
    (run / "checkpoints").symlink_to(run / "elsewhere")
    (tmp_path / "link").symlink_to(run)
    check_trusted(tmp_path / "link" / "checkpoints" / "step_00000007", tmp_path / "link", trust=False)


def test_a_checkpoint_of_another_user_is_opened_only_with_trust(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    check_trusted(folder, run, trust=False)
    number = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: number + 1)
    with pytest.raises(ValueError, match=rf"belongs to another user \(number {number}\).*give --trust"):
        check_trusted(folder, run, trust=False)
    check_trusted(folder, run, trust=True)
