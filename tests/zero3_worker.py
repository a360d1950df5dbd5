"""One rank of tests/test_zero3.py: trains every case for a few steps under ZeRO-3 and writes what it saw.

    python -m torch.distributed.run --nproc-per-node=2 -m tests.zero3_worker FOLDER

Rank 0 writes FOLDER/<case>.pt after each case: the full gradients of each optimizer step, and the weights at the end.
DeepSpeed changes functions of torch for its whole process, so the plain training they are compared with runs elsewhere:
in the test's own process, from the same cases and packs, which are made here.

A start costs 10 s and a case 0.8 s (run, two ranks on two cores), so one start serves all cases.
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

import numpy as np
import torch

from data_pipeline.encode import IGNORED
from data_pipeline.packing import Pack, make_pack
from data_pipeline.schema import TASKS
from tests.helpers import tiny_model
from tests.random_packs import Slot, image, laid_out, text
from uvlm.backbone import Family
from uvlm.model import Recompute, UnifiedVLM
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

NUM_LAYERS = 3
NUM_RANKS = 2
PACK_TOKENS = 96
HANG_SECONDS = 240
# A large epsilon: Adam turns a gradient of pure rounding error into a full step where it is much larger than epsilon.
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
# By accumulation: optimizer steps of micro-steps of (task on rank 0, task on rank 1), never the same. In one step there
# is no input image anywhere, so weights of theirs that got no gradient would be updated with an old one; where two
# micro-steps are accumulated, input images also come only in the second.
STEPS: dict[int, list[list[tuple[str, str]]]] = {
    1: [[("understand", "generate")], [("generate", "text")], [("interleave", "understand")]],
    2: [
        [("understand", "generate"), ("text", "understand")],
        [("generate", "text"), ("text", "generate")],
        [("text", "generate"), ("interleave", "text")],
    ],
}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; see `STEPS` for what on."""

    policy: dict[str, Any]
    accumulation: int = 1
    recompute: Recompute = "none"
    tie_embeddings: bool = False
    family: Family = "qwen3"


_HIMIX = {"input": {"name": "himix"}, "target": {"name": "himix", "layers": [1]}}
_JOINT = {"input": {"name": "himix"}, "target": {"name": "hmgen", "num_shallow": 1}}
_STAGES = {"name": "pyramid", "layers": [1, 2], "keep": [0.5, 0.25]}
_RETURN = {"name": "pyramid", "layers": [1], "keep": [0.5], "return_layer": 2}
_SCORE = {"input": _STAGES, "target": {**_RETURN, "selection": "uniform"}}
_RANDOM = {"input": {**_STAGES, "selection": "random"}, "target": {**_RETURN, "selection": "random"}}
# No choice is made in the first step, one in the second, and two stages choose in the last.
_SCHEDULE = {"input": {**_STAGES, "keep": [{0.0: 1.0, 0.6: 0.5}, {0.0: 1.0, 0.3: 0.25}]}, "target": {"name": "dense"}}
_OWN = {"input_projections": "kv", "target_projections": "qkv"}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "route": {"name": "route", "first_layer": 1, "last_layer": 1, "keep": 0.5},
    "himix": _HIMIX,
    "hmgen": {"name": "hmgen", "num_shallow": 1},
    "joint": _JOINT,
    "pyramid_score": _SCORE,
    "pyramid_random": _RANDOM,
    "freeze": {"name": "freeze", "first_layer": 1},
    "ffn_skip": {"name": "ffn_skip"},
}


def _cases() -> dict[str, Case]:
    cases = {}
    for name, policy in POLICIES.items():
        for accumulation in STEPS:
            cases[f"{name}-accumulation_{accumulation}"] = Case(policy, accumulation)
            cases[f"{name}-own_projections-accumulation_{accumulation}"] = Case({**policy, **_OWN}, accumulation)
    for name in ("dense", "joint", "pyramid_score", "ffn_skip"):
        own = {**POLICIES[name], **_OWN}
        cases[f"{name}-recompute_full"] = Case(own, 1, "full")
        cases[f"{name}-recompute_selective"] = Case(own, 2, "selective", tie_embeddings=name == "joint")
    swapped = {"input_projections": "qkv", "target_projections": "kv"}
    cases["dense-tied"] = Case(POLICIES["dense"], 2, tie_embeddings=True)
    cases["joint-tied-llama"] = Case({**_JOINT, **swapped}, 2, tie_embeddings=True, family="llama")
    cases["pyramid_score-tied-qwen2"] = Case({**_SCORE, **swapped}, 2, tie_embeddings=True, family="qwen2")
    cases["hmgen-full_tail"] = Case({**POLICIES["hmgen"], **swapped, "full_tail": 0.5}, 2)
    cases["pyramid_score-schedule"] = Case(_SCHEDULE, 1)
    return cases


