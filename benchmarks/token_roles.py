"""Claim: what a policy saves on paper the clock shows, and a policy that leaves nothing out costs nothing.

A Qwen3 of width 512 and 12 layers, with 8,192 words and 4,096 image codes, trains on packs of 2,048 tokens: half of the
documents understand an image (8 text tokens, 256 codes, then 40 text tokens of which 24 carry loss), half generate one
(16 text tokens, then 256 codes with loss). A step is two packs, one with four documents of the first kind and three of
the second, one the other way round; their order is drawn anew in every round, and so is what a policy draws.

Each policy is timed in pairs with dense on the same packs, in random order inside the pair, after a warm-up: the token
plan, forward and backward. Shown is the median of the paired ratios with its 95% order-statistic interval, beside the
ratio of exact FLOPs (`uvlm/flops.py`) of the same packs; efficiency is (1 - time ratio) / (1 - FLOP ratio). The whole
step adds `torch.optim.AdamW`. Memory is the growth of a fresh process's resident memory, at its peak, over forward and
backward of a step, gradients included (Linux, one thread, an allocator that hands freed tensors back at once).

In fp32 a CPU is bound by arithmetic, as a GPU is at the widths of real models, so the clock can show what FLOPs say.
In bf16 it may multiply several times as fast, while norms, rotations and softmax stay as slow as memory: a policy that
saves matrix products alone (ffn_skip) then saves a smaller share of the time than of the FLOPs.

`dense_overhead` is the time inside planning, gather and scatter with nothing left out, as a share of a dense step's
forward and backward; `packed_to_plain` compares that, in pairs, with a plain loop over the backbone's layers.

    python benchmarks/token_roles.py                             about 12 minutes on two idle cores
    python benchmarks/token_roles.py --dtype bf16                as a GPU trains; about 5 minutes
    python benchmarks/token_roles.py --policy route --rounds 5   some of them (give --policy again for each)
    python benchmarks/token_roles.py --quick                     a tiny model, to show that all of it works

The last line is JSON: every figure.

Legend: T tokens of a pack, D width, N query heads, G key/value heads, H head dimension, S supervised tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.encode import IGNORED, IMAGE, INSTRUCTION, OUTPUT, Encoded
from data_pipeline.packing import Pack, make_pack
from data_pipeline.schema import TASKS
from uvlm import model as packed_model
from uvlm.attention import varlen_attention
from uvlm.backbone import ModelConfig, build_backbone
from uvlm.flops import Widths, flops
from uvlm.model import UnifiedVLM, rotate
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

PACK_TOKENS = 2048
NUM_LAYERS = 12
IMAGE_SHAPE = (16, 16)
NUM_CODES = math.prod(IMAGE_SHAPE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
POLICIES: dict[str, dict[str, Any]] = {
    "himix_hmgen": {"input": {"name": "himix"}, "target": {"name": "hmgen", "num_shallow": 5}},
    "himix": {"input": {"name": "himix"}},
    "hmgen": {"target": {"name": "hmgen", "layers": list(range(2, 10))}},
    "pyramid_random": {"input": {"name": "pyramid", "selection": "random"}},
    "pyramid_score": {"input": {"name": "pyramid", "selection": "score"}},
    "route": {"name": "route", "first_layer": 2, "last_layer": 9, "keep": 0.5},
    "freeze": {"name": "freeze", "first_layer": 6},
    "ffn_skip": {"name": "ffn_skip"},
}
DENSE = Policy()
PLAIN = "plain"
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc: freed tensors leave at once

Loss = Callable[[Pack], torch.Tensor]


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    num_words: int
    num_image_codes: int
    rounds: int

    @property
    def vocab(self) -> int:
        return self.num_words + self.num_image_codes


FULL = Size(hidden=512, intermediate=1536, num_heads=8, num_kv_heads=4, num_words=8192, num_image_codes=4096, rounds=7)
QUICK = Size(hidden=64, intermediate=96, num_heads=2, num_kv_heads=1, num_words=256, num_image_codes=256, rounds=2)


class Seconds(NamedTuple):
    """Of one step: plan, forward and backward; and the same with the optimizer."""

    forward_backward: float
    step: float


class Ratio(NamedTuple):
    """Median and 95% interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def main() -> None:
    options = parse()
    size = QUICK if options.quick else FULL
    names = list(dict.fromkeys(options.policy or POLICIES))
    rounds = options.rounds or size.rounds
    load = os.getloadavg()[0]
    dtype = DTYPES[options.dtype]
    memory = measure_memory(size, dtype, names)
    trainer = Trainer(size, dtype)
    ratios, step_ratios = measure_ratios(trainer, names, rounds)
    overhead = measure_overhead(trainer, rounds)

    flop_ratio = {name: trainer.flop_ratio(policy_of(name), rounds) for name in names}
    result = {
        "efficiency": {name: round((1 - ratios[name].median) / (1 - flop_ratio[name]), 3) for name in names},
        "time_ratio": {name: round(ratios[name].median, 4) for name in names},
        "flop_ratio": {name: round(flop_ratio[name], 4) for name in names},
        "memory_ratio": {name: round(memory[name] / memory["dense"], 4) for name in names},
        "step_ratio": {name: round(step_ratios[name].median, 4) for name in names},
        "dense_overhead": round(overhead, 5),
        "packed_to_plain": rounded(ratios[PLAIN]),
        "time_interval": {name: rounded(ratios[name])[1:] for name in names},
        "memory_megabytes": {name: round(size / 1e6, 1) for name, size in memory.items()},
        "rounds": rounds,
        "dtype": options.dtype,
        "machine": {"threads": torch.get_num_threads(), "load_before": round(load, 1), "torch": torch.__version__},
    }
    print_tables(result, ratios, step_ratios)
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=f"pairs of each policy with dense (default {FULL.rounds})")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of weights and products (default fp32)")
    parser.add_argument("--quick", action="store_true", help=f"a tiny model and {QUICK.rounds} rounds")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="instead of all of them")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds={options.rounds} must be at least 1")
    return options


