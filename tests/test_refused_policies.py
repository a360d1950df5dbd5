"""A policy that asks for the impossible is refused, in one sentence that names the key and a value that works.

The sentence ends in `use KEY=VALUE`, in several assignments joined by `and`, or in alternatives joined by `, or`. So
the tests here do what it says, as a user would, and look whether that works.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.encode import IGNORED
from tests.random_packs import IMAGE_LAST, MANY_IMAGES, TEXT_ONLY, pack_of
from uvlm.config import dump_config, load_config, parse_config
from uvlm.policies import Dense, ImagePolicy, Policy
from uvlm.roles import BYPASS
from uvlm.token_plan import TokenPlan


def demo(policy: dict[str, Any], num_layers: int = 4) -> dict[str, Any]:
    """The demo's config, as a tree of plain values, with another policy."""
    tree = yaml.safe_load(dump_config(load_config(Path("demo"))))
    return {**tree, "policy": policy, "model": {**tree["model"], "num_layers": num_layers}}


def follow(tree: dict[str, Any], message: str) -> list[dict[str, Any]]:
    """What the user has after each of the remedies in `..; use KEY=VALUE and KEY=VALUE, or KEY=VALUE`."""
    sentence, found, remedy = message.rpartition("use ")
    assert found, message
    assert re.search(r"policy\.(input|target)\b", sentence), f"no key: {message}"
    followed = []
    for alternative in remedy.split(", or "):
        other = copy.deepcopy(tree)
        for assignment in alternative.split(" and "):
            key, _, value = assignment.partition("=")
            section, *path = key.split(".")
            node = other[section]
            for part in path[:-1]:
                node = node[part]
            assert re.fullmatch(r"[a-z_]+", path[-1]), message
            node[path[-1]] = yaml.safe_load(value)
        followed.append(other)
    return followed


_INPUT_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"name": "route", "first_layer": 3, "last_layer": 2}, "last_layer"),
    ({"name": "route", "first_layer": 1, "last_layer": 4}, "last_layer"),
    ({"name": "route", "first_layer": 7, "last_layer": 9}, "last_layer"),
    ({"name": "route", "first_layer": 9, "last_layer": 2}, "last_layer"),
    ({"name": "himix", "layers": [0, 4]}, "layers"),
    ({"name": "himix", "layers": [-1, 2]}, "layers"),
    ({"name": "himix", "layers": [2, 1, 9, 1]}, "layers"),
    ({"name": "hmgen", "num_shallow": 2}, "num_shallow"),
    ({"name": "hmgen", "layers": [0, 2]}, "layers"),
    ({"name": "hmgen", "layers": [2, 3]}, "layers"),
    ({"name": "ffn_skip", "layers": [3, 3]}, "layers"),
    ({"name": "ffn_skip", "layers": [4]}, "layers"),
    ({"name": "freeze", "first_layer": 5}, "first_layer"),
    ({"name": "pyramid", "keep": [0.8, 0.6, 0.4, 0.2]}, "keep"),
    ({"name": "pyramid", "layers": [1, 2], "keep": [0.5]}, "layers"),
    ({"name": "pyramid", "layers": [1], "keep": [0.5, 0.25]}, "layers"),
    ({"name": "pyramid", "layers": [1, 4], "keep": [0.5, 0.25]}, "layers"),
    ({"name": "pyramid", "layers": [2, 1], "keep": [{"start": 0.5, "end": 0.6}, 0.25]}, "layers"),
    ({"name": "pyramid", "layers": [-1], "keep": [0.5]}, "layers"),
    ({"name": "pyramid", "keep": [0.25, 0.5]}, "keep"),
    ({"name": "pyramid", "keep": [0.5, {"start": 0.1, "end": 0.9}]}, "keep"),
    ({"name": "pyramid", "keep": [0.5, {0.0: 0.1, 0.111: 0.9, 0.112: 0.2}]}, "keep"),
    ({"name": "pyramid", "keep": [0.5, 0.25], "return_layer": 1}, "return_layer"),
    ({"name": "pyramid", "keep": [0.5, 0.25], "return_layer": 4}, "return_layer"),
    ({"name": "pyramid", "layers": [3], "keep": [0.5], "return_layer": 3}, "layers"),
]
_TARGET_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"name": "route", "first_layer": 1, "last_layer": 3}, "last_layer"),
    ({"name": "route", "first_layer": 3, "last_layer": 3}, "last_layer"),
    ({"name": "himix"}, "layers"),
    ({"name": "himix", "layers": [0, 1, 2, 3, 3]}, "layers"),
    ({"name": "hmgen", "layers": [3]}, "layers"),
    ({"name": "freeze", "first_layer": 0}, "first_layer"),
    ({"name": "pyramid", "keep": [0.5], "return_layer": 3}, "selection"),
    ({"name": "pyramid", "keep": [0.5], "selection": "uniform"}, "return_layer"),
    ({"name": "pyramid", "keep": [0.5, 0.25, 0.125], "selection": "random", "return_layer": 3}, "keep"),
    ({"name": "pyramid", "layers": [1, 3], "keep": [0.5, 0.25], "selection": "random", "return_layer": 3}, "layers"),
]


