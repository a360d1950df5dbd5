"""The packed forward pass: equal to transformers' own, document by document, and to roles applied by definition."""

from typing import Literal

import pytest
import torch

from data_pipeline.packing import Pack
from tests.helpers import mixed_pack, tiny_model
from uvlm.model import ModelConfig, UnifiedVLM, build_backbone
from uvlm.policies import Dense, Policy, Route
from uvlm.token_plan import TokenPlan

ROUTE = Route(first_layer=1, last_layer=2, keep_input=0.5, keep_target=0.25)


def _bounds(pack: Pack) -> list[tuple[int, int]]:
    return list(zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True))


def _gradients(model: UnifiedVLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    error = (got - want).norm() / want.norm().clamp(min=1e-6)
    assert error < 1e-5, error


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_dense_logits_and_gradients_equal_transformers_own_model(
    family: Literal["llama", "qwen2", "qwen3"], tie_embeddings: bool
) -> None:
    model, pack = tiny_model(family, tie_embeddings=tie_embeddings), mixed_pack()
    got = model(pack, TokenPlan.of(pack, Dense(), model.num_layers))
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    got_gradients = _gradients(model)

    model.zero_grad()
    rows = [model.backbone(input_ids=pack.ids[a:b][None]).logits[0] for a, b in _bounds(pack)]
    want = torch.cat(rows)[pack.labels != -100]
    (want * weight).sum().backward()
    _assert_close(got, want)
    for name, want_gradient in _gradients(model).items():
        _assert_close(got_gradients[name], want_gradient)


def _routed_by_definition(model: UnifiedVLM, pack: Pack, keep_by_layer: list[torch.Tensor]) -> torch.Tensor:
    """Each document alone; in each layer only the kept rows run, at their own positions, the rest pass unchanged."""
    inner = model.backbone.model
    outputs = []
    for start, stop in _bounds(pack):
        hidden = inner.embed_tokens(pack.ids[start:stop])
        positions = torch.arange(stop - start)
        for layer, keep in zip(inner.layers, keep_by_layer, strict=True):
            rows = torch.nonzero(keep[start:stop]).flatten()
            if len(rows):
                tables = inner.rotary_emb(hidden, positions[rows][None])
                causal = torch.full((len(rows), len(rows)), -torch.inf).triu(1)[None, None]
                out = layer(hidden[rows][None], attention_mask=causal, position_embeddings=tables)[0]
                hidden = hidden.clone()
                hidden[rows] = out
        outputs.append(inner.norm(hidden))
    return model.backbone.lm_head(torch.cat(outputs)[pack.labels != -100])


def test_route_equals_roles_applied_by_definition() -> None:
    model, pack = tiny_model(), mixed_pack()
    plan = TokenPlan.of(pack, ROUTE, model.num_layers, seed=5)
    keep_by_layer = []
    for span in plan.spans:
        keep = torch.ones(len(pack.ids), dtype=torch.bool)
        if span.kept is not None:
            keep[:] = False
            keep[span.kept] = True
        keep_by_layer += [keep] * (span.stop - span.first)
    assert sum(int((~keep).sum()) for keep in keep_by_layer) == 2 * (8 + 19)

    got = model(pack, plan)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    got_gradients = _gradients(model)
    model.zero_grad()
    want = _routed_by_definition(model, pack, keep_by_layer)
    (want * weight).sum().backward()
    _assert_close(got, want)
    for name, want_gradient in _gradients(model).items():
        _assert_close(got_gradients[name], want_gradient)


@pytest.mark.parametrize("policy", [Dense(), ROUTE], ids=lambda policy: policy.name)
def test_no_token_changes_a_prediction_before_it_or_in_another_document(policy: Policy) -> None:
    model, pack = tiny_model(), mixed_pack()
    plan = TokenPlan.of(pack, policy, model.num_layers)
    before = model(pack, plan)
    supervised = torch.nonzero(pack.labels != -100).flatten()
    for changed in range(0, int(pack.cu_seqlens[-2]), 7):
        other = mixed_pack()
        other.ids[changed] = (other.ids[changed] + 1) % 97
        stop = int(pack.cu_seqlens[torch.searchsorted(pack.cu_seqlens, changed, right=True)])
        unaffected = (supervised < changed) | (supervised >= stop)
        assert torch.equal(model(other, plan)[unaffected], before[unaffected])


def test_route_that_keeps_all_is_dense_bit_for_bit() -> None:
    model, pack = tiny_model(), mixed_pack()
    keep_all = Route(first_layer=1, last_layer=2, keep_input=1.0, keep_target=1.0)
    got = model(pack, TokenPlan.of(pack, keep_all, model.num_layers))
    assert torch.equal(got, model(pack, TokenPlan.of(pack, Dense(), model.num_layers)))


def test_every_weight_gets_a_gradient_from_a_pack_without_supervision() -> None:
    model, pack = tiny_model(), mixed_pack()
    pack.labels[:] = -100
    logits = model(pack, TokenPlan.of(pack, ROUTE, model.num_layers))
    assert logits.shape == (0, 97)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_fresh_model_predicts_the_uniform_distribution() -> None:
    model, pack = tiny_model(), mixed_pack()
    logits = model(pack, TokenPlan.of(pack, Dense(), model.num_layers))
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