def policy_of(name: str) -> Policy:
    policy = Policy.model_validate(POLICIES.get(name, {}))
    policy.check(NUM_LAYERS)
    return policy


def packs_of(size: Size, number: int) -> list[Pack]:
    """The two packs of a step, which share their kinds of documents equally; all else is drawn by `number`."""
    random = np.random.default_rng(number)
    packs = []
    for index, num_understand in enumerate((4, 3)):
        documents = [document(size, random, is_target=position >= num_understand) for position in range(7)]
        order = random.permutation(7)
        packs.append(make_pack([documents[i] for i in order], PACK_TOKENS, 0, (number, index)))
    return packs


def document(size: Size, random: np.random.Generator, is_target: bool) -> Encoded:
    num_before, num_after = (16, 0) if is_target else (8, 40)
    num_output = 0 if is_target else 24
    codes = size.num_words + random.integers(0, size.num_image_codes, NUM_CODES)
    before, after = (random.integers(0, size.num_words, count) for count in (num_before, num_after))
    return Encoded(
        ids=np.concatenate([before, codes, after]),
        slot_lengths=[num_before, NUM_CODES, num_after - num_output, num_output],
        slot_segments=[INSTRUCTION, IMAGE, INSTRUCTION, OUTPUT],
        slot_losses=[False, is_target, False, True],
        task=TASKS.index("generate" if is_target else "understand"),
        source="made",
        doc_id="made",
        image_starts=[num_before],
        image_shapes=[IMAGE_SHAPE],
        image_targets=[is_target],
    )


