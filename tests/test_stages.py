"""Twenty updates under ZeRO stages 1, 2 and 3 are those of a plain PyTorch loop, whatever the ranks and micro-steps.

Each case is a world of 1, 2 or 4 ranks with 1 or 2 micro-steps a step, which train on packs of all tasks, in fp32, with
the trainer's own engine, loss scaling, parameter groups and DeepSpeed config. The loop here knows no ranks: it adds
up the losses of a step's packs, each token's divided by the number of tokens of its task in the whole step.

Compared are the losses and gradient norms of all steps, each parameter's gradient in all steps, and the weights at the
end: 25,152 figures in 24 cases, of which the worst was off by 3.9e-6 (run). The price is 3 minutes of processor time.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.schema import TASKS
from tests.stages_worker import CASES, MODEL, NUM_STEPS, config_of, pack_and_plan
from tests.zero3_worker import HANG_SECONDS, build
from uvlm.losses import task_ids
from uvlm.optim import learning_rate, parameter_groups

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # of the norm of what is expected


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """What each world wrote about each of its cases, and by number of ranks what it said."""
    folder, said = tmp_path_factory.mktemp("stages"), {}
    for num_ranks in sorted({world.num_ranks for _, world in CASES.values()}):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.stages_worker", str(folder)]
        # Ranks that hang end themselves, and say where; the time here is only for what that cannot end.
        result = subprocess.run(command, capture_output=True, text=True, timeout=3 * HANG_SECONDS, check=False)
        said[num_ranks] = result.stdout + result.stderr
    return folder, said


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_twenty_updates_are_those_of_a_plain_loop(name: str, worlds: tuple[Path, dict[int, str]]) -> None:
    folder, said = worlds
    world = CASES[name][1]
    path = folder / f"{name}.pt"
    assert path.exists(), said[world.num_ranks]
    errors = errors_of(torch.load(path), plain_loop(world.num_rows))
    worst = max(errors, key=lambda what: errors[what])
    assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.2e} of its norm"


def test_some_steps_are_clipped_and_some_lack_a_task() -> None:
    for num_rows in {world.num_rows for _, world in CASES.values()}:
        clipping = config_of(num_rows).optim.gradient_clipping
        clipped = [norm > clipping > 0 for norm in plain_loop(num_rows)["norms"]]
        assert (0 < sum(clipped) < NUM_STEPS) == bool(clipping), f"{num_rows} packs"
    tasks = [set(task_ids(pack_and_plan(step, 0)[0]).tolist()) for step in range(NUM_STEPS)]
    assert set.union(*tasks) == set(range(len(TASKS)))
    assert min(map(len, tasks)) < len(TASKS)


@functools.cache
def plain_loop(num_rows: int) -> dict[str, Any]:
    """The same training in one process without DeepSpeed, in the form of `stages_worker`'s results."""
    config, model = config_of(num_rows), build(MODEL)
    optim = config.optim
    groups = parameter_groups(model, optim)
    optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps)
    losses, norms, gradients = [], [], []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        batches = [pack_and_plan(step, row) for row in range(num_rows)]
        counts = Counter(task for pack, _ in batches for task in task_ids(pack).tolist())
        optimizer.zero_grad(set_to_none=False)
        losses.append(0.0)
        for pack, plan in batches:
            ids = task_ids(pack).tolist()
            weights = [config.loss.weights.get(TASKS[task], 1.0) / counts[task] for task in ids]
            loss, *_ = model(pack, plan, torch.tensor(weights))
            loss.backward()
            losses[-1] += loss.item()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        limit = optim.gradient_clipping or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": dict(model.named_parameters())}


def errors_of(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative error by what is compared, tensors by norm; infinite where what must be zero is not."""
    errors = {}
    for key in ("losses", "norms"):
        for step, (one, want) in enumerate(zip(got[key], expected[key], strict=True)):
            errors[f"{key} of step {step}"] = abs(one - want) / abs(want)
    tensors = [(f"gradient in step {i}", one, expected["gradients"][i]) for i, one in enumerate(got["gradients"])]
    for what, ours, theirs in [*tensors, ("weights at the end", got["weights"], expected["weights"])]:
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            error, norm = (ours[name] - want).norm().item(), want.norm().item()
            errors[f"{what} of {name}"] = error / norm if norm else float("inf") if error else 0.0
    return errors
