"""Facts shared by all tests: where the repository is, and one thread per test process.

One thread, because the tests start several ranks on few cores and because sums in one order repeat exactly.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; ranks started by tests inherit it


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