@pytest.mark.parametrize(
    ("kind", "policy", "key"),
    [("input", *case) for case in _INPUT_REFUSALS] + [("target", *case) for case in _TARGET_REFUSALS],
    ids=str,
)
def test_the_impossible_is_refused_naming_the_key_and_a_value_that_works(
    kind: str, policy: dict[str, Any], key: str
) -> None:
    tree = demo({kind: policy})
    with pytest.raises(ValueError, match=rf"policy\.{kind}\.{key}") as refusal:
        parse_config(tree)
    assert "\n" not in str(refusal.value)
    for followed in follow(tree, str(refusal.value)):
        parse_config(followed)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(
    "policy",
    [
        {"name": "route", "first_layer": 0, "last_layer": 0},
        {"name": "himix"},
        {"name": "himix", "layers": [0]},
        {"name": "hmgen"},
        {"name": "hmgen", "layers": [0, 1, 2]},
        {"name": "freeze", "first_layer": 0},
        {"name": "freeze", "first_layer": 3},
        {"name": "ffn_skip", "layers": [1]},
        {"name": "pyramid", "selection": "random"},
        {"name": "pyramid", "layers": [0], "keep": [0.5], "selection": "random", "return_layer": 0},
    ],
    ids=str,
)
def test_remedies_for_small_models_work_too(policy: dict[str, Any], num_layers: int) -> None:
    for kind in ("input", "target"):
        trees = [demo({kind: policy}, num_layers)]
        for _ in range(2):  # some make two mistakes
            trees = [followed for tree in trees for followed in _followed(tree)]
        for tree in trees:
            parse_config(tree)


