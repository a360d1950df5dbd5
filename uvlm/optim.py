"""Parameter groups and the learning-rate schedule. What the optimizer *is* stands in the DeepSpeed JSON.

The rate is a function of the step alone, and each group's share of it is a function of the config alone. So neither is
state: both are written into the optimizer's groups before every step, whatever a checkpoint brought. That matters: a
checkpoint that DeepSpeed converts to another number of ranks gives *every* group the settings of the first, so norms
would decay from then on (run, stage 3).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from uvlm.strict import Strict

_RATE_FACTOR = "rate_factor"


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    """Schedules rise linearly over `warmup_steps` to `learning_rate`; then

    - cosine: half a cosine down to `final_share` of it;
    - linear: a straight line down to `final_share`;
    - wsd: warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak until the last `decay_share` of the steps, in
      which a straight line leads down to `final_share`. All but that end is the same for every number of steps, so a
      checkpoint from before it can go on to a longer run;
    - constant: the peak.

    A run shorter than its warm-up only rises, as the first steps of the long one do.
    """

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps of the linear rise to the peak")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    final_share: float = Field(default=0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    decay_share: float = Field(
        default=0.1, gt=0, le=1, validate_default=True, description="of wsd: share of the steps in which it decays"
    )
    embedding_rate: float = Field(
        default=1.0, gt=0, description="learning rate of the embeddings of words and codes and of lm_head, as a factor"
    )
    projection_rate: float = Field(
        default=1.0, gt=0, description="learning rate of the projections that images have for themselves, as a factor"
    )
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="for matrices; norms and embeddings have none")
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 turns it off")

    @field_validator("decay_share")
    @classmethod
    def _decay_follows_the_warm_up(cls, decay_share: float, others: ValidationInfo) -> float:
        if not {"steps", "warmup_steps", "schedule"} <= set(others.data):
            return decay_share  # one of them is wrong, which is reported
        steps, warmup_steps = others.data["steps"], others.data["warmup_steps"]
        num_decaying = _num_decaying(steps, decay_share)
        if others.data["schedule"] == "wsd" and warmup_steps + num_decaying > steps:
            raise ValueError(
                f"with schedule=wsd the last {num_decaying} of steps={steps} decay, which leaves "
                f"{steps - num_decaying} for warmup_steps={warmup_steps}; use warmup_steps={steps - num_decaying}"
            )
        return decay_share


def _num_decaying(steps: int, decay_share: float) -> int:
    return max(1, round(decay_share * steps))


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0. A function of the step alone: nothing to save."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    is_wsd = config.schedule == "wsd"
    first = config.steps - _num_decaying(config.steps, config.decay_share) if is_wsd else config.warmup_steps
    progress = min(1.0, max(0, step - first) / max(1, config.steps - first))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_share + (1 - config.final_share) * left)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The parameters that are trained, each in one group; no group is empty.

    Matrices have weight decay; norms, biases and embeddings have none. Embeddings are the table of the input and
    lm_head, tied or not. New image codes are rows of the same table, so they share its rate. A rate other than 1 makes
    groups of its own, with "rate_factor"; else there are the two.

    Args:
        model: a UnifiedVLM, whole or in shards: the shapes of ZeRO-3's shards are those of the whole.

    Raises:
        ValueError: nothing is left to train.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if id(parameter) in tables or ".lm_head." in f".{name}":
            factor = config.embedding_rate
        elif name.startswith("image_projections."):
            factor = config.projection_rate
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))  # a shard itself has one
        is_decayed = num_dimensions >= 2 and id(parameter) not in tables
        groups.setdefault((is_decayed, factor), []).append(parameter)
    if not any(groups.values()):
        raise ValueError("model.freeze leaves nothing to train; remove a part from it, such as model.freeze=[]")
    return [
        {"params": params, "weight_decay": config.weight_decay if is_decayed else 0.0, _RATE_FACTOR: factor}
        for (is_decayed, factor), params in groups.items()
        if params
    ]


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `parameter_groups` says of each group, without the parameters."""
    return [{key: group[key] for key in ("weight_decay", _RATE_FACTOR)} for group in groups]


def apply_learning_rate(param_groups: list[dict[str, Any]], own: list[dict[str, Any]], value: float) -> None:
    """Give each group of an optimizer its own settings again, and its share of the learning rate."""
    for group, group_settings in zip(param_groups, own, strict=True):
        group.update(group_settings, lr=value * group_settings[_RATE_FACTOR])
