"""torchrun, quiet: `python -m uvlm.torchrun ARGUMENTS`.

A rank that fails has said why in its own words, and somebody who interrupts knows that he did. torchrun then adds a
stack trace of itself, which buries both. This leaves everything to torchrun but that.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main

_PATIENCE = 15  # seconds; torchrun itself kills, after 30, ranks that do not end when another has failed


def _quiet_main() -> int:
    """The exit code: that of the rank that failed, or 128 + the signal that stopped torchrun."""
    logging.disable(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = _cause(error)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} was ended by {name}; the same command goes on where it can", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank, and how it ended: one that was killed before those that miss it, which may seem to have failed first.
    They notice as soon as its connections close, and its end is seen when all of its memory is freed."""
    first = error.get_first_failure()
    for rank, failure in error.failures.items():
        if failure.exitcode == -signal.SIGKILL and failure.timestamp - first[1].timestamp < _PATIENCE:
            return rank, failure
    return first


if __name__ == "__main__":
    sys.exit(_quiet_main())
