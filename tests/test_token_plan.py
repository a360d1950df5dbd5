"""The plan: pure in the pack's name, spans that cover the layers, segments and counts that follow from the roles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.encode import IGNORED
from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from tests.helpers import mixed_pack
from tests.random_packs import IMAGE_LAST, MANY_IMAGES, NO_LOSS, TEXT_ONLY, pack_of, packs
from uvlm.policies import Policy
from uvlm.roles import DENSE, KEY, QUERY
from uvlm.token_plan import Span, TokenPlan

NUM_LAYERS = 6
_ROUTE = {"name": "route", "first_layer": 1, "last_layer": 2}
_POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "route": _ROUTE,
    "himix and hmgen": {"input": {"name": "himix"}, "target": {"name": "hmgen", "num_shallow": 2}},
    "pyramid and freeze": {
        "input": {"name": "pyramid", "layers": [1, 4], "keep": [0.5, 0.2], "selection": "random"},
        "target": {"name": "freeze", "first_layer": 3},
    },
    "ffn skip and route": {"input": {"name": "ffn_skip"}, "target": _ROUTE},
}


def _rows(plan: TokenPlan) -> list[np.ndarray]:
    """The tokens that take part, by span."""
    return [np.arange(plan.num_tokens) if span.rows is None else span.rows.numpy() for span in plan.spans]


def test_the_plan_is_a_function_of_seed_and_pack_name() -> None:
    policy = Policy.model_validate(_ROUTE)

    def routed(name: tuple[int, int], seed: int) -> list[int]:
        return _rows(TokenPlan.of(mixed_pack(name=name), policy, 4, seed))[1].tolist()

    assert routed((0, 3), seed=1) == routed((0, 3), seed=1)
    assert routed((0, 3), seed=1) != routed((0, 4), seed=1)
    assert routed((0, 3), seed=1) != routed((1, 3), seed=1)
    assert routed((0, 3), seed=1) != routed((0, 3), seed=2)


def _roles(pack: Pack, policy: Policy) -> np.ndarray:
    """The table of roles [L, T], filled image by image."""
    roles_LT = np.full((NUM_LAYERS, len(pack.ids)), DENSE, dtype=np.uint8)
    generator = np.random.default_rng([0, *pack.name])
    images = zip(pack.image_start.tolist(), pack.image_hw.prod(1).tolist(), pack.image_is_target.tolist(), strict=True)
    for start, num_codes, is_target in images:
        (policy.target if is_target else policy.input).fill(roles_LT[:, start : start + num_codes], 0.0, generator)
    return roles_LT


@pytest.mark.parametrize("name", _POLICIES)
@settings(max_examples=25, deadline=None)
@given(pack=packs)
def test_spans_hold_exactly_the_tokens_of_each_role(name: str, pack: Pack) -> None:
    policy = Policy.model_validate(_POLICIES[name])
    plan, roles_LT = TokenPlan.of(pack, policy, NUM_LAYERS), _roles(pack, policy)
    layers = [layer for span in plan.spans for layer in range(span.first, span.stop)]
    assert layers == list(range(NUM_LAYERS)), "every layer runs, once and in order"
    for span, rows in zip(plan.spans, _rows(plan), strict=True):
        assert len(rows) == span.num_rows
        with_ffn = rows[: span.num_queries] if span.ffn is None else rows[span.ffn.numpy()]
        for layer in range(span.first, span.stop):
            assert np.array_equal(rows[: span.num_queries], np.flatnonzero(roles_LT[layer] >= QUERY)), "in order"
            assert np.array_equal(np.sort(rows), np.flatnonzero(roles_LT[layer] >= KEY))
            assert np.array_equal(with_ffn, np.flatnonzero(roles_LT[layer] >= DENSE))
        _assert_segments_are_causal(pack, span, rows)
    assert np.array_equal(plan.supervised.numpy(), np.flatnonzero(pack.labels.numpy() != IGNORED))


def _assert_segments_are_causal(pack: Pack, span: Span, rows: np.ndarray) -> None:
    """Each query sees, aligned at the bottom right of its segment, the keys of its document up to itself, in order."""
    documents = np.repeat(np.arange(len(pack.doc_task)), np.diff(pack.cu_seqlens.numpy()))
    keys = rows if span.keys is None else rows[span.keys.numpy()]
    cu_q, cu_k = span.cu_seqlens_q.tolist(), span.cu_seqlens_k.tolist()
    assert (cu_q[-1], cu_k[-1]) == (span.num_queries, len(keys))
    assert (span.max_seqlen_q, span.max_seqlen_k) == (max(np.diff(cu_q)), max(np.diff(cu_k)))
    num_pairs = 0
    for segment in range(len(cu_q) - 1):
        queries = rows[cu_q[segment] : cu_q[segment + 1]]
        own_keys = keys[cu_k[segment] : cu_k[segment + 1]]
        for i, query in enumerate(queries):
            seen = own_keys[: len(own_keys) - len(queries) + i + 1]
            visible = np.sort(rows)
            visible = visible[(visible <= query) & (documents[visible] == documents[query])]
            assert np.array_equal(seen, visible)
            num_pairs += len(seen)
    assert span.work.pairs.sum() == num_pairs


def test_equal_neighbours_share_a_span() -> None:
    bounds = {
        name: [(span.first, span.stop) for span in TokenPlan.of(mixed_pack(), policy, NUM_LAYERS).spans]
        for name, policy in ((name, Policy.model_validate(tree)) for name, tree in _POLICIES.items())
    }
    assert bounds["dense"] == [(0, 6)]
    assert bounds["route"] == [(0, 1), (1, 3), (3, 6)]
    assert bounds["himix and hmgen"] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]
    assert bounds["pyramid and freeze"] == [(0, 1), (1, 3), (3, 4), (4, 6)]


def test_where_nothing_is_left_out_there_is_nothing_to_gather() -> None:
    for tree in ({}, {"name": "ffn_skip"}, {**_ROUTE, "keep": 1.0}):
        plan = TokenPlan.of(mixed_pack(), Policy.model_validate(tree), NUM_LAYERS)
        assert all(span.rows is None and span.keys is None and span.query_parts is None for span in plan.spans)
        assert all(torch.equal(span.cu_seqlens_q, mixed_pack().cu_seqlens) for span in plan.spans)


def test_shares_of_updated_tokens_count_token_layers() -> None:
    policy = {"input": {**_ROUTE, "keep": 0.5}, "target": {**_ROUTE, "keep": 0.0}}
    plan = TokenPlan.of(mixed_pack(128), Policy.model_validate(policy), 4)
    num_left_out = 2 * (8 + 25)
    assert plan.query_share == pytest.approx(1 - num_left_out / (4 * 128))
    assert plan.image_query_share == pytest.approx(1 - num_left_out / (4 * 41))
    dense = TokenPlan.of(mixed_pack(128), Policy(), 4)
    assert (dense.query_share, dense.image_query_share) == (1.0, 1.0)
    himix = TokenPlan.of(mixed_pack(128), Policy.model_validate({"input": {"name": "himix"}}), 4)
    assert himix.image_query_share == pytest.approx(1 - 16 / 41)


def test_a_pack_without_images_has_an_image_share_of_one() -> None:
    plan = TokenPlan.of(pack_of([TEXT_ONLY]), Policy.model_validate(_ROUTE), 4)
    assert plan.image_query_share == 1.0


def test_work_is_counted_by_task_and_the_tail_by_itself() -> None:
    pack = pack_of([MANY_IMAGES, IMAGE_LAST, TEXT_ONLY, NO_LOSS], tail=7)
    policy = Policy.model_validate({"input": {"name": "himix"}, "target": {"name": "ffn_skip", "layers": [0]}})
    plan = TokenPlan.of(pack, policy, 2)
    work = plan.spans[0].work
    length = dict.fromkeys([*TASKS, "tail"], 0)
    for task, num_tokens in zip(pack.doc_task.tolist(), pack.cu_seqlens.diff().tolist(), strict=True):
        length[[*TASKS, "tail"][task]] += num_tokens
    num_inputs = 6 + 1 + 9 + 4
    assert work.keys.tolist() == list(length.values())
    queries = {**length, "understand": length["understand"] - num_inputs}
    assert work.queries.tolist() == list(queries.values())
    assert work.ffn.tolist() == list({**queries, "generate": length["generate"] - 8}.values())
    assert work.pairs[-1] == 7 * 8 // 2
    assert plan.supervised_by_task.sum() == (pack.labels != IGNORED).sum()
    assert plan.images_by_task.tolist() == [4 if task == "understand" else 0 for task in length]


def test_a_choice_fixes_how_many_tokens_of_each_image_stay() -> None:
    pack = pack_of([MANY_IMAGES, IMAGE_LAST])
    pyramid = {"name": "pyramid", "layers": [1, 3], "keep": [0.5, 0.25]}
    plan = TokenPlan.of(pack, Policy.model_validate({"input": pyramid}), NUM_LAYERS)
    assert [choice.layer for choice in plan.choices] == [1, 3]
    assert plan.choices[0].num_kept.tolist() == [round(0.5 * n) for n in (6, 1, 9)]
    assert plan.choices[1].num_kept.tolist() == [round(0.25 * n) for n in (6, 1, 9)]
    # Text up to the first position with a label, without images' markers: fewer than eight here.
    for scoring, is_scoring in zip(plan.choices[0].scoring, plan.choices[0].is_scoring, strict=True):
        assert scoring[is_scoring].tolist() == [0, 1, 2, 11, 26, 27, 28]


@given(seed=st.integers(0, 20))
@settings(max_examples=5, deadline=None)
def test_moving_a_plan_moves_every_tensor(seed: int) -> None:
    tree = {"input": {"name": "pyramid"}, "target": {"name": "freeze", "first_layer": 2}, "input_projections": "kv"}
    plan = TokenPlan.of(mixed_pack(), Policy.model_validate(tree), NUM_LAYERS, seed).to(torch.device("meta"))
    tensors = [value for part in (*plan.spans, *plan.choices) for value in vars(part).values()]
    tensors += [value for span in plan.spans for value in vars(span.key_parts).values()]
    devices = {tensor.device.type for tensor in [*tensors, plan.supervised] if isinstance(tensor, torch.Tensor)}
    assert devices == {"meta"}
