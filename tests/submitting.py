"""What the tests of submitting share: a small corpus, a fake Slurm, and a call that submits.

A module that wants the fixtures imports them by name and lists them in `__all__`, so that they count as used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.fake_slurm import FakeSlurm
from uvlm.job_script import Request
from uvlm.submit import Submitted, submit_training

REQUEST = Request(nodes=2, gpus_per_node=2, time="1:00:00", partition="gpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "my env.sh"
    path.write_text("export NCCL_DEBUG=WARN\n")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where no run is yet."""
    return tmp_path / "runs" / "it's my run"


@pytest.fixture
def submit(corpus: Path, run: Path, env_file: Path, slurm: FakeSlurm) -> Callable[..., Submitted]:
    """Submit the corpus' training into `run`."""

    def call(*overrides: str, config: Path = corpus, request: Request = REQUEST, **options: object) -> Submitted:
        words = [f"run={json.dumps(str(run))}", *overrides] if config == corpus else overrides
        return submit_training(config, words, request, env_file, **options)  # type: ignore[arg-type]

    return call


def content(folder: Path) -> dict[str, str]:
    """Every file below, without the code."""
    files = (path for path in folder.rglob("*") if path.is_file() and "code" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_text() for path in files}
