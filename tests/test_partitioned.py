"""Two real ranks build a model: under ZeRO-3 each holds its half from the start, with the values of a plain build.

The traps (run): built inside `zero.Init`, a model of `transformers` keeps torch's own first weights, its tied embedding
comes apart, and its rotary frequencies are rounded to the training dtype. None of it raises an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.vocab import Vocab
from tests.corpus import uvlm, write_corpus
from uvlm.backbone import DTYPES, build_backbone, weights_folder
from uvlm.config import load_config
from uvlm.model import UnifiedVLM
from uvlm.weights import IMAGE_PROJECTIONS, Weights, fill

pytestmark = pytest.mark.slow

OWN = "policy={name: dense, input_projections: kv}"
CASES: dict[str, Any] = {
    "fresh": {"stage": 3, "overrides": []},
    "fp32": {"stage": 3, "overrides": ["dtype=fp32"]},
    "tied": {"stage": 3, "overrides": ["model.tie_embeddings=true"]},
    "own": {"stage": 3, "overrides": [OWN]},
    "stage_1": {"stage": 1, "overrides": []},
    "stage_2": {"stage": 2, "overrides": [OWN]},
    "folder": {"stage": 3, "overrides": [OWN, "model={init_from: FOLDER}"]},
    "folder_stage_2": {"stage": 2, "overrides": [OWN, "model={init_from: FOLDER}"]},
    "frozen": {"stage": 3, "overrides": ["model.freeze=[model.embed_tokens.weight, model.layers.1.*]"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a pretrained folder of a smaller vocabulary with image projections beside it."""
    folder = tmp_path_factory.mktemp("partitioned")
    config = load_config(write_corpus(folder), [OWN])
    torch.manual_seed(1)
    model = UnifiedVLM(build_backbone(config.model, 200), config.policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.backbone.save_pretrained(folder / "pretrained")
    save_file(model.image_projections.state_dict(), folder / "pretrained" / IMAGE_PROJECTIONS)
    return folder


def _cases(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(CASES).replace("FOLDER", str(folder / "pretrained")))


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += ["-m", "tests.partitioned_worker", str(folder), json.dumps(_cases(folder))]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {name: torch.load(folder / f"{name}.pt") for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_first_weights_are_those_of_one_plain_process(name: str, folder: Path, built: dict[str, Any]) -> None:
    config = load_config(folder / "config.yaml", _cases(folder)[name]["overrides"])
    vocab = Vocab.load(config.data.tokenizer)
    backbone = build_backbone(config.model, vocab.size, DTYPES[config.dtype])
    model = UnifiedVLM(backbone, config.policy)
    fill(model, config.seed, Weights(weights_folder(config.model.init_from)) if config.model.init_from else None)
    got = built[name]
    assert got["values"].keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert got["values"][key].dtype == parameter.dtype
        assert torch.equal(got["values"][key], parameter), key
    assert got["rotation"].dtype == torch.float32
    assert torch.equal(got["rotation"], backbone.model.rotary_emb.inv_freq)
    assert got["tied"] == config.model.tie_embeddings


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["stage"] == 3])
def test_under_zero_3_a_rank_holds_its_half_of_every_weight(name: str, built: dict[str, Any]) -> None:
    values, held, shares = (built[name][key] for key in ("values", "held", "shares"))
    assert set(held.values()) == {0}, "nothing is whole"
    assert {key: 2 * share for key, share in shares.items()} == {key: v.numel() for key, v in values.items()}


def test_what_a_folder_brings_is_said(built: dict[str, Any]) -> None:
    sentence = built["folder"]["sentence"]
    assert "weights read from" in sentence
    assert "new words at the end of its vocabulary" in sentence
    assert "weights of image projections read" in sentence
    assert built["fresh"]["sentence"].endswith("weights drawn anew")


@pytest.mark.parametrize(
    ("key", "sentence"), [("mics_shard_size", "MiCS ZeRO-3 sharding has been removed"), ("overlap_com", "overlap_com")]
)
def test_what_deepspeed_refuses_is_told_without_a_stack_trace(
    folder: Path, tmp_path: Path, key: str, sentence: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, key: 2}}))
    result = uvlm("train", str(folder / "config.yaml"), f"run={tmp_path / 'run'}", f"deepspeed={path}")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_frozen_weights_are_not_trained(built: dict[str, Any]) -> None:
    trained = built["frozen"]["trained"]
    assert "backbone.model.layers.0.mlp.up_proj.weight" in trained
    assert not [name for name in trained if "embed_tokens" in name or ".layers.1." in name]
    assert "weights are frozen" in built["frozen"]["sentence"]
