"""The base of every config section: frozen; an unknown key is an error, and so is a number that is not finite."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
