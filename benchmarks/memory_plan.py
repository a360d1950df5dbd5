"""Claim: what `uvlm plan` says of a rank's memory is within 10% of what lives there, for each part.

Real DeepSpeed ranks train on a CPU for three steps of two micro-steps, as `uvlm train` does, with packs of
understanding, generating and text documents. Every tensor storage is followed from its birth to its death
(uvlm/live_memory.py), and its kind decided by who made it: weights and shards (parameters), gradients kept between
micro-steps and their copy at a step (gradients), fp32 weights, moments and what an update makes (optimizer), what the
model's own code and its backward pass make (activations), and gathered layers, buckets and whole gradients (buffers).
The peak of each is held against the prediction of the same rank; the worse of two ranks counts. Shown beside them: the
peak of all together while training, and that of the start before it, when shards are made; and resident memory, which
holds libraries too, what a start has left in the allocator, and what kernels use inside of one operation.

Six cases: two sizes of model, ZeRO stages 2 and 3, one and two ranks, one of them with token roles. JSON: zero2.json
and zero3.json with buckets of a million elements, since theirs would hide everything else in models of this size.

    python benchmarks/memory_plan.py           two minutes on two cores
    python benchmarks/memory_plan.py --quick   tiny models, to show that all of it works

The last line is JSON: `worst_error` over the four parts that are promised, and each case's bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.train_memory import make_vocab, reports_of_ranks

if TYPE_CHECKING:
    import torch

    from data_pipeline.packing import Pack
    from uvlm.config import Config

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
TIMEOUT_SECONDS = 600
PROMISED = ("parameters", "gradients", "optimizer", "activations")
SHOWN = (*PROMISED, "buffers", "total")
BUCKET = 1_000_000
MICRO_STEPS = 2
NUM_STEPS = 3


class Case(NamedTuple):
    hidden: int
    num_layers: int
    stage: int
    num_ranks: int
    roles: bool = False
    pack_tokens: int = 512

    @property
    def name(self) -> str:
        roles = ", route" if self.roles else ""
        return f"{self.hidden} x {self.num_layers}, ZeRO-{self.stage}, {self.num_ranks} rank(s){roles}"


CASES = [
    Case(256, 4, 3, 1),
    Case(256, 4, 3, 2),
    Case(256, 4, 2, 1),
    Case(512, 6, 2, 2),
    Case(512, 6, 3, 2),
    Case(512, 6, 3, 2, roles=True),
]
QUICK = [Case(64, 3, 3, 2, roles=True, pack_tokens=256)]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to show that all of it works")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # this process is one rank of that case
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_a_rank(Case(**json.loads(options.rank_of)), options.folder)
        return
    results = [measure(case) for case in track(QUICK if options.quick else CASES, "training", transient=True)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("case", *SHOWN, "start", "resident", title="a rank's memory: predicted / measured at its peak, MB")
    for result in results:
        cells = [f"{result['predicted'][part] / 1e6:.1f} / {result['measured'][part] / 1e6:.1f}" for part in SHOWN]
        table.add_row(result["case"], *cells, *(f"{result[part] / 1e6:,.0f}" for part in ("start", "resident")))
    console.print(table)
    errors = [abs(r["predicted"][part] / r["measured"][part] - 1) for r in results for part in PROMISED]
    print(json.dumps({"worst_error": round(max(errors), 4), "cases": results}))


def measure(case: Case) -> dict[str, Any]:
    """Start the ranks of a case; of each part the rank whose prediction is furthest off."""
    reports = reports_of_ranks(__file__, case, ENVIRONMENT, TIMEOUT_SECONDS)
    predicted = reports[0]["predicted"]
    measured = {
        part: max((r["measured"][part] for r in reports), key=lambda m: abs(predicted[part] / m - 1)) for part in SHOWN
    }
    rest = {part: max(report[part] for report in reports) for part in ("start", "resident")}
    return {"case": case.name, "predicted": predicted, "measured": measured, **rest}


def be_a_rank(case: Case, folder: Path) -> None:
    """Train in this process, one of `case.num_ranks`, and write FOLDER/rank_N.json."""
    from uvlm.distributed import leave, prepare_environment, world

    prepare_environment()
    import psutil
    import torch

    from uvlm import engine as deepspeed_engine
    from uvlm.deepspeed_config import read_deepspeed_json, resolve
    from uvlm.live_memory import ALL, LiveMemory
    from uvlm.memory_plan import meta_model, plan_memory, shapes_of, trace
    from uvlm.token_plan import TokenPlan
    from uvlm.train import build

    deepspeed_engine.start()
    place = world()
    config, vocab = make_config(case, folder), make_vocab(folder / f"text_{place.rank}.json")
    tree = resolve(read_deepspeed_json(config.deepspeed), config, case.num_ranks)
    packs = [make_mixed_pack(case, number) for number in range(NUM_STEPS * MICRO_STEPS)]
    made = trace(config, vocab.size, packs, "cpu")
    predicted = plan_memory(shapes_of(meta_model(config, vocab.size), config), tree, case.num_ranks, MICRO_STEPS, made)
    with LiveMemory(claims=kind_of) as live:
        model, _ = build(config, vocab, tree)
        engine = deepspeed_engine.Engine(model, config, tree)
        claim_weights(live, engine)
        with live.phase("training"):
            for pack in packs:
                plan = TokenPlan.of(pack, config.policy, case.num_layers, config.seed)
                weights_S = torch.full((len(plan.supervised),), 1 / len(plan.supervised))
                loss, *_ = engine(pack, plan, weights_S)
                engine.backward(loss)
                engine.step()
                claim_weights(live, engine)
    peaks = live.peaks()["training"]
    report = {
        "predicted": {**{part: getattr(predicted, part) for part in SHOWN}, "activations": made.together},
        "measured": {**{part: peaks.get(part, 0) for part in SHOWN}, "total": peaks[ALL]},
        "start": live.peaks()["start"][ALL],
        "resident": psutil.Process().memory_info().rss,
    }
    (folder / f"rank_{place.rank}.json").write_text(json.dumps(report))
    leave()


# By file and function of DeepSpeed: what is made there. All else that its files make is a buffer.
MADE_BY = {
    ("stage3.py", "_create_fp16_partitions_with_defragmentation"): "parameters",
    ("stage3.py", "_create_fp32_partitions"): "optimizer",
    ("stage3.py", "initialize_optimizer_states"): "gradients",
    ("stage3.py", "_prepare_fp32_grad_for_sub_group"): "gradients",
    ("stage_1_and_2.py", "copy_grads_in_partition"): "gradients",
    ("stage_1_and_2.py", "step"): "gradients",
}
PASS = ("/uvlm/model.py", "/uvlm/head.py", "/uvlm/attention.py", "/zero/linear.py")


def kind_of(operation: str, new: list[torch.Tensor]) -> str:
    """Who made it, from the stack: the innermost frame that tells."""
    frame: Any = sys._getframe(2)
    is_of_deepspeed = False
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if "/torch/optim/" in path:
            return "optimizer"
        is_backward = path.endswith("deepspeed/runtime/engine.py") and function == "backward"  # what autograd makes
        if path.endswith(PASS) or is_backward:
            return "buffers" if is_of_deepspeed else "activations"
        if "/deepspeed/runtime/" in path:
            if kind := MADE_BY.get((path.rpartition("/")[2], function)):
                return kind
            is_of_deepspeed |= not path.endswith("deepspeed/runtime/engine.py")
        frame = frame.f_back
    return "buffers"


def claim_weights(live: Any, engine: Any) -> None:
    """What the stack does not tell: a gradient buffer beside a bucket, master weights, weights that stay gathered."""
    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        live.claim("gradients", [optimizer.grad_partitions_flat_buffer])
        live.claim("parameters", [p.data for p in engine.module.parameters() if p.ds_persist])
    else:
        live.claim("optimizer", optimizer.single_partition_of_fp32_groups)
        live.claim("parameters", optimizer.bit16_groups_flat)


def make_mixed_pack(case: Case, number: int) -> Pack:
    """Documents of random ids, half of their tokens in images, until no more fits."""
    import numpy as np

    from data_pipeline.encode import IMAGE, INSTRUCTION, OUTPUT, Encoded
    from data_pipeline.packing import make_pack
    from data_pipeline.schema import TASKS

    random = np.random.default_rng(number)
    documents: list[Encoded] = []
    free = case.pack_tokens
    while True:
        task = ("understand", "generate", "text")[len(documents) % 3]
        lengths = [int(random.integers(8, 30)), 0 if task == "text" else 64, int(random.integers(8, 60))]
        if sum(lengths) > free:
            return make_pack(documents, case.pack_tokens, 0, (0, number))
        free -= sum(lengths)
        is_target, num_images = task == "generate", int(task != "text")
        documents.append(
            Encoded(
                random.integers(0, 256, sum(lengths)),
                lengths,
                [INSTRUCTION, IMAGE, OUTPUT],
                [False, is_target, not is_target],
                TASKS.index(task),
                "made",
                f"{number}-{len(documents)}",
                [lengths[0]] * num_images,
                [(8, 8)] * num_images,
                [is_target] * num_images,
            )
        )


def make_config(case: Case, folder: Path) -> Config:
    """The config of a run with the shipped JSON of the case's stage, and buckets of BUCKET elements."""
    from uvlm.config import parse_config
    from uvlm.deepspeed_config import read_deepspeed_json
    from uvlm.distributed import world

    tree = read_deepspeed_json(Path(f"zero{case.stage}.json"))
    sizes = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    tree["zero_optimization"].update({key: BUCKET for key in sizes if key in tree["zero_optimization"]})
    path = folder / f"deepspeed_{world().rank}.json"
    path.write_text(json.dumps(tree))
    roles = {"name": "route", "first_layer": 1, "last_layer": case.num_layers - 2, "keep": 0.5}
    model = {"hidden_size": case.hidden, "intermediate_size": 3 * case.hidden, "num_layers": case.num_layers}
    return parse_config(
        {
            "run": str(folder / "run"),
            "model": {**model, "num_heads": 8, "num_kv_heads": 4, "head_dim": case.hidden // 8},
            "data": {
                "tokenizer": "none",
                "train": [{"path": "none"}],
                "pack_tokens": case.pack_tokens,
                "num_rows": MICRO_STEPS * case.num_ranks,
            },
            "policy": roles if case.roles else {"name": "dense"},
            "optim": {"steps": NUM_STEPS, "learning_rate": 1e-4},
            "checkpoint": {"every": NUM_STEPS},
            "deepspeed": str(path),
        }
    )


if __name__ == "__main__":
    main()
