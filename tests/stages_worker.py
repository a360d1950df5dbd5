"""One rank of tests/test_stages.py: trains every case of its world for 20 updates and writes what it saw.

    python -m torch.distributed.run --nproc-per-node=2 -m tests.stages_worker FOLDER

Rank 0 writes FOLDER/<case>.pt after each case. Model and kinds of packs are those of zero3_worker.py, Adam's large
epsilon too; the scaling of the loss, the schedule, the parameter groups, the DeepSpeed config and the engine are the
trainer's.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported
    from uvlm.distributed import prepare_environment

    prepare_environment()

import torch
import torch.distributed as dist

from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from tests.zero3_worker import ADAM, HANG_SECONDS, NUM_LAYERS, PACK_TOKENS, Case, build, pack_of
from uvlm.config import Config, parse_config
from uvlm.deepspeed_config import read_deepspeed_json, resolve
from uvlm.losses import task_counts, task_ids, task_scales
from uvlm.optim import learning_rate
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

NUM_STEPS = 20
# Each kind of image leaves out tokens of its own and has projections of its own, which packs without it do not use.
MODEL = Case(
    {
        "input": {"name": "himix"},
        "target": {"name": "hmgen", "num_shallow": 1},
        "input_projections": "kv",
        "target_projections": "qkv",
    }
)
# By number of packs in a step; 10 clips the gradients of some steps and leaves those of others.
CLIPPING = {1: 0.0, 2: 10.0, 4: 0.0, 8: 10.0}
_SMALL = {"reduce_bucket_size": 2**12}
# The shipped files, and such with buckets so small that a step fills many, and every weight is spread over ranks.
JSONS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage_1-small": ("zero2.json", {"stage": 1, **_SMALL}),
    "stage_2": ("zero2.json", {}),
    "stage_3": ("zero3.json", {}),
    "stage_3-small": (
        "zero3.json",
        {**_SMALL, "stage3_prefetch_bucket_size": 2**12, "stage3_param_persistence_threshold": 0},
    ),
}


@dataclass(frozen=True)
class World:
    """How the packs of a step are spread. Worlds of as many packs train on the very same ones."""

    num_ranks: int
    accumulation: int

    @property
    def num_rows(self) -> int:
        return self.num_ranks * self.accumulation


CASES = {
    f"{json}-ranks_{num_ranks}-accumulation_{accumulation}": (json, World(num_ranks, accumulation))
    for num_ranks in (1, 2, 4)
    for accumulation in (1, 2)
    for json in JSONS
}


def config_of(num_rows: int) -> Config:
    """The run's configuration; what is not read here only has to be there."""
    optim = {"steps": NUM_STEPS, "learning_rate": ADAM["lr"], "warmup_steps": 4, "eps": ADAM["eps"]}
    model = {"hidden_size": 32, "intermediate_size": 48, "num_layers": NUM_LAYERS}
    model |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    tree = {
        "run": "unused",
        "model": model,
        "data": {"tokenizer": "no", "train": [{"path": "no"}], "pack_tokens": PACK_TOKENS, "num_rows": num_rows},
        "policy": MODEL.policy,
        "loss": {"weights": {"generate": 0.5, "text": 2.0}},
        "optim": {**optim, "betas": ADAM["betas"], "gradient_clipping": CLIPPING[num_rows]},
        "dtype": "fp32",
        "checkpoint": {"every": NUM_STEPS},
    }
    return parse_config(tree)


def pack_and_plan(step: int, row: int) -> tuple[Pack, TokenPlan]:
    """Two documents, mostly of two tasks. Over the steps every row sees all tasks; steps of few packs lack some."""
    first, second = TASKS[(row + step) % len(TASKS)], TASKS[(row + step // 3) % len(TASKS)]
    pack = pack_of(first, (row, step), second)
    return pack, TokenPlan.of(pack, Policy.model_validate(MODEL.policy), NUM_LAYERS, progress=step / NUM_STEPS)


def _train(json: str, world: World, rank: int) -> dict[str, Any]:
    """{"losses", "norms": by step; "gradients": by step, a dict by parameter; "weights": by parameter}."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from uvlm.engine import Engine

    config, model = config_of(world.num_rows), build(MODEL)
    name, changes = JSONS[json]
    tree = read_deepspeed_json(Path(name))
    tree["zero_optimization"].update(changes)
    engine = Engine(model, config, resolve(tree, config, world.num_ranks))
    losses, norms, gradients = [], [], []
    for step in range(NUM_STEPS):
        rows = range(rank * world.accumulation, (rank + 1) * world.accumulation)
        batches = [pack_and_plan(step, row) for row in rows]
        counts_K = task_counts([pack for pack, _ in batches])
        dist.all_reduce(counts_K)
        scales_K = task_scales(counts_K, config.loss.weights, world.num_rows)
        engine.set_learning_rate(learning_rate(config.optim, step))
        total = torch.zeros(())
        for pack, plan in batches:
            loss, *_ = engine(pack, plan, scales_K[task_ids(pack)])
            engine.backward(loss)
            total += loss.detach()
            if pack is batches[-1][0]:
                gradients.append({key: safe_get_full_grad(p).clone() for key, p in model.named_parameters()})
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item() / world.num_rows)
        norms.append(engine.gradient_norm)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    engine._engine.destroy()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def main(folder: Path) -> None:
    """Every case of this world, one after the other, on this rank."""
    from uvlm import distributed
    from uvlm.engine import start

    start()
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: not what has been imported
    rank, num_ranks, _ = distributed.world()
    for name, (json, world) in CASES.items():
        if world.num_ranks != num_ranks:
            continue
        print(f"rank {rank}: {name}", flush=True)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)  # counted anew
        result = _train(json, world, rank)
        if rank == 0:
            torch.save(result, folder / "part")
            (folder / "part").rename(folder / f"{name}.pt")
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