class Trainer:
    """The model and its optimizer, which changes no weight (its rate is zero), so that every step is the same work."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = ModelConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_layers=NUM_LAYERS,
            num_heads=size.num_heads,
            num_kv_heads=size.num_kv_heads,
            head_dim=size.hidden // size.num_heads,
            tie_embeddings=False,
        )
        self.size = size
        self.model = UnifiedVLM(build_backbone(config, size.vocab)).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def packed(self, policy: Policy) -> Loss:
        def loss(pack: Pack) -> torch.Tensor:
            plan = TokenPlan.of(pack, policy, NUM_LAYERS)
            return self.model(pack, plan, even_weights(len(plan.supervised)))[0]

        return loss

    def plain(self, pack: Pack) -> torch.Tensor:
        """The dense loss by a direct loop over the backbone's layers, with the same attention and head."""
        backbone = self.model.backbone.model
        hidden_TD = backbone.embed_tokens(pack.ids)
        rotation_TH = tuple(table[0] for table in backbone.rotary_emb(hidden_TD, pack.position_ids[None]))
        lengths = (pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen)
        for layer in backbone.layers:
            attention = layer.self_attn
            heads = (PACK_TOKENS, -1, attention.head_dim)
            x_TD = layer.input_layernorm(hidden_TD)
            q_TNH = rotate(attention.q_norm(attention.q_proj(x_TD).view(heads)), *rotation_TH)
            k_TGH = rotate(attention.k_norm(attention.k_proj(x_TD).view(heads)), *rotation_TH)
            mixed_TNH = varlen_attention(q_TNH, k_TGH, attention.v_proj(x_TD).view(heads), *lengths)
            hidden_TD = hidden_TD + attention.o_proj(mixed_TNH.flatten(1))
            hidden_TD = hidden_TD + layer.mlp(layer.post_attention_layernorm(hidden_TD))
        supervised = (pack.labels != IGNORED).nonzero()[:, 0]
        hidden_SD = backbone.norm(hidden_TD.index_select(0, supervised))
        return self.model.backbone.lm_head(hidden_SD, pack.labels[supervised], even_weights(len(supervised)))[0]

    def step(self, packs: list[Pack], loss: Loss) -> Seconds:
        started = time.perf_counter()
        for pack in packs:
            loss(pack).backward()
        after_backward = time.perf_counter()
        self.optimizer.step()
        stopped = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        return Seconds(after_backward - started, stopped - started)

    def flop_ratio(self, policy: Policy, rounds: int) -> float:
        widths = Widths.of(self.model.backbone.config)
        packs = [pack for number in range(rounds) for pack in packs_of(self.size, number)]
        totals = [
            sum(flops(TokenPlan.of(pack, each, NUM_LAYERS), widths).total for pack in packs) for each in (policy, DENSE)
        ]
        return totals[0] / totals[1]


def even_weights(num_supervised: int) -> torch.Tensor:
    return torch.full((num_supervised,), 1 / num_supervised)


def measure_ratios(trainer: Trainer, names: list[str], rounds: int) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
    """Ratios to dense of forward and backward, and of the whole step; PLAIN's are those of dense to the plain loop."""
    losses: dict[str, Loss] = {name: trainer.packed(policy_of(name)) for name in names}
    losses[PLAIN] = trainer.plain
    dense = trainer.packed(DENSE)
    packs = packs_of(trainer.size, 0)
    assert trainer.plain(packs[0]).item() == dense(packs[0]).item(), "the two forward passes are the same"
    for loss in [dense, *losses.values()]:  # shapes repeat, so all that is made once for a shape is made here
        trainer.step(packs, loss)
    random = np.random.default_rng(0)
    pairs: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in losses}
    cells = [(number, str(name)) for number in range(rounds) for name in random.permutation(list(losses))]
    for number, name in track(cells, "timing pairs", transient=True):
        packs = packs_of(trainer.size, number)
        timed = {}
        for is_dense in random.permutation([True, False]):
            timed[bool(is_dense)] = trainer.step(packs, dense if is_dense else losses[name])
        pairs[name].append((timed[True], timed[False]) if name == PLAIN else (timed[False], timed[True]))
    return (
        {name: interval([a.forward_backward / b.forward_backward for a, b in pairs[name]]) for name in losses},
        {name: interval([a.step / b.step for a, b in pairs[name]]) for name in losses},
    )


