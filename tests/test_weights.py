"""What weights start from: drawn by name, read one at a time, frozen by name. Under ZeRO-3 see test_partitioned.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import VOCAB_SIZE, tiny_model
from uvlm.backbone import ModelConfig, build_backbone, weights_folder
from uvlm.config import load_config
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.run_folder import save_model
from uvlm.weights import IMAGE_PROJECTIONS, Filled, Weights, check_weights, fill, freeze

OWN = Policy.model_validate({"name": "dense", "input_projections": "kv"})


def _values(model: UnifiedVLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _write(folder: Path, model: UnifiedVLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.backbone.save_pretrained(folder)
    if own := model.image_projections.state_dict():
        save_file(own, folder / IMAGE_PROJECTIONS)


def test_the_same_seed_draws_the_same_weights_whatever_was_drawn_before() -> None:
    models = []
    for seed, before in ((5, 1), (5, 2), (6, 1)):
        model = tiny_model(policy=OWN)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        fill(model, seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is as it was"
        models.append(_values(model))
    first, same, other = models
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["backbone.model.layers.2.mlp.up_proj.weight"])


def test_what_is_drawn_has_the_distribution_of_the_family() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    fill(model, 0)
    values = _values(model)
    assert values["backbone.lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (values["backbone.model.norm.weight"] == 1).all()
    assert (values["backbone.model.layers.0.self_attn.q_proj.bias"] == 0).all()


def test_projections_of_images_begin_as_copies_of_the_shared_ones() -> None:
    model = tiny_model(policy=OWN)
    filled = fill(model, 0)
    values = _values(model)
    for layer in range(model.num_layers):
        shared = values[f"backbone.model.layers.{layer}.self_attn.k_proj.weight"]
        assert torch.equal(values[f"image_projections.{layer}.input_k.weight"], shared)
    assert filled.num_projections_copied == 2 * model.num_layers


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_folder_is_read_and_what_is_carried_over_is_said(tmp_path: Path, tie_embeddings: bool) -> None:
    source = tiny_model(policy=OWN, tie_embeddings=tie_embeddings)
    _write(tmp_path, source)
    config = ModelConfig.model_validate({"init_from": tmp_path})
    model = UnifiedVLM(build_backbone(config, VOCAB_SIZE + 3), OWN)
    weights = Weights(tmp_path)
    check_weights(model, weights)
    filled = fill(model, 0, weights)
    values, old = _values(model), _values(source)
    for name, value in old.items():
        assert torch.equal(values[name][: len(value)], value), name
    assert filled == Filled(num_read=len(list(source.backbone.parameters())), num_new_words=3, num_projections_read=8)
    sentence = filled.sentence(tmp_path)
    assert "3 new words" in sentence
    assert "8 weights of image projections read" in sentence
    assert "optimizer, schedule and place in the data begin anew" in sentence


def test_new_words_lie_around_the_mean_of_the_old_ones_with_a_share_of_their_covariance(tmp_path: Path) -> None:
    source = tiny_model()
    _write(tmp_path, source)
    old = source.backbone.model.embed_tokens.weight.detach() * torch.linspace(0.1, 3, 32) + 1
    with torch.no_grad():
        source.backbone.model.embed_tokens.weight.copy_(old)
    source.backbone.save_pretrained(tmp_path)
    model = UnifiedVLM(build_backbone(ModelConfig.model_validate({"init_from": tmp_path}), VOCAB_SIZE + 4000))
    fill(model, 0, Weights(tmp_path))
    new = model.backbone.model.embed_tokens.weight[VOCAB_SIZE:].detach()
    assert torch.allclose(new.mean(dim=0), old.mean(dim=0), atol=1e-4)
    expected = old.std(dim=0, correction=0) * 1e-9**0.5
    assert torch.allclose((new - old.mean(dim=0)).std(dim=0), expected, rtol=0.1)


def test_weights_in_several_files_are_found_and_nothing_outside_the_folder_is(tmp_path: Path) -> None:
    model = tiny_model()
    model.backbone.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    assert len(set(tree["weight_map"].values())) > 1
    weights = Weights(tmp_path / "model")
    assert torch.equal(weights.read("model.norm.weight"), model.backbone.model.norm.weight)
    save_file(dict(load_file(tmp_path / "model" / tree["weight_map"]["model.norm.weight"])), tmp_path / "outside")
    tree["weight_map"] = dict.fromkeys(tree["weight_map"], "../outside")
    index.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"cannot be read; it needs the weights of its config\.json as safetensors"):
        Weights(tmp_path / "model")


def test_projections_that_the_policy_does_not_have_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, tiny_model(policy=OWN))
    config = ModelConfig.model_validate({"init_from": tmp_path})
    check_weights(UnifiedVLM(build_backbone(config, VOCAB_SIZE), OWN), Weights(tmp_path))
    with pytest.raises(ValueError, match="not those of this policy; give the policy it was trained with"):
        check_weights(UnifiedVLM(build_backbone(config, VOCAB_SIZE)), Weights(tmp_path))


def test_a_run_that_has_no_model_yet_is_no_start_for_another(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="a run without a trained model; bring it to its end, or export"):
        weights_folder(tmp_path)
    (tmp_path / "model").mkdir()
    assert weights_folder(tmp_path) == tmp_path / "model"


def test_every_rank_goes_through_the_same_weights_and_only_the_writer_writes(tmp_path: Path) -> None:
    """What ZeRO-3 needs: the order does not depend on who writes."""
    seen: dict[bool, list[Any]] = {}
    for is_writer in (True, False):
        order = seen[is_writer] = []

        @contextlib.contextmanager
        def gathered(
            parameters: Sequence[nn.Parameter], order: list[Any] = order, is_writer: bool = is_writer
        ) -> Iterator[bool]:
            order.append([tuple(p.shape) for p in parameters])
            yield is_writer

        model = tiny_model(policy=OWN, tie_embeddings=True)
        before = _values(model)
        fill(model, 1, gathered=gathered)
        changed = [name for name, value in _values(model).items() if not torch.equal(value, before[name])]
        assert bool(changed) == is_writer
    assert seen[True] == seen[False]


def test_frozen_weights_are_named_and_a_name_that_does_not_exist_is_refused() -> None:
    model = tiny_model(policy=OWN)
    num_frozen = freeze(model, ["model.embed_tokens.weight", "model.layers.0.*", "image_projections.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not [name for name in trained if ".layers.0." in name or "embed" in name or "image_projections" in name]
    assert num_frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    with pytest.raises(ValueError, match=r"no weight has the name 'lm_haed.weight'; the nearest is 'lm_head.weight'"):
        freeze(tiny_model(), ["lm_haed.weight"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(tiny_model(), ["*"])


def test_a_model_with_weights_that_are_not_finite_is_never_published(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    config = load_config(Path("demo"), [f"run={tmp_path}"])
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight and 0 more weights are not finite; no model"):
        save_model(config, model, "vocab")
    assert not (tmp_path / "model").exists()
