"""Each policy's table is its method's definition; shares follow their schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_packs import MANY_IMAGES, every_document, pack_of
from uvlm.policies import Policy
from uvlm.roles import BYPASS, CONTEXT, DENSE, NO_FFN
from uvlm.token_plan import TokenPlan


def table(tree: dict[str, Any], num_layers: int, num_codes: int, progress: float = 0.0, seed: int = 0) -> np.ndarray:
    """Roles [L, M] of an input image."""
    policy, progress = Policy.model_validate({"input": tree}).at(progress)
    policy.check(num_layers)
    roles_LM = np.full((num_layers, num_codes), DENSE, dtype=np.uint8)
    policy.input.fill(roles_LM, progress, np.random.default_rng(seed))
    return roles_LM


def by_layer(roles_LM: np.ndarray) -> list[int]:
    """The one role that all tokens of the image have, in each layer."""
    assert (roles_LM == roles_LM[:, :1]).all()
    return roles_LM[:, 0].tolist()


def test_dense_leaves_everything_to_every_token() -> None:
    assert by_layer(table({"name": "dense"}, 3, 4)) == [DENSE] * 3


def test_himix_shows_the_image_in_every_layer_and_never_updates_it() -> None:
    assert by_layer(table({"name": "himix"}, 4, 5)) == [CONTEXT] * 4
    assert by_layer(table({"name": "himix", "layers": [1, 3]}, 4, 5)) == [DENSE, CONTEXT, DENSE, CONTEXT]


@pytest.mark.parametrize(
    ("num_layers", "num_shallow", "skipped"),
    [(28, 3, [11, 13, 15]), (9, 3, [2, 4, 6]), (7, 3, [1, 3, 5]), (4, 1, [1]), (5, 1, [2]), (3, 0, [])],
)
def test_hmgen_skips_alternating_middle_layers(num_layers: int, num_shallow: int, skipped: list[int]) -> None:
    roles = by_layer(table({"name": "hmgen", "num_shallow": num_shallow}, num_layers, 5))
    assert [layer for layer, role in enumerate(roles) if role == BYPASS] == skipped
    assert {*roles} <= {BYPASS, DENSE}
    assert by_layer(table({"name": "hmgen", "layers": skipped}, num_layers, 5)) == roles


@given(num_layers=st.integers(1, 40), num_shallow=st.integers(0, 20))
def test_hmgen_layers_alternate_in_the_middle_between_full_ones(num_layers: int, num_shallow: int) -> None:
    try:
        roles = by_layer(table({"name": "hmgen", "num_shallow": num_shallow}, num_layers, 1))
    except ValueError:
        assert 2 * num_shallow + 1 > num_layers
        return
    skipped = [layer for layer, role in enumerate(roles) if role == BYPASS]
    assert len(skipped) == num_shallow
    assert set(np.diff(skipped).tolist()) <= {2}
    assert roles[0] == roles[-1] == DENSE
    if skipped:
        assert abs(skipped[0] - (num_layers - 1 - skipped[-1])) <= 1, "as many full layers before as after"


def test_pyramid_halves_the_image_after_each_quarter() -> None:
    for selection in ("score", "uniform", "random"):
        roles_LM = table({"name": "pyramid", "selection": selection}, 16, 64)
        assert (roles_LM == DENSE).sum(axis=1).tolist() == [64] * 4 + [32] * 4 + [16] * 4 + [8] * 4
        assert ((roles_LM == DENSE) | (roles_LM == BYPASS)).all()
        assert (np.diff(roles_LM.astype(int), axis=0) <= 0).all(), "a token that has left does not come back"


def test_pyramid_with_return_layer_gives_all_tokens_back() -> None:
    tree = {"name": "pyramid", "layers": [1, 3], "keep": [0.5, 0.25], "selection": "random", "return_layer": 4}
    assert (table(tree, 6, 8) == DENSE).sum(axis=1).tolist() == [8, 4, 4, 2, 8, 8]


def test_pyramid_uniform_spreads_over_the_image_and_random_depends_on_the_draw() -> None:
    uniform = {"name": "pyramid", "layers": [0], "keep": [0.25], "selection": "uniform"}
    assert np.flatnonzero(table(uniform, 1, 16)[0]).tolist() == [2, 6, 10, 14]
    draws = [table({**uniform, "selection": "random"}, 1, 64, seed=seed) for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_pyramid_scores_only_where_something_is_left_out() -> None:
    policy = Policy.model_validate({"input": {"name": "pyramid", "keep": [1.0, {"start": 0.5, "end": 1.0}, 0.25]}})
    assert policy.input.scored_layers(8, 0.0) == (4, 6)
    assert policy.input.scored_layers(8, 1.0) == (6,)
    assert policy.target.scored_layers(8, 0.0) == ()


def test_route_leaves_out_one_random_share_in_one_span() -> None:
    tree = {"name": "route", "first_layer": 1, "last_layer": 3, "keep": 0.25}
    roles_LM = table(tree, 6, 16)
    assert (roles_LM == BYPASS).sum(axis=1).tolist() == [0, 12, 12, 12, 0, 0]
    assert ((roles_LM == DENSE) | (roles_LM == BYPASS)).all()
    assert (roles_LM[1] == roles_LM[2]).all(), "the same tokens through the whole span"
    assert (roles_LM[1] == roles_LM[3]).all()
    assert (table(tree, 6, 16, seed=1) != roles_LM).any()


def test_freeze_shows_current_states_from_a_layer_on() -> None:
    assert by_layer(table({"name": "freeze", "first_layer": 2}, 4, 3)) == [DENSE, DENSE, CONTEXT, CONTEXT]


def test_ffn_skip_leaves_attention_alone() -> None:
    assert by_layer(table({"name": "ffn_skip"}, 5, 3)) == [DENSE, NO_FFN, DENSE, NO_FFN, DENSE]
    assert by_layer(table({"name": "ffn_skip", "layers": [0, 1]}, 3, 3)) == [NO_FFN, NO_FFN, DENSE]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.5, {0.0: 8, 0.5: 8, 1.0: 8}),
        ({"start": 0.25, "end": 0.75}, {0.0: 4, 0.25: 6, 0.5: 8, 1.0: 12}),
        ({"start": 1.0, "end": 0.0}, {0.0: 16, 0.5: 8, 1.0: 0}),
        ({0.0: 0.25, 0.5: 0.5, 0.9: 1.0}, {0.0: 4, 0.49: 4, 0.5: 8, 0.89: 8, 0.9: 16, 1.0: 16}),
        ({0.9: 1.0, 0.0: 0.25}, {0.0: 4, 0.9: 16}),
    ],
    ids=["constant", "linear", "linear to none", "stages", "stages in any order"],
)
def test_a_share_follows_its_schedule(keep: Any, expected: dict[float, int]) -> None:
    tree = {"name": "route", "first_layer": 0, "last_layer": 0, "keep": keep}
    assert {progress: int((table(tree, 2, 16, progress)[0] == DENSE).sum()) for progress in expected} == expected


def test_in_the_full_tail_nothing_is_left_out_and_schedules_end_where_it_begins() -> None:
    route = {"name": "route", "first_layer": 0, "last_layer": 1, "keep": {"start": 0.0, "end": 0.5}}
    policy = Policy.model_validate({**route, "full_tail": 0.2})
    pack = pack_of([MANY_IMAGES])
    shares = [TokenPlan.of(pack, policy, 4, progress=p).image_query_share for p in (0.0, 0.4, 0.79, 0.8, 1.0)]
    assert shares[0] == 0.5  # none of the image tokens in half of the layers
    assert shares[0] < shares[1] < shares[2] < 0.8
    assert shares[3:] == [1.0, 1.0]


_SCHEDULES = [0.5, {"start": 0.2, "end": 0.9}, {0.0: 0.1, 0.6: 0.8}]
_TREES: list[dict[str, Any]] = [
    {"name": "route", "first_layer": 1, "last_layer": 3},
    {"name": "himix"},
    {"name": "hmgen", "num_shallow": 2},
    {"name": "pyramid"},
    {"name": "pyramid", "selection": "random", "return_layer": 5},
    {"name": "pyramid", "selection": "uniform"},
    {"name": "freeze", "first_layer": 2},
    {"name": "ffn_skip"},
    *({"name": "route", "first_layer": 1, "last_layer": 3, "keep": keep} for keep in _SCHEDULES),
    *({"name": "pyramid", "keep": [keep, 0.1]} for keep in _SCHEDULES),
]


@pytest.mark.parametrize("tree", _TREES, ids=str)
@given(num_codes=st.integers(1, 50), progress=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_how_many_tokens_have_a_role_depends_on_size_and_progress_alone(
    tree: dict[str, Any], num_codes: int, progress: float, seed: int
) -> None:
    one, other = (table(tree, 6, num_codes, progress, each) for each in (seed, seed + 1))
    assert (np.sort(one, axis=1) == np.sort(other, axis=1)).all()


def test_no_weights_are_added_where_a_kind_never_takes_part() -> None:
    policy = Policy.model_validate(
        {"target": {"name": "hmgen", "num_shallow": 1}, "input_projections": "kv", "target_projections": "qkv"}
    )
    inputs, targets = ["input_k", "input_v"], ["target_q", "target_k", "target_v"]
    assert policy.own_projections(3) == [inputs + targets, inputs, inputs + targets]


def test_a_share_that_grows_from_zero_has_projections_of_its_own_from_the_start() -> None:
    route = {"name": "route", "first_layer": 1, "last_layer": 1, "keep": {"start": 0.0, "end": 1.0}}
    policy = Policy.model_validate({"input": route, "input_projections": "kv"})
    assert policy.own_projections(3) == [["input_k", "input_v"]] * 3


def test_text_is_a_query_with_ffn_in_every_layer_of_every_policy() -> None:
    pack = every_document()
    is_image = np.zeros(len(pack.ids), dtype=bool)
    for start, hw in zip(pack.image_start, pack.image_hw, strict=True):
        is_image[start : start + hw.prod()] = True
    for tree in _TREES:
        plan = TokenPlan.of(pack, Policy.model_validate({"input": tree}), 6)
        for span in plan.spans:
            rows = np.arange(len(pack.ids)) if span.rows is None else span.rows.numpy()
            queries = rows[: span.num_queries]
            with_ffn = queries if span.ffn is None else queries[span.ffn.numpy()]
            assert np.isin(np.flatnonzero(~is_image), with_ffn).all()
