"""Each DeepSpeed JSON that ships trains, on two real ranks, what zero3.json trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.corpus import launch, losses, write_corpus
from uvlm.deepspeed_config import read_deepspeed_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[int, float]:
    run = corpus.parent / "zero3"
    launch(corpus, 2, f"run={run}", "optim.steps=6")
    return losses(run)


@pytest.mark.parametrize("name", ["zero2.json", "zero3_hpz.json", "zero3_offload.json"])
def test_every_file_has_the_losses_of_zero_3(
    name: str, corpus: Path, expected: dict[int, float], tmp_path: Path
) -> None:
    """Offloaded, it is also stopped after four steps and goes on with one rank: those files are like the others."""
    tree, stops = read_deepspeed_json(Path(name)), [(2, 6)]
    if name == "zero3_offload.json":  # PyTorch's AdamW: compiling DeepSpeed's own for the CPU takes minutes
        tree |= {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_force_ds_cpu_optimizer": False}
        stops = [(2, 4), (1, 6)]
    path, run = tmp_path / name, tmp_path / "run"
    path.write_text(json.dumps(tree))
    for num_ranks, steps in stops:
        launch(corpus, num_ranks, f"run={run}", f"deepspeed={path}", f"optim.steps={steps}")
    assert losses(run) == pytest.approx(expected, abs=2e-3)
