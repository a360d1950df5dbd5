"""Pyramid (PyramidDrop, arXiv 2410.17247): the deeper the layer, the fewer of an image's tokens take part.

At the entry of each stage a share of the image's tokens stays (1, 1, 1) and the rest is (0, 0, 0) from there on. Which
ones stay is drawn at random, spread uniformly, or decided by score: the attention that the document's last text tokens
before its first supervised token pay to each image token, by the stage's own first layer. Those few are the only
queries that are ever scored, and later text never chooses what earlier text has seen. A stage chooses among the tokens
that the stage before has left, so the score of a token is computed with the state it has.

A token that does not return must carry no loss, and a choice by score looks at the whole image. So target images need
`return_layer`, and no score.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field

from uvlm.policies.dense import Dense
from uvlm.policies.image_policy import ImagePolicy
from uvlm.policies.ratio import Ratio, ratio_at
from uvlm.roles import BYPASS


class Pyramid(ImagePolicy):
    name: Literal["pyramid"] = "pyramid"
    layers: list[int] | None = Field(default=None, description="first layer of each stage; quarters where not given")
    keep: list[Ratio] = Field(default=[0.5, 0.25, 0.125], description="share of an image's tokens left in each stage")
    selection: Literal["score", "uniform", "random"] = "score"
    return_layer: int | None = Field(
        default=None, ge=0, description="layer from which on all take part again; or never"
    )

    def check(self, key: str, num_layers: int, is_target: bool) -> None:
        self._check_stages(key, num_layers, is_target or self.return_layer is not None)
        self._check_shares(key)
        last = max(self._layers(num_layers), default=-1)
        if self.return_layer is not None and not last < self.return_layer < num_layers:
            raise ValueError(
                f"{key}.return_layer={self.return_layer} is not between the last stage, layer {last}, and the end of a "
                f"model of {num_layers} layers; use {key}.return_layer={num_layers - 1}"
            )
        if is_target and self.keep and self.selection == "score":
            raise ValueError(
                f"{key}.selection=score looks at a whole target image, whose later tokens would decide what earlier "
                f"ones see; use {key}.selection=uniform"
            )
        if is_target and self.keep and self.return_layer is None:
            raise ValueError(
                f"{key}.return_layer is missing: a target token left out by the last stage carries loss and never "
                f"returns; use {key}.return_layer={num_layers - 1}"
            )

    def _check_stages(self, key: str, num_layers: int, returns: bool) -> None:
        """Each stage has a layer and a share; where tokens return, the last layer is for that."""
        allowed = range(num_layers - 1 if returns else num_layers)
        keep = self.model_dump()["keep"]
        if self.layers is None:
            most = max(0, len(allowed) - 1)  # the first quarter has no stage
            if len(keep) > most:
                raise ValueError(
                    f"{key}.keep has {len(keep)} stages, too many for {num_layers} layers; use {key}.keep={keep[:most]}"
                )
            return
        inside = sorted(set(self.layers) & set(allowed))
        num_stages = min(len(inside), len(keep))
        if self.layers != inside[:num_stages] or len(keep) != num_stages:
            may = f"among the first {len(allowed)} of {num_layers}" + (", before tokens return" if returns else "")
            raise ValueError(
                f"{key}.layers={self.layers} with {len(keep)} shares in {key}.keep: each stage takes one share and one "
                f"layer {may}, in ascending order; use {key}.layers={inside[:num_stages]} and "
                f"{key}.keep={keep[:num_stages]}"
            )

    def _check_shares(self, key: str) -> None:
        """No stage keeps more than the one before. Shares are linear between the moments looked at."""
        starts = {start for ratio in self.keep if isinstance(ratio, dict) for start in ratio}
        for progress in sorted({0.0, 1.0, *starts, *(float(np.nextafter(start, 0)) for start in starts)}):
            shares = [ratio_at(ratio, progress) for ratio in self.keep]
            if any(later > earlier + 1e-9 for earlier, later in pairwise(shares)):
                raise ValueError(
                    f"{key}.keep grows from stage to stage ({shares} after {progress:.0%} of the run); a token that "
                    f"has left cannot come back, use {key}.keep={sorted(shares, reverse=True)}"
                )

    def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
        num_layers, num_codes = roles_LM.shape
        stop = num_layers if self.return_layer is None else self.return_layer
        left = np.arange(num_codes)
        for layer, ratio in zip(self._layers(num_layers), self.keep, strict=True):
            num_kept = round(ratio_at(ratio, progress) * num_codes)
            left = self._chosen(left, num_kept, generator)
            is_out = np.ones(num_codes, dtype=bool)
            is_out[left] = False
            roles_LM[layer:stop, is_out] = BYPASS

    def _chosen(self, left: np.ndarray, num_kept: int, generator: np.random.Generator) -> np.ndarray:
        if self.selection == "random":
            return np.sort(generator.permutation(left)[:num_kept])
        if self.selection == "uniform":  # the middles of `num_kept` equal parts
            return left[((np.arange(num_kept) + 0.5) * len(left) / max(1, num_kept)).astype(np.int64)]
        return left[:num_kept]  # stand for those that the score will choose

    def scored_layers(self, num_layers: int, progress: float) -> tuple[int, ...]:
        if self.selection != "score":
            return ()
        stages = zip(self._layers(num_layers), self.keep, strict=True)
        return tuple(layer for layer, ratio in stages if ratio_at(ratio, progress) < 1)

    def at_inference(self, is_target: bool) -> ImagePolicy:
        if is_target:
            return Dense()
        # An answer must not hang on a draw.
        return self.model_copy(update={"selection": "uniform"}) if self.selection == "random" else self

    def _layers(self, num_layers: int) -> list[int]:
        if self.layers is not None:
            return self.layers
        num_stages = len(self.keep)
        return [(i + 1) * num_layers // (num_stages + 1) for i in range(num_stages)]
