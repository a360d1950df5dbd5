"""Freeze (late; ShortV, arXiv 2504.00502): from one layer on, image tokens are seen but no longer updated.

The roles of an image token are (1, 1, 1) before the layer and (0, 1, 0) from it on. Unlike HiMix its keys and values
come from states that earlier layers have worked on. A frozen target token keeps its loss: the head reads the state it
was frozen with, like an early exit.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.image_policy import ImagePolicy
from uvlm.roles import CONTEXT


class Freeze(ImagePolicy):
    name: Literal["freeze"] = "freeze"
    first_layer: int = Field(ge=0, description="first layer, counted from 0, in which the tokens are frozen")

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        if self.first_layer > num_layers:
            raise ValueError(
                f"{key}.first_layer={self.first_layer} is outside a model of {num_layers} layers; "
                f"use {key}.first_layer={max(1, num_layers - 1)}"
            )
        if is_target and self.first_layer == 0:
            raise ValueError(
                f"{key}.first_layer=0: a target token that carries loss would never be updated; "
                f"use {key}.first_layer={max(1, num_layers // 2)}"
            )

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        roles_LM[self.first_layer :] = CONTEXT
