"""Dense: every token has every role in every layer. The baseline that each other policy is held against."""

from typing import Literal

import numpy as np

from data_pipeline.packing import Pack
from uvlm.strict import Strict
from uvlm.token_plan import Kept


class Dense(Strict):
    name: Literal["dense"] = "dense"

    def check(self, num_layers: int) -> None:
        """Nothing can be asked of a dense model that it does not have."""

    def spans(self, pack: Pack, num_layers: int, generator: np.random.Generator) -> list[Kept]:
        """No layer leaves a token out."""
        return []