def interval(values: list[float]) -> Ratio:
    """The median, and the order statistics that enclose the true one with 95% or more; fewer than 6 values never do."""
    ordered, count = sorted(values), len(values)
    below = [math.comb(count, i) / 2**count for i in range(count + 1)]
    skipped = max([k for k in range(count // 2) if sum(below[: k + 1]) <= 0.025], default=0)
    return Ratio(statistics.median(ordered), ordered[skipped], ordered[-1 - skipped])


def measure_overhead(trainer: Trainer, rounds: int) -> float:
    """Time inside planning, gather and scatter of dense steps, as a share of their forward and backward."""
    both = Policy.model_validate({"input": POLICIES["route"], "target": POLICIES["ffn_skip"]})
    with timed_mechanism() as spent:
        trainer.step(packs_of(trainer.size, 0), trainer.packed(both))
    assert min(spent.values()) > 0, f"a stopwatch is not where the work is: {spent}"
    total = 0.0
    with timed_mechanism() as spent:
        for number in track(range(rounds), "timing the mechanism", transient=True):
            total += trainer.step(packs_of(trainer.size, number), trainer.packed(DENSE)).forward_backward
    return sum(spent.values()) / total


@contextmanager
def timed_mechanism() -> Iterator[dict[str, float]]:
    """Stopwatches around planning, gather and scatter, both ways: seconds by function (`index_copy` is also in scatter,
    and counts twice there)."""
    gather, scatter = packed_model._Gather, packed_model._Scatter
    places = [(TokenPlan, "of"), *((each, way) for each in (gather, scatter) for way in ("apply", "backward"))]
    spent = dict.fromkeys([*(f"{owner.__name__}.{name}" for owner, name in places), "Tensor.index_copy"], 0.0)

    def timed(key: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - started

    with ExitStack() as stack:
        for owner, name in places:
            wrapped = staticmethod(partial(timed, f"{owner.__name__}.{name}", getattr(owner, name)))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        original = torch.Tensor.index_copy

        def index_copy(*args: Any) -> Any:
            return timed("Tensor.index_copy", original, *args)

        stack.enter_context(mock.patch.object(torch.Tensor, "index_copy", index_copy))
        yield spent


def measure_memory(size: Size, dtype: torch.dtype, names: list[str]) -> dict[str, int]:
    """Bytes of each policy, and of dense, each in a fresh process."""
    names = ["dense", *names]
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {**KEEP_NOTHING, "OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        growths = pool.map(partial(peak_growth, size, dtype), names)
        return dict(zip(names, track(growths, "measuring memory", len(names), transient=True), strict=True))


def peak_growth(size: Size, dtype: torch.dtype, name: str) -> int:
    """How far this process's resident memory rises above where it stood, in a step's forward and backward; bytes."""
    trainer = Trainer(size, dtype)
    loss, packs = trainer.packed(policy_of(name)), packs_of(size, 0)
    for _ in range(2):  # the first time is a warm-up: kernels and their scratch memory
        trainer.model.zero_grad(set_to_none=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = resident("VmRSS")
        for pack in packs:
            loss(pack).backward()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def rounded(ratio: Ratio) -> list[float]:
    return [round(value, 4) for value in ratio]


def print_tables(result: dict[str, Any], ratios: dict[str, Ratio], step_ratios: dict[str, Ratio]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    title = f"to dense, {result['rounds']} pairs, {result['dtype']}, {result['machine']['threads']} threads"
    table = Table("policy", "FLOPs", "forward and backward", "efficiency", "whole step", "peak memory", title=title)
    for name, share in result["flop_ratio"].items():
        efficiency, memory = result["efficiency"][name], result["memory_ratio"][name]
        step = f"{step_ratios[name].median:.3f}"
        table.add_row(name, f"{share:.3f}", str(ratios[name]), f"{efficiency:.2f}", step, f"{memory:.3f}")
    console.print(table)
    console.print(f"nothing left out: planning, gather and scatter take {result['dense_overhead']:.2%} of a step")
    console.print(f"packed dense to the plain loop: {ratios[PLAIN]}")


if __name__ == "__main__":
    main()
