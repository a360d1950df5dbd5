"""Policies: which tokens are left out of which layers.

A policy is a frozen pydantic model (its fields are the YAML's keys) with one method, `spans`, that fills the table of
roles: for runs of layers, which of the pack's tokens take part. The model only reads the table, so a new method is one
new file here and one more name in `Policy`.

The key of a role is what an image is *for* (input or target), never the document's task: an interleaved document holds
both kinds. Anything random is drawn from the generator that `spans` is given; it is seeded by the pack's name, so a
rerun or a rollback draws the same.
"""

from typing import Annotated

from pydantic import Field

from uvlm.policies.dense import Dense
from uvlm.policies.route import Route

Policy = Annotated[Dense | Route, Field(discriminator="name")]

__all__ = ["Dense", "Policy", "Route"]
