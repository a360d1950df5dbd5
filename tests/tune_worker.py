"""A rank of a trial as uvlm.tune_trial, but some trials of a search are hurt: `python -m tests.tune_worker FOLDER`.

Rank 1 of trial KILLED ends itself by SIGKILL, as the kernel does where memory is out, and that of trial HUNG waits for
ever, each in the middle of training.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

KILLED, HUNG = 2, 3


def hurt(number: int) -> None:
    """Have rank 1 of the trials KILLED and HUNG go no further than its second step."""
    from uvlm.trainer import Trainer

    own = Trainer.train_step

    def train_step(self: Trainer, packs: Any, step: int) -> float | None:
        if step == 1 and os.environ["RANK"] == "1":
            if number == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == HUNG:
                signal.pause()
        return own(self, packs, step)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    from uvlm.distributed import prepare_environment

    prepare_environment()
    from uvlm import tune_trial

    folder = Path(sys.argv[1])
    hurt(int(folder.name))
    tune_trial.main(folder)
