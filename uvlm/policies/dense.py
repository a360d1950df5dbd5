"""Dense: every token has every role in every layer. The baseline that each other policy is held against."""

from typing import Literal

from uvlm.policies.image_policy import ImagePolicy


class Dense(ImagePolicy):
    name: Literal["dense"] = "dense"
