"""Every policy, packed, is what roles mean by definition; nothing leaks; keep all is dense; every module runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from data_pipeline.packing import Pack
from tests.helpers import VOCAB_SIZE, tiny_model
from tests.random_packs import (
    BOTH_KINDS,
    IMAGE_FIRST,
    IMAGE_LAST,
    MANY_IMAGES,
    NO_LOSS,
    TEXT_ONLY,
    every_document,
    pack_of,
    packs,
)
from tests.reference import reference
from tests.test_refused_policies import image_policies
from uvlm.backbone import Family
from uvlm.model import Recompute, UnifiedVLM
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

NUM_LAYERS = 5

_PYRAMID = {"name": "pyramid", "layers": [0, 2, 3], "keep": [0.75, 0.5, 0.25]}
_POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense with projections": {"input_projections": "qkv", "target_projections": "qkv"},
    "route": {"name": "route", "first_layer": 1, "last_layer": 3},
    "route from the first layer, annealed": {
        "name": "route",
        "first_layer": 0,
        "last_layer": 2,
        "keep": {"start": 0.1, "end": 1.0},
        "target_projections": "kv",
        "full_tail": 0.1,
    },
    "himix": {"input": {"name": "himix"}},
    "himix with projections": {"input": {"name": "himix"}, "input_projections": "kv"},
    "himix in some layers, both": {"name": "himix", "layers": [1, 2, 4]},
    "hmgen": {"target": {"name": "hmgen", "num_shallow": 2}, "target_projections": "qkv"},
    "hmgen, both": {"name": "hmgen", "layers": [1, 2]},
    "himix and hmgen": {"input": {"name": "himix"}, "target": {"name": "hmgen", "num_shallow": 2}},
    "himix and hmgen with projections": {
        "input": {"name": "himix"},
        "target": {"name": "hmgen", "num_shallow": 1},
        "input_projections": "kv",
        "target_projections": "qkv",
    },
    "pyramid by score": {"input": _PYRAMID},
    "pyramid by score with projections": {"input": {**_PYRAMID, "layers": None}, "input_projections": "qkv"},
    "pyramid by score that returns, and route": {
        "input": {**_PYRAMID, "layers": [1, 2, 3], "return_layer": 4},
        "target": {"name": "route", "first_layer": 2, "last_layer": 3},
    },
    "pyramid by score, and late freeze": {
        "input": {**_PYRAMID, "keep": [0.7, {"start": 0.3, "end": 0.6}, {0.0: 0.0, 0.5: 0.1}]},
        "target": {"name": "freeze", "first_layer": 2},
    },
    "pyramid at random": {"input": {**_PYRAMID, "selection": "random"}},
    "pyramid uniform": {"input": {**_PYRAMID, "selection": "uniform"}},
    "pyramid of targets": {"name": "pyramid", "keep": [0.5, 0.25], "selection": "random", "return_layer": 4},
    "freeze of inputs": {"input": {"name": "freeze", "first_layer": 2}},
    "freeze of targets": {"target": {"name": "freeze", "first_layer": 3}},
    "freeze": {"name": "freeze", "first_layer": 2, "input_projections": "kv"},
    "ffn skip": {"name": "ffn_skip"},
    "ffn skip, and hmgen": {
        "input": {"name": "ffn_skip", "layers": [0, 3, 4]},
        "target": {"name": "hmgen", "layers": [3]},
    },
}


def _few(num_examples: int) -> settings:
    """Random packs, the same at every run; there are many policies, so few for each."""
    return settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.filter_too_much],
    )


for_every_policy = pytest.mark.parametrize("name", _POLICIES)


@functools.cache
def policy_of(name: str) -> Policy:
    policy = Policy.model_validate(_POLICIES[name])
    policy.check(NUM_LAYERS)
    return policy


def model_of(policy: Policy, family: Family = "qwen3", recompute: Recompute = "none") -> UnifiedVLM:
    return _model(policy.model_dump_json(), family, recompute)


@functools.cache
def _model(policy: str, family: Family, recompute: Recompute) -> UnifiedVLM:
    """Weights large enough that attention is far from uniform, and images' own projections unlike the shared ones."""
    model = tiny_model(family, NUM_LAYERS, policy=Policy.model_validate_json(policy), recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Larger matrices, or smaller embeddings, and rounding grows from layer to layer past what is tested here.
            scale = 1.0 if "embed_tokens" in parameter_name else 0.15
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _weights(plan: TokenPlan) -> torch.Tensor:
    """Of both sizes and signs, so that no token's part of the gradient can stand in for another's."""
    return torch.randn(len(plan.supervised), generator=torch.Generator().manual_seed(2)) / max(1, len(plan.supervised))


def _run(model: UnifiedVLM, pack: Pack, plan: TokenPlan) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of each parameter that has one."""
    model.zero_grad()
    loss, *_ = model(pack, plan, _weights(plan))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {"logits": model.logits(pack, plan), **gradients}


def _assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@for_every_policy
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@_few(3)
@given(pack=packs, progress=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
@example(pack=every_document(), progress=0.2)
def test_logits_and_all_gradients_equal_roles_by_definition(
    name: str, family: Family, pack: Pack, progress: float
) -> None:
    _assert_equals_definition(policy_of(name), family, pack, progress)


@_few(40)
@given(
    images=st.fixed_dictionaries({"input": image_policies, "target": image_policies}),
    projections=st.tuples(*[st.sampled_from(["shared", "kv", "qkv"])] * 2),
    pack=packs,
    progress=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_any_policy_that_is_not_refused_equals_roles_by_definition(
    images: dict[str, Any], projections: tuple[str, str], pack: Pack, progress: float
) -> None:
    tree = {**images, "input_projections": projections[0], "target_projections": projections[1]}
    try:
        policy = Policy.model_validate(tree)
        policy.check(NUM_LAYERS)
    except ValueError:
        reject()
    _assert_equals_definition(policy, "qwen3", pack, progress)


def _assert_equals_definition(policy: Policy, family: Family, pack: Pack, progress: float) -> None:
    model = model_of(policy, family)
    plan = TokenPlan.of(pack, policy, NUM_LAYERS, seed=5, progress=progress)
    got = _run(model, pack, plan)
    want = reference(model, pack, policy, _weights(plan), seed=5, progress=progress)
    assume(want.gap > 1e-5)  # fp32 may well choose the other one of two equal scores
    assert got.keys() == {"logits", *want.gradients}
    error = (got["logits"] - want.logits).norm()
    assert error <= 1e-5 * want.logits.norm()
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in want.gradients.values()))
    for parameter, gradient in want.gradients.items():
        # A gradient that is a difference of larger ones, such as that of a key's bias, is as exact as these are.
        error = (got[parameter] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * size, (parameter, error, gradient.norm(), size)


def _assert_no_leak(model: UnifiedVLM, pack: Pack, plan: TokenPlan, changed: Iterable[int]) -> None:
    """Predictions at supervised positions before a changed token, and in other documents, do not know of it."""
    bounds = pack.cu_seqlens.tolist()
    with torch.no_grad():
        before = model.logits(pack, plan)
        for token in changed:
            stop = next(bound for bound in bounds if bound > token)
            is_unaware = (plan.supervised < token) | (plan.supervised >= stop)
            assert torch.equal(model.logits(_with_another(pack, token), plan)[is_unaware], before[is_unaware])


def _with_another(pack: Pack, token: int) -> Pack:
    """The pack with another id in one place; what it is supervised with stays."""
    ids = pack.ids.clone()
    ids[token] = (ids[token] + 31) % VOCAB_SIZE
    return replace(pack, ids=ids)


@for_every_policy
def test_no_token_changes_a_prediction_before_it_or_in_another_document(name: str) -> None:
    policy, pack = policy_of(name), pack_of([IMAGE_FIRST, BOTH_KINDS])
    _assert_no_leak(model_of(policy), pack, TokenPlan.of(pack, policy, NUM_LAYERS), range(len(pack.ids)))


@for_every_policy
@_few(3)
@given(pack=packs, changed=st.lists(st.integers(0, 10_000), min_size=5, max_size=5))
def test_no_token_of_a_random_pack_leaks(name: str, pack: Pack, changed: list[int]) -> None:
    policy = policy_of(name)
    plan = TokenPlan.of(pack, policy, NUM_LAYERS)
    _assert_no_leak(model_of(policy), pack, plan, [each % len(pack.ids) for each in changed])


def test_changing_a_token_of_an_image_does_change_what_a_score_keeps() -> None:
    """Else the promise above would say nothing about choices by score."""
    policy = policy_of("pyramid by score")
    model, pack = model_of(policy), pack_of([MANY_IMAGES])
    plan = TokenPlan.of(pack, policy, NUM_LAYERS)
    kept = set()
    choose = model._choose
    for changed in range(int(pack.image_start[-1]), int(pack.image_start[-1]) + 9):

        def recorded(*args: Any) -> torch.Tensor:
            rows = choose(*args)
            kept.add(tuple(rows[-1].tolist()))
            return rows

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(model, "_choose", recorded)
            model.logits(_with_another(pack, changed), plan)
    assert len(kept) > 3


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "route", "first_layer": 1, "last_layer": 3, "keep": 1.0},
        {"input": {"name": "pyramid", "keep": [1.0, 1.0, 1.0]}},
        {"name": "pyramid", "keep": [1.0, 1.0], "selection": "random", "return_layer": 4},
        {"input": {"name": "pyramid", "keep": [1.0], "selection": "uniform"}},
        {"input": {"name": "pyramid", "layers": [], "keep": []}},
        {"name": "himix", "layers": []},
        {"name": "hmgen", "num_shallow": 0},
        {"name": "hmgen", "layers": []},
        {"name": "ffn_skip", "layers": []},
        {"name": "freeze", "first_layer": NUM_LAYERS},
    ],
    ids=str,
)
@_few(3)
@given(pack=packs)
@example(pack=every_document())
def test_a_policy_that_keeps_all_is_dense_bit_for_bit(tree: dict[str, Any], pack: Pack) -> None:
    policy = Policy.model_validate(tree)
    policy.check(NUM_LAYERS)
    dense = _run(model_of(Policy()), pack, TokenPlan.of(pack, Policy(), NUM_LAYERS))
    _assert_equal(_run(model_of(policy), pack, TokenPlan.of(pack, policy, NUM_LAYERS)), dense)


@for_every_policy
def test_the_full_tail_is_dense_bit_for_bit(name: str) -> None:
    policy = policy_of(name).model_copy(update={"full_tail": 0.25})
    own = {"input_projections": policy.input_projections, "target_projections": policy.target_projections}
    model, pack = model_of(policy), _small_pack()
    dense = _run(model, pack, TokenPlan.of(pack, Policy.model_validate(own), NUM_LAYERS))
    for progress in (0.75, 1.0):
        _assert_equal(_run(model, pack, TokenPlan.of(pack, policy, NUM_LAYERS, progress=progress)), dense)


@for_every_policy
def test_recomputation_changes_no_bit(name: str) -> None:
    policy, pack = policy_of(name), _small_pack()
    plan = TokenPlan.of(pack, policy, NUM_LAYERS)
    kept = _run(model_of(policy), pack, plan)
    recomputes: list[Recompute] = ["selective", "full"]
    for recompute in recomputes:
        _assert_equal(_run(model_of(policy, recompute=recompute), pack, plan), kept)


def _small_pack() -> Pack:
    return pack_of([BOTH_KINDS, TEXT_ONLY], tail=2)


_UNLIKE_PACKS: dict[str, Callable[[], Pack]] = {
    "only text": lambda: pack_of([TEXT_ONLY]),
    "an input image": lambda: pack_of([IMAGE_FIRST], tail=3),
    "a target image": lambda: pack_of([IMAGE_LAST]),
    "both": _small_pack,
    "nothing supervised": lambda: pack_of([NO_LOSS]),
    "no document": lambda: pack_of([], tail=8),
}


@for_every_policy
@pytest.mark.parametrize("kind", _UNLIKE_PACKS)
def test_every_parameter_gets_a_gradient_whatever_is_in_the_pack(name: str, kind: str) -> None:
    policy, pack = policy_of(name), _UNLIKE_PACKS[kind]()
    model = model_of(policy)
    plan = TokenPlan.of(pack, policy, NUM_LAYERS)
    gradients = _run(model, pack, plan)
    assert gradients.keys() == {"logits", *(name for name, _ in model.named_parameters())}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def _calls(model: UnifiedVLM, pack: Pack, plan: TokenPlan) -> list[str]:
    """Names of all modules with weights of their own, in the order in which they are called, forward and backward."""
    called: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):

            def record(_module: nn.Module, _args: object, name: str = name) -> None:
                called.append(name)

            handles.append(module.register_forward_pre_hook(record))
    loss, *_ = model(pack, plan, _weights(plan))
    loss.backward()
    for handle in handles:
        handle.remove()
    return called


def test_recomputation_calls_modules_again() -> None:
    policy, pack = policy_of("route"), _small_pack()
    plan = TokenPlan.of(pack, policy, NUM_LAYERS)
    recomputes: list[Recompute] = ["none", "selective", "full"]
    num_calls = [len(_calls(model_of(policy, recompute=recompute), pack, plan)) for recompute in recomputes]
    assert num_calls[0] < num_calls[1] < num_calls[2]


@for_every_policy
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_pack_calls_the_same_modules_in_the_same_order(name: str, recompute: Recompute) -> None:
    policy = policy_of(name)
    model = model_of(policy, recompute=recompute)
    calls = {}
    for kind, make in _UNLIKE_PACKS.items():
        pack = make()
        calls[kind] = _calls(model, pack, TokenPlan.of(pack, policy, NUM_LAYERS))
    with_weights = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert set(calls["only text"]) == with_weights
    assert [kind for kind in calls if calls[kind] != calls["only text"]] == []
