"""The packed forward pass: equal to transformers' own model, document by document, and exported as one.

That roles are applied as defined is held by test_roles.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_pipeline.packing import Pack
from tests.helpers import VOCAB_SIZE, mixed_pack, tiny_model
from uvlm.backbone import Family, ModelConfig, build_backbone
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan
from uvlm.weights import Weights, check_weights, fill


def _bounds(pack: Pack) -> list[tuple[int, int]]:
    return list(zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True))


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).norm() / want.norm().clamp(min=1e-6)
    assert error < 1e-5, error


def _dense_plan(model: UnifiedVLM, pack: Pack) -> TokenPlan:
    return TokenPlan.of(pack, Policy(), model.num_layers)


def _assert_equal_to_transformers(model: UnifiedVLM, theirs: torch.nn.Module, pack: Pack) -> None:
    got = model.logits(pack, _dense_plan(model, pack))
    weight = torch.randn_like(got)
    model.zero_grad()
    (got * weight).sum().backward()
    rows = [theirs(input_ids=pack.ids[a:b][None]).logits[0] for a, b in _bounds(pack)]
    want = torch.cat(rows)[pack.labels != -100]
    theirs.zero_grad()
    (want * weight).sum().backward()
    _assert_close(got, want)
    got_gradients, want_gradients = _gradients(model.backbone), _gradients(theirs)
    assert got_gradients.keys() == want_gradients.keys()
    for name, want_gradient in want_gradients.items():
        _assert_close(got_gradients[name], want_gradient)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_dense_logits_and_gradients_equal_transformers_own_model_and_survive_its_folder(
    family: Family, tie_embeddings: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model, pack = tiny_model(family, tie_embeddings=tie_embeddings), mixed_pack()
    for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
        torch.nn.init.normal_(parameter, std=0.3)
    model.backbone.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs.lm_head) is torch.nn.Linear
    _assert_equal_to_transformers(model, theirs, pack)
    from_folder = _started_from(tmp_path)
    _assert_equal_to_transformers(from_folder, theirs, pack)


def test_a_rotation_that_is_scaled_in_the_pretrained_folder_stays_scaled(tmp_path: Path) -> None:
    backbone = tiny_model("llama").backbone
    backbone.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    backbone.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = _started_from(tmp_path)
    _assert_equal_to_transformers(model, theirs, mixed_pack())
    plain = UnifiedVLM(backbone).logits(mixed_pack(), _dense_plan(model, mixed_pack()))
    scaled = model.logits(mixed_pack(), _dense_plan(model, mixed_pack()))
    assert (plain - scaled).norm() > 1e-3 * plain.norm(), "the scaling matters here"


def _started_from(folder: Path, vocab_size: int = VOCAB_SIZE) -> UnifiedVLM:
    model = UnifiedVLM(build_backbone(ModelConfig.model_validate({"init_from": folder}), vocab_size))
    weights = Weights(folder)
    check_weights(model, weights)
    fill(model, seed=0, weights=weights)
    return model


def test_a_pretrained_vocabulary_grows_at_its_end_and_old_words_keep_their_rows(tmp_path: Path) -> None:
    for tie_embeddings in (True, False):
        folder = tmp_path / str(tie_embeddings)
        tiny_model("qwen2", tie_embeddings=tie_embeddings).backbone.save_pretrained(folder)
        before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = ModelConfig.model_validate({"init_from": folder})
        grown = _started_from(folder, VOCAB_SIZE + 11).backbone
        assert grown.config.vocab_size == VOCAB_SIZE + 11
        for name in ("model.embed_tokens", "lm_head"):
            weight = grown.get_submodule(name).weight
            assert weight.shape[0] == VOCAB_SIZE + 11
            assert torch.equal(weight[:VOCAB_SIZE], before.get_submodule(name).weight)
        assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tie_embeddings
        assert build_backbone(config, VOCAB_SIZE - 5).config.vocab_size == VOCAB_SIZE, "it never shrinks"


def test_sizes_are_read_from_the_pretrained_folder_and_a_contradiction_names_both(tmp_path: Path) -> None:
    tiny_model("llama", num_layers=3).backbone.save_pretrained(tmp_path)
    config = ModelConfig.model_validate({"init_from": str(tmp_path)})
    assert (config.family, config.num_layers, config.hidden_size, config.head_dim) == ("llama", 3, 32, 8)
    assert config.tie_embeddings is False
    with pytest.raises(ValueError, match=r"num_layers=5, but .* has 3; remove num_layers"):
        ModelConfig.model_validate({"init_from": str(tmp_path), "num_layers": 5})
    resolved = config.model_dump(mode="json")
    (tmp_path / "config.json").rename(tmp_path / "gone.json")
    assert ModelConfig.model_validate(resolved) == config, "a finished run is readable without its starting point"
    with pytest.raises(ValueError, match=r"has no config.json; give a finished run, or the folder"):
        ModelConfig.model_validate({"init_from": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": "three"}, "is not that of a Hugging Face language model"),
        ({"model_type": "gpt2"}, "holds a gpt2 model; the families are llama, qwen2, qwen3"),
        ({"num_hidden_layers": 5}, r"lacks 9 of its weights: model\.layers\.4\."),
        ({"hidden_size": 16}, "cannot be read; it needs the weights of its config.json"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1; set it to 0.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_folder_that_is_not_what_it_says_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    tiny_model("llama").backbone.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        _started_from(tmp_path)


def test_weights_that_are_cut_are_named(tmp_path: Path) -> None:
    tiny_model().backbone.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.init_from=.* cannot be read"):
        _started_from(tmp_path)


def test_before_weights_are_read_a_folder_gives_its_own_shapes(tmp_path: Path) -> None:
    tiny_model("qwen2").backbone.save_pretrained(tmp_path)  # with biases, which no key of ours names
    config = ModelConfig.model_validate({"init_from": tmp_path})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_backbone(config, VOCAB_SIZE + 3).named_parameters()}
    built = build_backbone(config, VOCAB_SIZE + 3)
    assert shapes == {name: p.shape for name, p in built.named_parameters()}


def test_every_weight_gets_a_gradient_from_a_pack_without_supervision() -> None:
    model, pack = tiny_model(), mixed_pack()
    pack.labels[:] = -100
    loss, nll, _ = model(pack, _dense_plan(model, pack), torch.zeros(0))
    assert nll.shape == (0,)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_fresh_model_predicts_the_uniform_distribution() -> None:
    model, pack = tiny_model(), mixed_pack()
    logits = model.logits(pack, _dense_plan(model, pack))
    loss = torch.nn.functional.cross_entropy(logits, pack.labels[pack.labels != -100])
    assert abs(loss.item() / torch.tensor(97.0).log().item() - 1) < 0.05


def test_heads_that_do_not_divide_are_refused_with_a_number_that_works() -> None:
    config = ModelConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=3, head_dim=8)
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        build_backbone(config, 11)


def test_sliding_window_backbones_are_refused() -> None:
    backbone = tiny_model("qwen3").backbone
    backbone.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(ValueError, match="sliding_attention"):
        UnifiedVLM(backbone)
