"""Parameter groups and the learning-rate schedule. What the optimizer *is* stands in the DeepSpeed JSON."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field
from torch import nn

from uvlm.strict import Strict


class OptimConfig(Strict):
    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps of the linear rise to the peak")
    schedule: Literal["cosine", "constant"] = "cosine"
    final_share: float = Field(default=0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="for matrices; norms and embeddings have none")
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 turns it off")


def learning_rate(config: OptimConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0. A function of the step alone: nothing to save."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups, matrices with weight decay, then norms, biases and embeddings without; every parameter in one."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
