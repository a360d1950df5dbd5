"""`python -m tests.life_worker FAULT -- uvlm's arguments`: a rank of uvlm whose loss is wrong at some steps.

FAULT is JSON: {"rank": on which rank (null: all), "steps": [from, to), counted as forward passes of training,
"factor": what the loss is multiplied with, "nan" for none that is finite}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from uvlm.distributed import prepare_environment, world


def main() -> None:
    prepare_environment()
    fault = json.loads(sys.argv[1])
    sys.argv = ["uvlm", *sys.argv[3:]]
    from uvlm import cli
    from uvlm.engine import Engine

    forward = Engine.__call__
    num_calls = 0

    def with_fault(self: Engine, *arguments: Any) -> Any:
        nonlocal num_calls
        loss, nll_S, right_S = forward(self, *arguments)
        first, end = fault["steps"]
        if fault["rank"] in (None, world().rank) and first <= num_calls < end:
            loss, nll_S = loss * float(fault["factor"]), nll_S * float(fault["factor"])
        num_calls += 1
        return loss, nll_S, right_S

    Engine.__call__ = with_fault  # type: ignore[method-assign, assignment]
    cli.main()


if __name__ == "__main__":
    main()
