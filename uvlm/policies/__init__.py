"""Policies: which roles image tokens have in which layers.

A policy is a frozen pydantic model (its fields are the YAML's keys) that fills the table of roles of one image; the
model only reads the table, so a new method is one new file here and one more name in `AnyImagePolicy`.

The key of a role is what an image is *for* (input or target), never the document's task: an interleaved document holds
both kinds. Any kind can have any policy, and projections of its own:

    policy: {name: route, first_layer: 4, last_layer: 27, keep: 0.5}         # both kinds
    policy:
      input: {name: himix}
      target: {name: hmgen, num_shallow: 3}
      input_projections: kv
      target_projections: qkv

Anything random is drawn from a generator that is seeded by the pack's name, so a rerun or a rollback draws the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from uvlm.policies.dense import Dense
from uvlm.policies.ffn_skip import FFNSkip
from uvlm.policies.freeze import Freeze
from uvlm.policies.himix import HiMix
from uvlm.policies.hmgen import HMGen
from uvlm.policies.image_policy import ImagePolicy
from uvlm.policies.pyramid import Pyramid
from uvlm.policies.route import Route
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

    def check(self, num_layers: int) -> None:
        """Raise ValueError, naming the key and a value that works, for what a model of so many layers cannot do."""
        self.input.check("policy.input", num_layers, is_target=False)
        self.target.check("policy.target", num_layers, is_target=True)

    def at(self, progress: float) -> tuple[Policy, float]:
        """What holds when the share `progress` of the run is done: the policy, and the progress of its schedules."""
        tail_starts = 1 - self.full_tail
        if self.full_tail and progress >= tail_starts:
            return self.model_copy(update={"input": Dense(), "target": Dense()}), 1.0
        return self, progress / tail_starts

    def at_inference(self) -> Policy:
        """The policy of the finished model: dense for methods that only save training time."""
        if self.full_tail:
            return self.at(1.0)[0]
        images = {"input": self.input.at_inference(is_target=False), "target": self.target.at_inference(is_target=True)}
        return self.model_copy(update=images)

    def own_projections(self, num_layers: int) -> list[list[str]]:
        """By layer, the projections that one kind of image has for itself: input_q, input_k, ..., target_v.

        A layer in which all tokens of a kind are always left out has none for it: they would never be used.
        """
        own: list[list[str]] = [[] for _ in range(num_layers)]
        kinds = (("input", self.input, self.input_projections), ("target", self.target, self.target_projections))
        for kind, image_policy, letters in kinds:
            if letters != "shared":
                for names, attends in zip(own, image_policy.attends(num_layers), strict=True):
                    names += [f"{kind}_{letter}" for letter in letters if attends]
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
