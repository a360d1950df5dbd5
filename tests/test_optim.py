"""Schedules, parameter groups, and that each group keeps its settings whatever a checkpoint brings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.helpers import tiny_model
from uvlm.config import parse_config
from uvlm.model import UnifiedVLM
from uvlm.optim import OptimConfig, apply_learning_rate, learning_rate, parameter_groups, settings
from uvlm.policies import Policy

HIMIX = Policy.model_validate({"input": {"name": "himix"}, "input_projections": "kv"})


def _config(**changes: Any) -> OptimConfig:
    tree = {"steps": 100, "learning_rate": 2.0, "warmup_steps": 10, "final_share": 0.1, **changes}
    return OptimConfig.model_validate(tree)


def _rates(**changes: Any) -> list[float]:
    return [learning_rate(_config(**changes), step) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_every_schedule_warms_up_in_a_straight_line_and_never_rises_again(schedule: str) -> None:
    rates = _rates(schedule=schedule)
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0, "the peak"
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    at_the_end = learning_rate(_config(schedule=schedule), 100)
    assert at_the_end == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert learning_rate(_config(schedule=schedule), 1000) == at_the_end
    assert learning_rate(_config(schedule=schedule, warmup_steps=0), 0) == 2.0


def test_halfway_down_cosine_and_linear_are_halfway() -> None:
    assert _rates(schedule="cosine")[55] == pytest.approx(1.1)
    assert _rates(schedule="linear")[55] == pytest.approx(1.1)
    assert _rates(schedule="cosine")[30] > _rates(schedule="linear")[30] + 0.1


def test_wsd_stays_at_the_peak_until_its_last_share_of_the_steps() -> None:
    rates = _rates(schedule="wsd", decay_share=0.2)
    assert rates[10:81] == [2.0] * 71
    assert rates[81:] == pytest.approx([2.0 - 1.8 * number / 20 for number in range(1, 20)])


def test_a_longer_wsd_run_has_the_same_rates_until_the_shorter_one_decays() -> None:
    longer = [learning_rate(_config(schedule="wsd", steps=200), step) for step in range(90)]
    assert longer == _rates(schedule="wsd")[:90]


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    config = _config(steps=4, schedule="linear")
    assert [learning_rate(config, step) for step in range(4)] == _rates(schedule="linear")[:4]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"schedule": "wsd", "warmup_steps": 60, "decay_share": 0.5},
            "optim.decay_share=0.5: with schedule=wsd the last 50 of steps=100 decay, which leaves 50 for "
            "warmup_steps=60; use warmup_steps=50",
        ),
        ({"schedule": "wsd", "warmup_steps": 95}, "the last 10 of steps=100 decay, which leaves 90"),  # the default
        ({"decay_share": 0.0}, "optim.decay_share=0.0: input should be greater than 0"),
        ({"decay_share": 1.5}, "optim.decay_share=1.5: input should be less than or equal to 1"),
        ({"schedule": "step"}, "optim.schedule='step': input should be 'cosine', 'wsd', 'linear' or 'constant'"),
        ({"embedding_rate": 0.0}, "optim.embedding_rate=0.0: input should be greater than 0"),
        ({"projection_rate": -1}, "optim.projection_rate=-1: input should be greater than 0"),
        ({"steps": 0, "schedule": "wsd"}, "optim.steps=0: input should be greater than 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_what_works(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below, without a pattern
        parse_config({"optim": {"steps": 100, "learning_rate": 1.0, **changes}})
    assert sentence in str(error.value)
    assert str(error.value).count("optim.") == 1, "one mistake, one sentence"


@pytest.mark.parametrize("changes", [{}, {"warmup_steps": 90}, {"warmup_steps": 0, "decay_share": 1.0}])
def test_a_wsd_schedule_without_a_stable_phase_is_allowed(changes: dict[str, Any]) -> None:
    assert _rates(schedule="wsd", **changes)[-1] < 0.4


def test_a_negative_z_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss.z_loss=-1: input should be greater than or equal to 0"):
        parse_config({"loss": {"z_loss": -1}})


def _named(model: UnifiedVLM, config: OptimConfig) -> list[tuple[float, float, set[str]]]:
    """Of each group its weight decay, its factor and the names in it; every trained parameter must be in just one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    members = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(itertools.chain(*members)) == sorted(trained)
    assert all(members)
    return [(g["weight_decay"], g["rate_factor"], set(m)) for g, m in zip(groups, members, strict=True)]


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_without_rates_of_their_own_there_are_matrices_and_all_others(tie_embeddings: bool) -> None:
    model = tiny_model("qwen2", tie_embeddings=tie_embeddings, policy=HIMIX)  # has biases
    (decay, _, matrices), (no_decay, _, others) = _named(model, _config(weight_decay=0.3))
    assert (decay, no_decay) == (0.3, 0.0)
    assert all(name.endswith("weight") and "norm" not in name and "embed" not in name for name in matrices)
    assert all("norm" in name or name.endswith("bias") or "embed_tokens" in name for name in others)
    assert any(name.startswith("image_projections") for name in matrices)
    assert ("backbone.lm_head.weight" in matrices) == (not tie_embeddings)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_embeddings_and_image_projections_take_rates_of_their_own(tie_embeddings: bool) -> None:
    model = tiny_model("qwen2", tie_embeddings=tie_embeddings, policy=HIMIX)
    plain = {name: decay for decay, _, names in _named(model, _config()) for name in names}
    groups = _named(model, _config(embedding_rate=0.5, projection_rate=3.0))
    factors = {name: factor for _, factor, names in groups for name in names}
    words = {"backbone.model.embed_tokens.weight"} | (set() if tie_embeddings else {"backbone.lm_head.weight"})
    assert {name for name, factor in factors.items() if factor == 0.5} == words
    images = {name for name in factors if name.startswith("image_projections.")}
    assert images
    assert {name for name, factor in factors.items() if factor == 3.0} == images
    assert {name: decay for decay, _, names in groups for name in names} == plain, "weight decay is as it was"
    assert len({(decay, factor) for decay, factor, _ in groups}) == len(groups)


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    ((decay, _, names),) = _named(model, _config(embedding_rate=0.5))
    assert decay == 0.0
    assert all("norm" in name for name in names)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.freeze leaves nothing to train"):
        parameter_groups(tiny_model().requires_grad_(False), _config())


def test_shards_of_zero3_are_grouped_by_the_shapes_of_the_whole() -> None:
    model = tiny_model("qwen2", policy=HIMIX)
    want = _named(model, _config(embedding_rate=0.5))
    for parameter in model.parameters():  # what zero.Init leaves of a parameter
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert _named(model, _config(embedding_rate=0.5)) == want


def test_before_each_step_a_group_has_its_own_settings_whatever_a_checkpoint_brought() -> None:
    """DeepSpeed's universal checkpoint gives every group the settings of the first one (run, stage 3)."""
    groups = parameter_groups(tiny_model(), _config(embedding_rate=0.5, weight_decay=0.3))
    own = settings(groups)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    expected = [(group["weight_decay"], 4.0 * group["rate_factor"]) for group in groups]
    assert len(set(expected)) == len(groups) == 4
    first = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for group in optimizer.param_groups:
        group.update(first)
    apply_learning_rate(optimizer.param_groups, own, 4.0)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == expected


def test_a_wrong_type_is_reported_without_a_second_complaint() -> None:
    with pytest.raises(ValidationError) as error:
        _config(schedule="wsd", warmup_steps="many")
    assert len(error.value.errors()) == 1
