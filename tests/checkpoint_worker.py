"""One rank of tests/test_survival.py: writes a checkpoint of every case, or goes on from those that others wrote.

    python -m torch.distributed.run --nproc-per-node=2 -m tests.checkpoint_worker FOLDER write CASE ...
    python -m torch.distributed.run --nproc-per-node=4 -m tests.checkpoint_worker FOLDER read CASE ...

A start costs 10 s and a case 2 s, or 8 s where it is converted (run, on two cores), so one start serves all cases.
"""

from __future__ import annotations

import faulthandler
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    from uvlm.distributed import prepare_environment

    prepare_environment()

import torch

from data_pipeline.schema import TASKS
from tests.helpers import tiny_model
from tests.zero3_worker import pack_of
from uvlm.config import Config, load_config
from uvlm.model import UnifiedVLM
from uvlm.token_plan import TokenPlan
from uvlm.weights import freeze

NUM_ROWS = 4
NUM_STEPS = 2  # before the checkpoint; one more comes after it
HANG_SECONDS = 400
FIXED = {"zero_optimization.stage": "as in the case"}
FULL_CASE = "stage3"
FULL_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
_OWN = {"name": "dense", "input_projections": "kv", "target_projections": "qkv"}


@dataclass(frozen=True)
class Case:
    """What could be lost between one number of ranks and another."""

    stage: int
    dtype: str
    tie_embeddings: bool = False
    frozen: tuple[str, ...] = ()
    has_own_projections: bool = False
    grad_accum_dtype: str | None = None  # fp32 makes DeepSpeed use another optimizer under stage 1 and bf16


CASES = {
    "stage1": Case(1, "bf16", frozen=("model.embed_tokens.weight", "*.1.*norm.weight")),
    "stage1-bf16_optimizer": Case(1, "bf16", grad_accum_dtype="fp32"),
    "stage2": Case(2, "fp32", tie_embeddings=True, has_own_projections=True),
    "stage2-frozen": Case(2, "bf16", frozen=("model.embed_tokens.weight", "*.1.*norm.weight")),
    "stage3": Case(3, "fp32", has_own_projections=True),
    "stage3-tied": Case(3, "bf16", tie_embeddings=True),
    "stage3-frozen": Case(3, "bf16", frozen=("model.embed_tokens.weight", "*.1.*norm.weight")),
}


def config_of(case: Case, run: Path) -> Config:
    return load_config(
        Path("demo"),
        [
            f"run={run}",
            f"dtype={case.dtype}",
            f"policy={_OWN if case.has_own_projections else {'name': 'dense'}}",
            f"data.num_rows={NUM_ROWS}",
            "optim.weight_decay=0.5",  # of matrices, not of norms: DeepSpeed mixes the two up where it converts
            "optim.learning_rate=0.01",
            "optim.warmup_steps=0",
        ],
    )


def model_of(case: Case, config: Config, scale: float) -> UnifiedVLM:
    """The model with values multiplied: what is read must come from the checkpoint, not from here."""
    model = tiny_model("qwen3", 3, case.tie_embeddings, config.policy)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(scale).add_(
                0.02 * scale * torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter)
            )
    freeze(model, case.frozen)
    return model


def _deepspeed_config(case: Case, config: Config, num_ranks: int) -> dict[str, Any]:
    from uvlm.deepspeed_config import resolve

    tree: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 2**14},
    }
    if case.stage == 3:  # some weights persist, most are partitioned
        tree["zero_optimization"].update(stage3_param_persistence_threshold=64, stage3_prefetch_bucket_size=2**14)
    if case.grad_accum_dtype:
        tree["data_types"] = {"grad_accum_dtype": case.grad_accum_dtype}
    return resolve(tree, config, num_ranks)


def _step(engine: Any, config: Config, step: int, rank: int, num_ranks: int) -> None:
    """One update on the same packs, whatever the number of ranks."""
    engine.set_learning_rate(config.optim.learning_rate)
    for row in range(rank, NUM_ROWS, num_ranks):
        pack = pack_of(TASKS[(step + row) % len(TASKS)], (step, row))
        plan = TokenPlan.of(pack, config.policy, 3)
        loss, *_ = engine(pack, plan, torch.full((len(plan.supervised),), NUM_ROWS / 20))
        engine.backward(loss)
        engine.step()


def _lose_a_checkpoint(engine: Any, saver: Any, rank: int) -> None:
    """The disk is full for one file of rank 1: all ranks leave the checkpoint out, and go on."""
    save = engine.save

    def save_to_full_disk(folder: Path, tag: str) -> None:
        if rank == 1:
            (folder / tag / FULL_FILE).symlink_to("/dev/full")
        save(folder, tag)

    engine.save = save_to_full_disk
    assert saver.save(1, {rank: {}}, {})
    assert not saver.finish()
    engine.save = save


def main(folder: Path, is_writer: bool, names: list[str]) -> None:
    """The cases, one after the other, on this rank. Rank 0 writes CASE-WHEN-RANKS.pt, the weights at a moment."""
    from uvlm.checkpoint import Saver, load_latest
    from uvlm.distributed import leave, world
    from uvlm.engine import Engine, start

    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    start()
    rank, num_ranks, _ = world()

    for name in names:
        print(f"rank {rank}: {name}", flush=True)
        case, config = CASES[name], config_of(CASES[name], folder / name)
        tree = _deepspeed_config(case, config, num_ranks)
        engine = Engine(model_of(case, config, scale=1.0 if is_writer else 3.0), config, tree)

        def note(moment: str, engine: Engine = engine, name: str = name) -> None:
            if model := engine.snapshot():
                torch.save(model.state_dict(), folder / f"{name}-{moment}-{num_ranks}.pt")

        saver = Saver(engine, config, FIXED)
        if is_writer:
            for step in range(NUM_STEPS):
                _step(engine, config, step, rank, num_ranks)
                if name == FULL_CASE and step == 0:
                    _lose_a_checkpoint(engine, saver, rank)
            assert saver.save(NUM_STEPS, {rank: {}}, {})
        else:
            assert load_latest(engine, config, FIXED).step == NUM_STEPS
        note("at")
        _step(engine, config, NUM_STEPS, rank, num_ranks)
        note("after")
        if is_writer:  # what is read is of the moment of the call, whatever has been trained since
            assert saver.finish()
            assert load_latest(engine, config).step == NUM_STEPS
            note("back")
            _step(engine, config, NUM_STEPS, rank, num_ranks)
            note("again")
        engine._engine.destroy()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "write", sys.argv[3:])
