"""Two ranks under ZeRO-3 that hold different tasks compute what one plain process with all packs computes.

The trap (run): a parameter that gets no gradient in a step is updated with its last one, silently, and ranks that call
different modules crash, hang or train something else. So every rank calls every module in every micro-step, with zero
rows if there is nothing to do, and this is where that is held: for every policy, with and without projections for each
kind of image, at accumulation 1 and 2, under recomputation, and with tied embeddings.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zero3_worker import ADAM, CASES, HANG_SECONDS, NUM_RANKS, STEPS, Case, batch, build

TOLERANCE = 1e-5  # of the norm of what is expected; measured: 4e-6 at most


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient_from_every_pack(name: str) -> None:
    case = CASES[name]
    model = build(case)
    for step, micro_steps in enumerate(STEPS[case.accumulation]):
        for micro_step, tasks in enumerate(micro_steps):
            for rank, task in enumerate(tasks):
                model.zero_grad(set_to_none=True)
                loss, *_ = model(*batch(case, step, micro_step, rank))
                loss.backward()
                without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
                assert not without, f"step {step}, a pack of {task}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two ranks wrote about each case, and what they said."""
    folder = tmp_path_factory.mktemp("zero3")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.zero3_worker", str(folder)]
    # Ranks that hang end themselves, and say where; the time here is only for what that cannot end.
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS + 60, check=False)
    return folder, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_are_those_of_one_process_with_all_packs(name: str, two_ranks: tuple[Path, str]) -> None:
    folder, output = two_ranks
    path = folder / f"{name}.pt"
    assert path.exists(), output
    got, expected = torch.load(path), _train(CASES[name])
    for step, gradients in enumerate(expected["gradients"]):
        _assert_equal(got["gradients"][step], gradients, f"gradient in step {step}")
    _assert_equal(got["weights"], expected["weights"], "weights after the last step")


def _train(case: Case) -> dict[str, Any]:
    """The same training in plain PyTorch, one process, without recomputation."""
    model = build(case)
    model.recompute = "none"
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    gradients = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what nobody used has a gradient too: zero
    for step, micro_steps in enumerate(STEPS[case.accumulation]):
        for micro_step in range(len(micro_steps)):
            for rank in range(NUM_RANKS):
                loss, *_ = model(*batch(case, step, micro_step, rank))
                (loss / (NUM_RANKS * case.accumulation)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {"gradients": gradients, "weights": dict(model.named_parameters())}


def _assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    """Norm-wise, parameter by parameter; what must be zero must be zero exactly."""
    assert got.keys() == expected.keys()
    wrong = {}
    for name, want in expected.items():
        error = (got[name] - want).norm().item()
        if not error <= TOLERANCE * want.norm().item():
            wrong[name] = f"off by {error:.2e}, its norm is {want.norm().item():.2e}"
    assert not wrong, f"{what}: {wrong}"
