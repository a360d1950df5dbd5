"""Policies: which roles image tokens have in which layers.

A policy is a frozen pydantic model (its fields are the YAML's keys) that fills the table of roles of one image; the
model only reads the table, so a new method is one new file here and one more name in `AnyImagePolicy`.

The key of a role is what an image is *for* (input or target), never the document's task: an interleaved document holds
both kinds. Any kind can have any policy, and projections of its own:

    policy: {name: route, first_layer: 4, last_layer: 23, keep: 0.5}         # both kinds
    policy:
      input: {name: himix}
      target: {name: hmgen, num_shallow: 3}
      input_projections: kv
      target_projections: qkv

Anything random is drawn from a generator that is seeded by the pack's name, so a rerun or a rollback draws the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from uvlm.policies.dense import Dense
from uvlm.policies.ffn_skip import FFNSkip
from uvlm.policies.freeze import Freeze
from uvlm.policies.himix import HiMix
from uvlm.policies.hmgen import HMGen
from uvlm.policies.image_policy import ImagePolicy
from uvlm.policies.pyramid import Pyramid
from uvlm.policies.route import Route
from uvlm.roles import BYPASS, KEY, QUERY
from uvlm.strict import Strict

AnyImagePolicy = Annotated[Dense | FFNSkip | Freeze | HiMix | HMGen | Pyramid | Route, Field(discriminator="name")]
Projections = Literal["shared", "kv", "qkv"]

__all__ = [
    "AnyImagePolicy",
    "Dense",
    "FFNSkip",
    "Freeze",
    "HMGen",
    "HiMix",
    "ImagePolicy",
    "Policy",
    "Pyramid",
    "Route",
]


class Policy(Strict):
    """The policy of each kind of image, and the weights that are its own."""

    input: AnyImagePolicy = Dense()
    target: AnyImagePolicy = Dense()
    input_projections: Projections = Field(default="shared", description="projections that input images alone use")
    target_projections: Projections = Field(default="shared", description="projections that target images alone use")
    full_tail: float = Field(
        default=0.0, ge=0.0, le=1.0, description="last share of the run in which nothing is left out"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, tree: Any) -> Any:
        return expand(tree) if isinstance(tree, dict) else tree

    def check(self, num_layers: int, is_written_once: bool = False) -> None:
        """Raise ValueError, naming the key and a value that works, for what a model of so many layers cannot do.

        Args:
            is_written_once: both kinds have the same policy, whose keys stand right below `policy`.
        """
        self.target.check("policy" if is_written_once else "policy.target", num_layers, is_target=True)
        self.input.check("policy" if is_written_once else "policy.input", num_layers, is_target=False)
        # For policies whose own check says nothing of it.
        tables = [self.target.table(num_layers, 1024, at, np.random.default_rng(0)) for at in np.linspace(0, 1, 11)]
        if any((table.max(axis=0) < QUERY).any() or (table[-1] == BYPASS).any() for table in tables):
            raise ValueError(
                f"policy.target.name={self.target.name} leaves out target tokens that carry loss and never return; "
                "use policy.target={name: dense}"
            )

    def at(self, progress: float) -> tuple[Policy, float]:
        """What holds when the share `progress` of the run is done: the policy, and the progress of its schedules."""
        tail_starts = 1 - self.full_tail
        if self.full_tail and progress >= tail_starts - 1e-9:  # 1 - 0.7 is a little more than 3 / 10
            return self.model_copy(update={"input": Dense(), "target": Dense()}), 1.0
        return self, min(1.0, progress / tail_starts)

    def at_inference(self) -> Policy:
        """The policy of the finished model: dense for methods that only save training time."""
        if self.full_tail:
            return self.at(1.0)[0]
        images = {"input": self.input.at_inference(is_target=False), "target": self.target.at_inference(is_target=True)}
        return self.model_copy(update=images)

    def own_projections(self, num_layers: int) -> list[list[str]]:
        """By layer, the projections that one kind of image has for itself: input_q, input_k, ..., target_v.

        A layer in which no token of a kind is ever a query, or a key, has none of that sort for it: they would never be
        used before the full tail, which uses the shared ones there.
        """
        own: list[list[str]] = [[] for _ in range(num_layers)]
        kinds = (("input", self.input, self.input_projections), ("target", self.target, self.target_projections))
        for kind, image_policy, letters in kinds:
            if letters != "shared":
                for names, role in zip(own, image_policy.highest_roles(num_layers), strict=True):
                    names += [f"{kind}_{letter}" for letter in letters if role >= (QUERY if letter == "q" else KEY)]
        return own

    @property
    def title(self) -> str:
        """For people: route, or himix+dense where input and target differ."""
        names = dict.fromkeys((self.input.name, self.target.name))
        return "+".join(names)


def expand(tree: dict[str, Any]) -> dict[str, Any]:
    """`{name: ..., ...}`, the same policy for both kinds of image, written out; `input` or `target` may change keys."""
    if "name" not in tree:
        return tree
    own = {key: value for key, value in tree.items() if key in Policy.model_fields}
    image = {key: value for key, value in tree.items() if key not in Policy.model_fields}
    for kind in ("input", "target"):
        given = own.get(kind, {})
        if isinstance(given, dict) and "name" not in given:
            own[kind] = {**image, **given}
    return own