CASES = _cases()


def build(case: Case) -> UnifiedVLM:
    """The same weights at every call, larger than usual: so attention is far from uniform and every gradient counts."""
    policy = Policy.model_validate(case.policy)
    policy.check(NUM_LAYERS)
    model = tiny_model(case.family, NUM_LAYERS, case.tie_embeddings, policy, case.recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim == 2 else 1.0).add_(0.02 * torch.randn_like(parameter))
    return model


def batch(case: Case, step: int, micro_step: int, rank: int) -> tuple[Pack, TokenPlan, torch.Tensor]:
    """(pack, plan, weights_S) of one rank in one micro-step: what the model is called with.

    The weights are random; ZeRO's division by ranks and DeepSpeed's by accumulation are undone in them.
    """
    task = STEPS[case.accumulation][step][micro_step][rank]
    pack = pack_of(task, (10 * step + micro_step, rank))
    plan = TokenPlan.of(pack, Policy.model_validate(case.policy), NUM_LAYERS, progress=step / len(STEPS[1]))
    weights_S = torch.rand(len(plan.supervised), generator=torch.Generator().manual_seed(step)) / 20
    return pack, plan, weights_S * NUM_RANKS * case.accumulation


def pack_of(task: str, name: tuple[int, int], second_task: str | None = None) -> Pack:
    """Two documents, of one task or of two, and an unused tail."""
    documents = []
    for number, one in enumerate((task, second_task or task)):
        seed = [TASKS.index(one), *name, number]
        documents.append(laid_out(_slots(one, seed), one, seed))
    return make_pack(documents, PACK_TOKENS, 0, name)


def _slots(task: str, seed: list[int]) -> list[Slot]:
    """Texts of random lengths and images: "t" text, "T" text with loss, "i" an input image, "I" a target image."""
    random = np.random.default_rng(seed)
    kinds = {"understand": "tiT", "generate": "tIt", "interleave": "itIT", "text": "tTt"}[task]
    return [
        text(int(random.integers(2, 8)), loss=kind == "T") if kind in "tT" else image(3, 4, loss=kind == "I")
        for kind in kinds
    ]


def _deepspeed_config(case: Case) -> dict[str, Any]:
    """Buckets and thresholds so small that every parameter is partitioned, gathered and reduced for real."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 2**14,
            "stage3_prefetch_bucket_size": 2**14,
            "stage3_param_persistence_threshold": 0,
        },
    }


def _train(case: Case, rank: int) -> dict[str, Any]:
    """{"gradients": by step, a dict by parameter; "weights": by parameter}."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = build(case)
    config = _deepspeed_config(case)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    gradients = []
    for step, micro_steps in enumerate(STEPS[case.accumulation]):
        for micro_step in range(len(micro_steps)):
            loss, *_ = engine(*batch(case, step, micro_step, rank))
            engine.backward(loss)
            if micro_step == case.accumulation - 1:
                gradients.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
            engine.step()
        if step == 0:
            _validate(engine, case, rank)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine.destroy()
    return {"gradients": gradients, "weights": weights}


@torch.no_grad()
def _validate(engine: Any, case: Case, rank: int) -> None:
    """A pass without gradients between two steps, as the trainer does it: it must not disturb the next step."""
    engine.train(False)
    pack = batch(case, 0, 0, rank)[0]
    plan = TokenPlan.of(pack, Policy.model_validate(case.policy).at_inference(), NUM_LAYERS)
    engine(pack, plan, torch.ones(int((pack.labels != IGNORED).sum())))
    engine.train()


def main(folder: Path) -> None:
    """Every case, one after the other, on this rank."""
    from uvlm.distributed import leave, world
    from uvlm.engine import start

    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    start()
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: not what has been imported
    rank = world().rank
    for name, case in CASES.items():
        print(f"rank {rank}: {name}", flush=True)
        result = _train(case, rank)
        if rank == 0:
            torch.save(result, folder / "part")
            (folder / "part").rename(folder / f"{name}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
