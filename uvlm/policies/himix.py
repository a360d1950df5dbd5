"""HiMix (arXiv 2501.10318): text looks at the image in every layer, and the image is never updated.

The roles of an image token are (0, 1, 0) in every layer. As its state never changes, each layer's keys and values come
from the embeddings. The publication gives the image keys and values of its own in each layer
(`policy.input_projections: kv`); without them the layers' own serve both, which is the "all weights shared" row of
arXiv 2606.01503.

Image tokens touch no query, output or FFN weight: what is left of their cost is two projections a layer.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.image_policy import ImagePolicy, check_layers
from uvlm.roles import CONTEXT


class HiMix(ImagePolicy):
    name: Literal["himix"] = "himix"
    layers: list[int] | None = Field(default=None, description="layers with this role; all of them where not given")

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        layers = self._layers(num_layers)
        if is_target and set(layers) >= set(range(num_layers)):
            raise ValueError(
                f"{key}.layers names every layer, and a target token that carries loss would never be updated; "
                f"use {key}.layers={list(range(1, num_layers))}"
            )
        check_layers(f"{key}.layers", layers, num_layers, range(num_layers))

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        roles_LM[self._layers(len(roles_LM))] = CONTEXT

    def _layers(self, num_layers: int) -> list[int]:
        return list(range(num_layers)) if self.layers is None else self.layers
