"""A plan of a run: its FLOPs against what PyTorch counts, what crosses the wire, and what the command shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.packing import Pack, make_pack
from tests.corpus import uvlm, write_corpus
from tests.helpers import document
from tests.test_memory_plan import ROLES, a_config, complete
from uvlm.backbone import build_backbone
from uvlm.flops import Widths
from uvlm.hardware import HARDWARE, THIS, find_hardware, this_machine
from uvlm.memory_plan import meta_model, shapes_of
from uvlm.model import UnifiedVLM
from uvlm.plan import Planner, communication, count_work
from uvlm.sample import ASSUMED_VOCAB, Sample, take_sample
from uvlm.token_plan import TokenPlan
from uvlm.zero_memory import Shapes

VOCAB_SIZE = 97
POLICIES = {
    **ROLES,
    "ffn_skip": {"name": "ffn_skip"},
    "freeze": {"name": "freeze", "first_layer": 3},
}


def packs() -> list[Pack]:
    return [
        make_pack(
            [document("understand", 9, 30, 20, seed=n), document("generate", 7, 30, 1, seed=n + 9)], 128, 0, (0, n)
        )
        for n in range(2)
    ]


def attention_row_by_row(
    q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *_: int
) -> torch.Tensor:
    """Each query times the keys that it sees and no other, so that a counter of products counts the allowed pairs."""
    rows, k_KNH, v_KNH = [], *(x.repeat_interleave(q_QNH.shape[1] // x.shape[1], dim=1) for x in (k_KGH, v_KGH))
    for q0, q1, k0, k1 in zip(
        cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True
    ):
        for query in range(q0, q1):
            last = k1 - (q1 - query) + 1
            k, v = k_KNH[k0:last].transpose(0, 1), v_KNH[k0:last].transpose(0, 1)
            scores = torch.bmm(k, q_QNH[query][:, :, None]) * k.shape[-1] ** -0.5
            rows.append(torch.bmm(scores.softmax(1).transpose(1, 2), v)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", POLICIES)
def test_flops_of_a_step_are_those_that_pytorch_counts(
    name: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention included: the counter sees products of queries with the keys they may see."""
    monkeypatch.setattr("uvlm.model.varlen_attention", attention_row_by_row)
    config = a_config(policy=POLICIES[name], recompute=recompute, dtype="fp32")
    model = UnifiedVLM(build_backbone(config.model, VOCAB_SIZE), config.policy, config.recompute)
    with FlopCounterMode(display=False) as counter:
        for pack in packs():
            plan = TokenPlan.of(pack, config.policy, model.num_layers, config.seed)
            loss, *_ = model(pack, plan, torch.ones(len(plan.supervised)))
            loss.backward()
    monkeypatch.undo()
    work = count_work(config, Widths.of(model.backbone.config), packs(), [0.0])
    executed = len(packs()) * (work.flops + work.again[config.recompute])
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.01)
    if recompute == "none":
        planned = Planner(config, HARDWARE["h100"], sample=Sample(VOCAB_SIZE, packs(), ())).at(8)
        assert planned.flops == pytest.approx(counter.get_total_flops() * 8 / len(packs()), rel=0.01)


def test_flops_of_a_policy_that_changes_over_the_run_are_a_mean_of_it() -> None:
    always, annealed = (
        Planner(
            a_config(policy={"name": "route", "first_layer": 1, "last_layer": 4, "full_tail": tail}),
            HARDWARE["h100"],
            sample=Sample(VOCAB_SIZE, packs(), ()),
        ).at(8)
        for tail in (0.0, 0.5)
    )
    assert always.flops < annealed.flops < always.dense_flops == annealed.dense_flops


def test_what_a_rank_sends_follows_from_the_stage() -> None:
    config, shapes = a_config(), Shapes([[10**9] * 4, [1000]], [])
    total = 4 * 10**9 + 1000

    def flow(name: str, ranks: int, accumulation: int, **zero: Any) -> Any:
        return communication(shapes, complete(name, config, ranks, **zero), ranks, accumulation)

    assert flow("zero3.json", 1, 8).total == 0
    half = flow("zero2.json", 2, 1)
    assert half.gather == total * 2 // 2
    assert half.reduce == 2 * half.gather  # an all-reduce
    assert flow("zero2.json", 2, 4).reduce == 4 * half.reduce
    three = flow("zero3.json", 2, 1)  # above a billion weights, each is gathered twice
    assert three.gather == pytest.approx(2 * half.gather, rel=1e-5)
    assert three.reduce == pytest.approx(2 * half.gather, rel=1e-5)  # fp32 on the wire
    roomy = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), 10**10)
    assert flow("zero3.json", 2, 1, **roomy).gather == pytest.approx(half.gather, rel=1e-5)


