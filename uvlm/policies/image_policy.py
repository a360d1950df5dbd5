"""What every policy of images of one kind answers; the model and the plan know no more of it than this."""

from __future__ import annotations

import numpy as np

from uvlm.roles import DENSE
from uvlm.strict import Strict


class ImagePolicy(Strict):
    """Roles of the tokens of one kind of image, input or target. Its fields are the YAML's keys.

    A subclass adds `name`, a literal, and overrides what differs from a dense model.
    """

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        """Raise ValueError, naming a key below `key` and a value that works, for what a model of so many layers cannot
        do: layers that it does not have, or a target token that carries loss and never returns."""

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        """Write the roles of one image's M tokens in each of L layers into `roles_LM`, uint8, which is DENSE all over.

        The number of tokens of each role may depend on M and `progress` only, so that shapes repeat from pack to pack.
        Where tokens are chosen by score, the first ones of the image stand for those that will be chosen.
        """

    def scored_layers(self, num_layers: int, progress: float) -> tuple[int, ...]:
        """Layers at whose entry the tokens that stay are chosen by score, in ascending order."""
        return ()

    def at_inference(self, is_target: bool) -> ImagePolicy:
        """The policy of the finished model. A method that only saves training time returns `Dense`."""
        return self

    def table(self, num_layers: int, num_codes: int, progress: float, generator: np.random.Generator) -> np.ndarray:
        """The roles of one image's tokens, uint8 [num_layers, num_codes]."""
        roles_LM = np.full((num_layers, num_codes), DENSE, dtype=np.uint8)
        self.fill(roles_LM, progress, generator)
        return roles_LM

    def highest_roles(self, num_layers: int) -> list[int]:
        """By layer, the highest role that any of an image's tokens ever has there before the full tail of the run."""
        tables = (self.table(num_layers, 4096, at, np.random.default_rng(0)) for at in np.linspace(0, 1, 101))
        return np.max([table_LM.max(axis=1) for table_LM in tables], axis=0).tolist()


def check_layers(key: str, layers: list[int], num_layers: int, allowed: range) -> None:
    """Raise ValueError where `layers` are not ascending layers within `allowed`, a part of range(num_layers)."""
    inside = sorted(set(layers) & set(allowed))
    if outside := sorted(set(layers) - set(allowed)):
        may = f"only {allowed.start} to {allowed.stop - 1}" if allowed else "none"
        raise ValueError(
            f"{key}={layers}: of a model of {num_layers} layers {may} may be named here, not {outside[0]}; "
            f"use {key}={inside}"
        )
    if layers != inside:
        raise ValueError(f"{key}={layers} is not in ascending order; use {key}={inside}")
