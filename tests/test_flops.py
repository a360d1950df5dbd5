"""FLOPs of a plan: what PyTorch counts while the model runs, and what counting pairs by hand gives."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.schema import TASKS
from tests.helpers import mixed_pack, tiny_model
from uvlm.flops import MODULES, Widths, dense_flops, flops
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

POLICIES = {
    "dense": {},
    "route": {"name": "route", "first_layer": 1, "last_layer": 2},
    "himix and hmgen": {
        "input": {"name": "himix"},
        "target": {"name": "hmgen", "num_shallow": 1},
        "input_projections": "kv",
        "target_projections": "qkv",
    },
    "pyramid": {"input": {"name": "pyramid"}},
    "freeze": {"name": "freeze", "first_layer": 2},
    "ffn_skip": {"name": "ffn_skip"},
}


@pytest.mark.parametrize("name", POLICIES)
def test_flops_are_those_that_pytorch_counts_apart_from_attention(name: str) -> None:
    policy, pack = Policy.model_validate(POLICIES[name]), mixed_pack()
    model = tiny_model(policy=policy)
    plan = TokenPlan.of(pack, policy, model.num_layers)
    with FlopCounterMode(display=False) as counter:
        loss, *_ = model(pack, plan, torch.ones(len(plan.supervised)))
        loss.backward()
    counted = sum(
        n for operation, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )
    ours = flops(plan, Widths.of(model.backbone.config))
    assert counted == ours.total - ours.by_module()["attention"]


def _allowed_pairs(plan: TokenPlan, layer: int) -> int:
    """Pairs by the mask: the keys that each query sees."""
    span = next(span for span in plan.spans if span.first <= layer < span.stop)
    queries, keys = span.cu_seqlens_q.diff().tolist(), span.cu_seqlens_k.diff().tolist()
    return sum(int(np.tri(q, k, k - q).sum()) for q, k in zip(queries, keys, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_attention_counts_the_pairs_that_the_mask_allows_forward_and_twice_backward(name: str) -> None:
    policy = Policy.model_validate(POLICIES[name])
    plan = TokenPlan.of(mixed_pack(), policy, 4)
    widths = Widths(hidden=32, query=32, key=16, ffn=48, vocab=97)
    ours = flops(plan, widths)
    for layer in range(4):
        forward = ours.forward[layer, :, MODULES.index("attention")].sum()
        assert forward == 4 * _allowed_pairs(plan, layer) * 32
    assert (ours.backward[..., MODULES.index("attention")] == 2 * ours.forward[..., MODULES.index("attention")]).all()


def test_the_same_flops_come_by_layer_by_task_and_by_module() -> None:
    policy = Policy.model_validate(POLICIES["himix and hmgen"])
    ours = flops(TokenPlan.of(mixed_pack(), policy, 4), Widths(32, 32, 16, 48, 97))
    assert ours.by_layer().sum() == ours.by_task().sum() == sum(ours.by_module().values()) == ours.total
    assert len(ours.by_layer()) == 5
    by_task = dict(zip([*TASKS, "tail"], ours.by_task().tolist(), strict=True))
    assert by_task["interleave"] == 0
    assert by_task["tail"] > 0


def test_dense_flops_are_those_of_the_dense_plan_for_every_plan_of_the_pack() -> None:
    widths = Widths(32, 32, 16, 48, 97)
    want = flops(TokenPlan.of(mixed_pack(), Policy(), 4), widths).total
    for tree in POLICIES.values():
        plan = TokenPlan.of(mixed_pack(), Policy.model_validate(tree), 4)
        assert dense_flops(plan, widths) == want
        assert flops(plan, widths).total <= want
