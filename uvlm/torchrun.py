"""torchrun, quiet: `python -m uvlm.torchrun ARGUMENTS`.

A rank that fails has said why in its own words, and somebody who interrupts knows that he did. torchrun then adds a
stack trace of itself, which buries both. This leaves everything to torchrun but that.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def _quiet_main() -> int:
    """The exit code: that of the first rank that failed, or 128 + the signal that stopped torchrun."""
    logging.disable(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} was ended by {name}; the same command goes on where it can", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(_quiet_main())
