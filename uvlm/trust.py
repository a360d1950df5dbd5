"""Which checkpoints are opened without being asked: those that lie in the run and are this user's.

DeepSpeed unpickles its checkpoints, and a pickle may run whatever its writer wants. So there are two fences, and
`--trust` takes both away:

1. `check_trusted`, here: a checkpoint that a link brings into the run from elsewhere, or whose files are another
   user's, is not opened.
2. `engine.data_only`: the files of any other are opened by torch's restricted unpickler, which builds tensors, plain
   values and four classes of DeepSpeed, and nothing else. It costs nothing, the checkpoints of every ZeRO stage pass it
   (run), and it is what holds where the first fence cannot: a whole run folder that somebody unpacked looks like one's
   own, with checksums that fit.
"""

from __future__ import annotations

import os
from pathlib import Path

REMEDY = "opening it could run code; if you know who wrote it and trust them, give --trust"


def check_trusted(checkpoint: Path, run: Path, trust: bool) -> None:
    """Raise ValueError with what `why_not` says."""
    if sentence := why_not(checkpoint, run, trust):
        raise ValueError(sentence)


def why_not(checkpoint: Path, run: Path, trust: bool) -> str | None:
    """A sentence that names the file where a checkpoint of `run` is not this user's own; None where it may be opened.

    Args:
        checkpoint: RUN/checkpoints/step_*.
        trust: the user has said that it may be opened; nothing is looked at.
    """
    inside = run.resolve()
    for path in () if trust else (checkpoint.parent, checkpoint, *sorted(checkpoint.rglob("*"))):
        if not path.resolve().is_relative_to(inside):
            return f"{path} is a link to {path.resolve()}, which lies outside {run}; {REMEDY}"
        if path.stat().st_uid != os.geteuid():
            return f"{path} belongs to another user (number {path.stat().st_uid}); {REMEDY}"
    return None
