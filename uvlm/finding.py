"""What a check has found: an error that stops a run, or a warning."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """`sentence` names what is wrong and a remedy. `key`: what to change, such as zero_optimization.stage or
    data.num_rows. `reference`: a public page, "run" for what was reproduced here, "" where the sentence says it all."""

    level: Literal["error", "warning"]
    key: str
    sentence: str
    reference: str = ""


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def refuse(findings: list[Finding]) -> None:
    """Raise ValueError with the sentences of all errors among `findings`; nothing where there is none."""
    if sentences := dict.fromkeys(finding.sentence for finding in errors(findings)):
        raise ValueError("; ".join(sentences))
