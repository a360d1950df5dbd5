"""Facts shared by all tests: where the repository is, and one thread per test process.

One thread, because the tests start several ranks on few cores and because sums in one order repeat exactly.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; ranks started by tests inherit it


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def triton_kernels() -> bool:
    """Skips where Triton's kernels cannot run. Whether they run on a GPU, else under Triton's interpreter."""
    import torch

    if torch.cuda.is_available():
        return True
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU here; `make test-flash` runs this under Triton's interpreter")
    return False
