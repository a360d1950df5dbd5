"""Claim: the guard takes less than 0.5% of a step.

The demo's model (`uvlm/configs/demo.yaml`: width 256, 4 layers) trains in bf16 on packs of 1,024 tokens, one a step, in
plain PyTorch with AdamW. That is the least favourable place: under DeepSpeed a step takes longer, and a larger model
has more work for each module that is called.

`share` is what the guard measures of itself (`Guard.seconds`: the clock in its methods, its hooks by their number and
by what one costs on this machine) in those steps, plus a comparison every 100 steps, whose collective is timed on two
ranks that have just met at a barrier. `time_ratio` is the check from outside: steps with the guard to steps without, in
pairs in random order, with its 95% order-statistic interval; on a busy machine it is much wider than what it looks for.
In the first steps the trace is also shown to other ranks after each event: `first_steps_milliseconds` for one of them.

    python benchmarks/guard.py             about two minutes on two idle cores
    python benchmarks/guard.py --quick     a tiny model and 4 pairs, to show that all of it works

The last line is JSON: every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.encode import INSTRUCTION, OUTPUT, Encoded
from data_pipeline.packing import make_pack
from data_pipeline.schema import TASKS
from uvlm.backbone import ModelConfig, build_backbone
from uvlm.guard import Guard
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan
from uvlm.watchdog import Watchdog

VOCAB = 4096
EVERY = 100
NUM_COMPARISONS = 20
DEMO = Path(__file__).resolve().parent.parent / "uvlm" / "configs" / "demo.yaml"


class Trainer:
    """Steps of one pack each; nothing of it is DeepSpeed's."""

    def __init__(self, quick: bool) -> None:
        demo = yaml.safe_load(DEMO.read_text())
        if quick:
            demo["model"] |= {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
        torch.manual_seed(0)
        config = ModelConfig.model_validate(demo["model"])
        self.num_tokens = 128 if quick else demo["data"]["pack_tokens"]
        self.num_layers = config.num_layers
        self.model = UnifiedVLM(build_backbone(config, VOCAB)).to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, number: int, guard: Guard | None) -> float:
        """One step, in seconds."""
        started = time.perf_counter()
        if guard:
            guard.begin()
        loss = self.loss(number)
        if guard:
            guard.backward()
        loss.backward()
        if guard:
            guard.end()
            guard.compare(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def loss(self, number: int) -> torch.Tensor:
        """The forward pass over a pack that is made for it."""
        documents = [document(self.num_tokens // 4, [number, part]) for part in range(4)]
        pack = make_pack(documents, self.num_tokens, 0, (number, 0))
        plan = TokenPlan.of(pack, Policy(), self.num_layers)
        weights_S = torch.full((len(plan.supervised),), 1 / len(plan.supervised))
        return self.model(pack, plan, weights_S)[0]


def main() -> None:
    options = parse()
    rounds = options.rounds or (4 if options.quick else 60)
    load = os.getloadavg()[0]
    trainer = Trainer(options.quick)
    for number in range(3):
        trainer.step(number, None)  # a warm-up
    ratios, shares, seconds, num_events, hooks = [], [], [], 0, (0.0, 0.0)
    for number in track(range(rounds), "pairs of steps", transient=True):
        pair = {}
        for is_guarded in random.Random(number).sample([False, True], 2):
            guard = Guard(trainer.model, every=EVERY, first=0) if is_guarded else None
            pair[is_guarded] = trainer.step(number, guard)
            if guard:
                shares.append(guard.seconds / pair[True])
                num_events = len(guard.trace()["events"])
                hooks = guard.call_seconds, guard.gradient_seconds
                guard.remove()
        seconds.append(pair[False])
        ratios.append(pair[True] / pair[False])
    compare_seconds, show_seconds = on_two_ranks(options.quick)
    step_seconds = statistics.median(seconds)
    hooks_share = statistics.median(shares)
    result = {
        "share": round(hooks_share + compare_seconds / EVERY / step_seconds, 6),
        "share_of_hooks_and_checks": round(hooks_share, 6),
        "compare_milliseconds": round(compare_seconds * 1e3, 3),
        "call_microseconds": round(hooks[0] * 1e6, 2),
        "gradient_microseconds": round(hooks[1] * 1e6, 2),
        "events_a_micro_step": num_events,
        "first_steps_milliseconds": round(show_seconds * 1e3, 2),
        "step_milliseconds": round(step_seconds * 1e3, 1),
        "time_ratio": [round(value, 4) for value in interval(ratios)],
        "rounds": rounds,
        "machine": {"threads": torch.get_num_threads(), "load_before": round(load, 1), "torch": torch.__version__},
    }
    print_table(result)
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="pairs of steps (default 60)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 4 pairs")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    return options


def document(num_tokens: int, seed: list[int]) -> Encoded:
    """Random words, the second half with loss."""
    half = num_tokens // 2
    return Encoded(
        ids=np.random.default_rng(seed).integers(0, VOCAB, num_tokens),
        slot_lengths=[half, num_tokens - half],
        slot_segments=[INSTRUCTION, OUTPUT],
        slot_losses=[False, True],
        task=TASKS.index("text"),
        source="made",
        doc_id="made",
        image_starts=[],
        image_shapes=[],
        image_targets=[],
    )


def on_two_ranks(quick: bool) -> tuple[float, float]:
    """Seconds of a comparison between two ranks, and of showing a micro-step's events one after the other."""
    context = multiprocessing.get_context("spawn")
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with context.Pool(2) as pool:
        both = pool.starmap(_be_rank, [(rank, server.port, quick) for rank in range(2)], chunksize=1)
    return max(compare for compare, _ in both), max(show for _, show in both)


def _be_rank(rank: int, port: int, quick: bool) -> tuple[float, float]:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = Trainer(quick)
    guard = Guard(trainer.model, every=1, first=NUM_COMPARISONS)
    watchdog = Watchdog(limit=math.inf, guard=guard)
    spent, shown = [], []
    for step in range(NUM_COMPARISONS):
        guard.begin()
        trainer.loss(step).backward()
        guard.end()
        if guard.show is not None:
            started = time.perf_counter()
            for _ in guard.trace()["events"]:
                guard.show()
            shown.append(time.perf_counter() - started)
        dist.barrier()
        started = time.perf_counter()
        guard.compare(step)
        spent.append(time.perf_counter() - started)
    dist.barrier()
    watchdog.close()
    dist.destroy_process_group()
    return statistics.median(spent), statistics.median(shown)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics that enclose it with 95%."""
    ordered = sorted(values)
    reach = math.ceil(0.98 * math.sqrt(len(ordered)))
    middle = len(ordered) // 2
    return statistics.median(ordered), ordered[max(0, middle - reach)], ordered[min(len(ordered) - 1, middle + reach)]


def print_table(result: dict[str, Any]) -> None:
    table = Table("figure", "value", title=f"the guard, {result['rounds']} pairs of steps")
    for name, value in result.items():
        if name not in ("rounds", "machine"):
            table.add_row(name, f"{value:.3%}" if name.startswith("share") else str(value))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
