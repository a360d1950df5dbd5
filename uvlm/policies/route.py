"""Route: a random share of an image's tokens bypasses one middle span of layers, then returns.

The roles of a routed token are (0, 0, 0) inside the span and (1, 1, 1) outside, as in TREAD (arXiv 2501.04765) and
random-LTD (arXiv 2211.11586): no new weights, the model is dense at inference, and a target token that is left out
keeps its loss because its state returns before the last layers. The first and last layers see everything.

What it saves goes with the number of tokens: at these lengths attention scores are a few per cent of a layer's FLOPs,
so half of the image tokens in half of the layers is close to a quarter of the image tokens' cost.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.dense import Dense
from uvlm.policies.image_policy import ImagePolicy
from uvlm.policies.ratio import Ratio, ratio_at
from uvlm.roles import BYPASS


class Route(ImagePolicy):
    name: Literal["route"] = "route"
    first_layer: int = Field(ge=0, description="first layer of the span, counted from 0")
    last_layer: int = Field(ge=0, description="last layer of the span, inclusive")
    keep: Ratio = Field(default=0.5, description="share of each image's tokens that stays in the span")

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        largest = num_layers - 2 if is_target else num_layers - 1
        if largest < 0:
            raise ValueError(
                f"{key}: a model of {num_layers} layer(s) has no layer in which left-out targets could return; "
                f"use model.num_layers={max(self.first_layer, self.last_layer) + 2}"
            )
        first, last = sorted(min(layer, largest) for layer in (self.first_layer, self.last_layer))
        if (first, last) == (self.first_layer, self.last_layer):
            return
        if self.last_layer >= num_layers:
            reason = f"is outside a model of {num_layers} layers"
        elif self.last_layer > largest:
            reason = "is the last layer, and a target token left out there carries loss and never returns"
        else:
            reason = f"lies before {key}.first_layer={self.first_layer}"
        raise ValueError(
            f"{key}.last_layer={self.last_layer} {reason}; use {key}.first_layer={first} and {key}.last_layer={last}"
        )

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        num_codes = roles_LM.shape[1]
        left_out = generator.permutation(num_codes)[round(ratio_at(self.keep, progress) * num_codes) :]
        roles_LM[self.first_layer : self.last_layer + 1, left_out] = BYPASS

    def at_inference(self, is_target: bool) -> ImagePolicy:
        return Dense()
