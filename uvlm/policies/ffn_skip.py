"""FFN skip (Skip-Vision, arXiv 2503.21817): in some layers image tokens take part in attention and leave out the FFN.

The roles of an image token are (1, 1, 0) in these layers. The FFN is two thirds or more of a layer's FLOPs.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.image_policy import ImagePolicy, check_layers
from uvlm.roles import NO_FFN


class FFNSkip(ImagePolicy):
    name: Literal["ffn_skip"] = "ffn_skip"
    layers: list[int] | None = Field(default=None, description="layers without FFN; every second one where not given")

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        check_layers(f"{key}.layers", self._layers(num_layers), num_layers, range(num_layers))

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        roles_LM[self._layers(len(roles_LM))] = NO_FFN

    def _layers(self, num_layers: int) -> list[int]:
        return list(range(1, num_layers, 2)) if self.layers is None else self.layers
