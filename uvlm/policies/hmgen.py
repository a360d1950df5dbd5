"""HMGen (arXiv 2606.01503): image tokens skip some middle layers altogether; the other layers are full.

The roles of an image token are (0, 0, 0) in the shallow layers and (1, 1, 1) elsewhere. Its state returns unchanged, so
every target token keeps its loss. The publication gives the image queries, keys and values of its own in the full
layers (`policy.target_projections: qkv`); the control, those projections with nothing skipped, is `layers: []`.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.image_policy import ImagePolicy, check_layers
from uvlm.roles import BYPASS


class HMGen(ImagePolicy):
    name: Literal["hmgen"] = "hmgen"
    num_shallow: int = Field(default=3, ge=0, description="number of alternating layers in the middle that are skipped")
    layers: list[int] | None = Field(default=None, description="the skipped layers by number, instead of num_shallow")

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        # The first layer reads the embeddings, the last one writes what the head reads: both stay full.
        if self.layers is not None:
            check_layers(f"{key}.layers", self.layers, num_layers, range(1, max(1, num_layers - 1)))
        elif self.num_shallow > (largest := max(0, (num_layers - 1) // 2)):
            raise ValueError(
                f"{key}.num_shallow={self.num_shallow} alternating layers do not fit between the first and the last of "
                f"{num_layers} layers; use {key}.num_shallow={largest}, or model.num_layers={2 * self.num_shallow + 1}"
            )

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        roles_LM[self._layers(len(roles_LM))] = BYPASS

    def _layers(self, num_layers: int) -> list[int]:
        if self.layers is not None:
            return self.layers
        first = (num_layers - (2 * self.num_shallow - 1)) // 2
        return [first + 2 * i for i in range(self.num_shallow)]
