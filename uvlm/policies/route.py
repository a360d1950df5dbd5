"""Route: a random share of each image's tokens bypasses one middle span of layers, then returns.

The roles of a routed token are (0, 0, 0) inside the span and (1, 1, 1) outside, as in TREAD (arXiv 2501.04765) and
random-LTD (arXiv 2211.11586): no new weights, the model is dense at inference, and a target token that is left out
keeps its loss because its state returns unchanged before the head. The first and last layers see everything.

What it saves goes with the number of tokens: at these lengths attention scores are a few per cent of a layer's FLOPs,
so half of the image tokens in half of the layers is close to a quarter of the image tokens' cost.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from data_pipeline.packing import Pack
from uvlm.strict import Strict
from uvlm.token_plan import Kept


class Route(Strict):
    name: Literal["route"] = "route"
    first_layer: int = Field(ge=0, description="first layer of the span, counted from 0")
    last_layer: int = Field(ge=0, description="last layer of the span, inclusive")
    keep_input: float = Field(default=0.5, ge=0.0, le=1.0, description="kept share of each input image's tokens")
    keep_target: float = Field(default=0.5, ge=0.0, le=1.0, description="kept share of each target image's tokens")

    def check(self, num_layers: int) -> None:
        """Raise ValueError where the span does not lie inside a model of `num_layers` layers."""
        if self.first_layer > self.last_layer:
            raise ValueError(
                f"policy.first_layer={self.first_layer} lies behind policy.last_layer={self.last_layer}; swap the two"
            )
        if self.last_layer >= num_layers:
            raise ValueError(
                f"policy.last_layer={self.last_layer} is outside a model of {num_layers} layers; "
                f"use at most {num_layers - 1}"
            )

    def spans(self, pack: Pack, num_layers: int, generator: np.random.Generator) -> list[Kept]:
        """One span. The count kept of an image depends on its size alone, so shapes repeat from pack to pack."""
        keep_T = np.ones(len(pack.ids), dtype=bool)
        for start, (height, width), is_target in zip(
            pack.image_start.tolist(), pack.image_hw.tolist(), pack.image_is_target.tolist(), strict=True
        ):
            num_codes = height * width
            num_kept = round((self.keep_target if is_target else self.keep_input) * num_codes)
            dropped = generator.permutation(num_codes)[num_kept:]
            keep_T[start + dropped] = False
        return [Kept(self.first_layer, self.last_layer + 1, keep_T)]
