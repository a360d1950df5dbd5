"""Facts shared by all tests: where the repository is, one thread per test process, and a cluster.

One thread, because the tests start several ranks on few cores and because sums in one order repeat exactly.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.slurm_lab import Lab

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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Lab]":
    """A Slurm of two nodes; one for all tests."""
    from tests.slurm_lab import start

    yield from start(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def slurm(cluster: "Lab") -> "Iterator[Lab]":
    """The cluster; idle again after the test, whatever becomes of it."""
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, and the small corpus that it trains on."""
    from tests.corpus import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def uninterrupted(cluster: "Lab", config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training over two nodes, ZeRO-3 across both, that nothing happened to."""
    from tests.slurm_lab import UGLY, said

    run = tmp_path_factory.mktemp("uninterrupted") / UGLY
    words = ("optim.steps=600", "checkpoint.every=600", f"validation.prompts=[{json.dumps(UGLY)}]")
    job = cluster.submit(config, f"run={json.dumps(str(run))}", *words, "--nodes=2", "--gpus-per-node=1")
    assert cluster.wait(job) == 0, said(run)
    return run


@pytest.fixture(scope="session")
def triton_kernels() -> bool:
    """Skips where Triton's kernels cannot run. Whether they run on a GPU, else under Triton's interpreter."""
    import torch

    if torch.cuda.is_available():
        return True
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU here; `make test-flash` runs this under Triton's interpreter")
    return False