def _followed(tree: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        parse_config(tree)
    except ValueError as refusal:
        return follow(tree, str(refusal))
    return [tree]


def test_shares_are_compared_over_the_whole_run_also_just_before_a_stage_begins() -> None:
    for start, is_refused in [(0.0, False), (0.001, True)]:
        keep = [{0.0: 0.5, 0.5: 1.0}, {"start": start, "end": 1.0}]
        policy = Policy.model_validate({"input": {"name": "pyramid", "keep": keep}})
        if is_refused:
            with pytest.raises(ValueError, match="grows from stage to stage"):
                policy.check(4)
        else:
            policy.check(4)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf"), "much", None, [], {}])
@pytest.mark.parametrize("where", ["constant", "start", "stage", "pyramid"])
def test_a_share_outside_zero_to_one_is_refused_in_one_sentence(where: str, share: Any) -> None:
    if where == "start" and share is None:
        share = -1.0
    keep = {"start": {"start": share, "end": 1.0}, "stage": {0.0: 0.5, 0.5: share}}.get(where, share)
    policy = {"name": "route", "first_layer": 1, "last_layer": 2, "keep": keep}
    if where == "pyramid":
        policy = {"name": "pyramid", "keep": [share, 0.1]}
    with pytest.raises(ValueError, match=r"policy\.input\.keep") as refusal:
        parse_config(demo({"input": policy}))
    assert "\n" not in str(refusal.value)


def test_a_remedy_for_a_policy_written_once_for_both_kinds_works_as_an_override() -> None:
    overrides = ["policy={name: himix}"]
    with pytest.raises(ValueError, match=r"use policy\.layers=") as refusal:
        load_config(Path("demo"), overrides)
    policy = load_config(Path("demo"), [*overrides, str(refusal.value).rpartition("use ")[2]]).policy
    assert policy == Policy.model_validate({"name": "himix", "layers": [1, 2, 3]})


def test_stages_without_a_beginning_say_what_to_add() -> None:
    policy = {"name": "route", "first_layer": 1, "last_layer": 2, "keep": {0.5: 0.25}}
    with pytest.raises(ValueError, match=r"policy\.input\.keep.*add 0\.0: 0\.25"):
        parse_config(demo({"input": policy}))


class _Leaves(ImagePolicy):
    """A policy of a user, without a check of its own."""

    name: Literal["leaves"] = "leaves"

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        roles_LM[1:] = BYPASS


def test_a_policy_of_ones_own_may_not_leave_out_targets_for_good() -> None:
    leaves: Any = _Leaves()
    Policy.model_construct(input=leaves, target=Dense()).check(4)
    with pytest.raises(ValueError, match=r"carry loss and never return; use policy\.target=\{name: dense\}"):
        Policy.model_construct(input=Dense(), target=leaves).check(4)


def test_misspelt_words_of_a_schedule_name_the_right_ones() -> None:
    policy = {"name": "route", "first_layer": 1, "last_layer": 2, "keep": {"stat": 0.25, "edn": 1.0}}
    with pytest.raises(ValueError, match=r"nearest known one is 'policy\.input\.keep\.start'.*keep\.end'"):
        parse_config(demo({"input": policy}))


def test_a_key_inside_a_list_is_not_offered_as_an_override() -> None:
    policy = {"name": "pyramid", "keep": [{"start": 0.25}]}
    with pytest.raises(ValueError, match=r"'policy\.input\.keep\.0\.end' is missing; add it to the YAML$"):
        parse_config(demo({"input": policy}))


_LAYER = st.integers(-1, 7)
_LAYERS = st.none() | st.lists(_LAYER, max_size=4) | st.lists(_LAYER, max_size=4, unique=True).map(sorted)
_SHARE = st.sampled_from([0.0, 0.1, 0.5, 1.0])
_RATIO: st.SearchStrategy[Any] = (
    _SHARE
    | st.fixed_dictionaries({"start": _SHARE, "end": _SHARE})
    | st.builds(lambda first, later: {0.0: first, **later}, _SHARE, st.dictionaries(_SHARE, _SHARE, max_size=2))
)
image_policies = st.one_of(
    st.fixed_dictionaries({"name": st.just("route"), "first_layer": _LAYER, "last_layer": _LAYER, "keep": _RATIO}),
    st.fixed_dictionaries({"name": st.sampled_from(["himix", "ffn_skip"]), "layers": _LAYERS}),
    st.fixed_dictionaries({"name": st.just("hmgen"), "layers": _LAYERS, "num_shallow": _LAYER}),
    st.fixed_dictionaries({"name": st.just("freeze"), "first_layer": _LAYER}),
    st.fixed_dictionaries(
        {
            "name": st.just("pyramid"),
            "layers": _LAYERS,
            "keep": st.lists(_RATIO, max_size=4),
            "selection": st.sampled_from(["score", "uniform", "random"]),
            "return_layer": st.none() | _LAYER,
        }
    ),
)
_PACK = pack_of([("generate", IMAGE_LAST[1]), TEXT_ONLY, MANY_IMAGES])


@settings(max_examples=600, deadline=None)
@given(
    trees=st.fixed_dictionaries({"input": image_policies, "target": image_policies}),
    num_layers=st.integers(1, 7),
    progress=st.floats(0, 1),
)
def test_a_policy_is_refused_with_advice_that_leads_to_one_that_works(
    trees: dict[str, Any], num_layers: int, progress: float
) -> None:
    """Whatever the config: ValueError or a plan. Advice mends one mistake at a time, and each only once."""
    try:
        Policy.model_validate(trees)
    except ValidationError:  # a negative layer in a key that is no list, refused with its name by pydantic
        return
    tree: dict[str, Any] = {"policy": trees, "model": {"num_layers": num_layers}}
    for _ in range(8):
        policy = Policy.model_validate(tree["policy"])
        try:
            policy.check(tree["model"]["num_layers"])
        except ValueError as refusal:
            tree = follow(tree, str(refusal))[0]
        else:
            _assert_works(policy, tree["model"]["num_layers"], progress)
            return
    raise AssertionError(f"advice goes in circles: {tree}")


def _assert_works(policy: Policy, num_layers: int, progress: float) -> None:
    plan = TokenPlan.of(_PACK, policy, num_layers, progress=progress)
    assert plan.num_layers == num_layers
    is_query_LT = np.zeros((num_layers, len(_PACK.ids)), dtype=bool)
    takes_part_T = np.zeros(len(_PACK.ids), dtype=bool)
    for span in plan.spans:
        rows = np.arange(len(_PACK.ids)) if span.rows is None else span.rows.numpy()
        is_query_LT[span.first : span.stop, rows[: span.num_queries]] = True
        if span.stop == num_layers:
            takes_part_T[rows] = True
    supervised = np.flatnonzero(_PACK.labels.numpy() != IGNORED)
    is_input_T = np.zeros(len(_PACK.ids), dtype=bool)
    for start, hw in zip(
        _PACK.image_start[~_PACK.image_is_target], _PACK.image_hw[~_PACK.image_is_target], strict=True
    ):
        is_input_T[start : start + hw.prod()] = True
    assert not is_input_T[supervised].any(), "images that are input carry no loss"
    assert is_query_LT[:, supervised].any(axis=0).all(), "a token with loss is updated at least once"
    assert takes_part_T[supervised].all(), "and is not left out of the last layer"