def test_groups_of_hpz_take_the_second_gather_off_the_network() -> None:
    config, shapes = a_config(), Shapes([[10**9] * 4], [])
    plain, hpz = (communication(shapes, complete(name, config, 16), 16, 1) for name in ("zero3.json", "zero3_hpz.json"))
    assert hpz.gather == plain.gather / 2
    assert hpz.inside == 2 * 4 * 10**9 * 7 // 8
    assert hpz.reduce == plain.reduce


def test_more_ranks_take_less_memory_and_less_time_each() -> None:
    planner = Planner(a_config(), HARDWARE["h100"], sample=Sample(VOCAB_SIZE, packs(), ()))
    plans = [planner.at(size) for size in (1, 2, 4, 8)]
    assert [plan.memory.optimizer for plan in plans] == sorted((p.memory.optimizer for p in plans), reverse=True)
    assert plans[-1].num_rows == 8
    assert planner.at(16).num_rows == 16  # rows that divide
    assert all(0 < plan.mfu < 1 and plan.fits for plan in plans)


def test_a_gpu_that_is_too_small_is_said_to_be() -> None:
    planner = Planner(a_config(), HARDWARE["h100"], gpu_memory=10**9, sample=Sample(VOCAB_SIZE, packs(), ()))
    assert not planner.at(8).fits


def test_this_machine_is_measured_and_unknown_hardware_is_refused() -> None:
    assert find_hardware(THIS) is None  # measured for each number of ranks
    alone, shared = this_machine(1), this_machine(64)
    assert not alone.is_gpu
    assert alone.flops >= shared.flops > 1e8
    assert alone.memory == pytest.approx(64 * shared.memory, rel=0.01)
    with pytest.raises(ValueError, match=r"no hardware 'h1000'; use a100, h100, h200, b200 or this"):
        find_hardware("h1000")


def test_without_data_it_is_said_what_was_assumed(tmp_path: Path) -> None:
    config = a_config(data={**a_config().data.model_dump(), "tokenizer": str(tmp_path)})
    vocab_size, assumed, notes = take_sample(config)
    assert vocab_size == ASSUMED_VOCAB
    assert "documents of 100 text tokens and an image" in notes[0]
    assert len(assumed[0].ids) == 512
    assert take_sample(config, 1234).vocab_size == 1234


def test_the_data_of_the_run_are_what_is_planned_with(tmp_path: Path) -> None:
    from uvlm.config import load_config

    config = load_config(write_corpus(tmp_path))
    sample = take_sample(config)
    assert not sample.notes
    assert len(sample.packs) == 4
    assert {pack.name for pack in sample.packs} == {(row, 0) for row in range(4)}
    work = Planner(config, HARDWARE["h100"], sample=sample).work
    assert set(work.flops_per_token) == {"understand", "generate"}


def test_the_command_plans_seven_billion_parameters_without_making_them(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = uvlm(
        "plan", "7b", "--nodes", "8", "--gpus-per-node", "8", "--gpu-memory", "80", "--json", f"--out={picture}"
    )
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert tree["plan"]["num_parameters"] > 7e9
    assert tree["plan"]["num_ranks"] == 64
    assert tree["plan"]["memory_limit"] == 80_000_000_000
    assert [each["num_ranks"] for each in tree["worlds"]] == [2**n for n in range(11)]
    assert tree["activations"]["none"]["activations"] > tree["activations"]["full"]["activations"]
    assert tree["assumed"]
    assert np.asarray(Image.open(picture)).std() > 10


def test_the_command_says_what_does_not_fit_and_what_to_do() -> None:
    done = uvlm("plan", "7b", "recompute=none", "--gpu-memory", "24")
    assert done.returncode == 0, done.stderr
    assert "does NOT fit" in done.stdout
    assert "set recompute=selective" in done.stdout
    assert "no GPU was measured" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--hardware", "tpu"], "there is no hardware 'tpu'"), (["--out", "plan.txt"], "that ends in .png")],
)
def test_the_command_refuses_in_one_sentence(arguments: list[str], sentence: str) -> None:
    done = uvlm("plan", "7b", *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["small", "1b", "7b"])
def test_shipped_sizes_are_what_their_names_say(name: str) -> None:
    from uvlm.config import load_config

    config = load_config(Path(name))
    billions = sum(shapes_of(meta_model(config, ASSUMED_VOCAB), config).all) / 1e9
    low, high = {"small": (0.1, 0.3), "1b": (0.9, 1.5), "7b": (7, 8)}[name]
    assert low < billions < high
