"""Ratio: a share of tokens that may change over a run.

    keep: 0.5                              constant
    keep: {start: 0.25, end: 1.0}          linear
    keep: {0.0: 0.25, 0.5: 0.5, 0.9: 1.0}  stages; a key is the share of the run after which its value holds

Progress is the share of the run that is done, up to its full tail, so a schedule fits runs of any length. It is a
function of the step, `optim.steps` and `policy.full_tail`: there is nothing to save, and a run that is made longer goes
on at another point of it.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from uvlm.strict import Strict

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Linear(Strict):
    start: Share
    end: Share


def _from_the_start(stages: dict[float, float]) -> dict[float, float]:
    if 0.0 not in stages:
        raise ValueError(f"nothing holds at the start; add 0.0: {next(iter(stages.values()), 0.5)}")
    if 1.0 in stages:
        raise ValueError("nothing is trained after the whole run; use a key below 1.0, or `end` of a linear schedule")
    return stages


def _form(value: Any) -> str:
    if isinstance(value, Linear) or (isinstance(value, dict) and any(str(key)[:1].isalpha() for key in value)):
        return "linear"  # misspelt words too
    return "stages" if isinstance(value, dict) else "constant"


FORMS = ("constant", "linear", "stages")
Ratio = Annotated[
    Annotated[Share, Tag("constant")]
    | Annotated[Linear, Tag("linear")]
    | Annotated[dict[Share, Share], AfterValidator(_from_the_start), Tag("stages")],
    Discriminator(_form),
]


def ratio_at(ratio: Ratio, progress: float) -> float:
    """The share that holds at `progress`, 0 <= progress <= 1."""
    if isinstance(ratio, Linear):
        return ratio.start + (ratio.end - ratio.start) * progress
    if isinstance(ratio, dict):
        return ratio[max(start for start in ratio if start <= progress)]
    return ratio
