"""Memory that is predicted against memory that a real pass takes, and ZeRO's rules against DeepSpeed's own values.

benchmarks/memory_plan.py, which test_benchmarks runs, holds the parts against real ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.packing import Pack, make_pack
from tests.helpers import VOCAB_SIZE, document
from uvlm.config import Config, parse_config
from uvlm.deepspeed_config import read_deepspeed_json, resolve
from uvlm.live_memory import ALL, LiveMemory
from uvlm.memory_plan import meta_model, plan_memory, shapes_of, trace
from uvlm.token_plan import TokenPlan
from uvlm.zero_memory import Shapes, zero_memory

ROLES: dict[str, dict[str, Any]] = {
    "dense": {},
    "route": {"name": "route", "first_layer": 1, "last_layer": 4},
    "pyramid": {"input": {"name": "pyramid"}},
    "himix and hmgen": {
        "input": {"name": "himix"},
        "target": {"name": "hmgen", "num_shallow": 1},
        "input_projections": "kv",
        "target_projections": "qkv",
    },
}


def a_config(**changes: Any) -> Config:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 6}
    tree = {
        "run": "nowhere",
        "model": {**sizes, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
        "data": {"tokenizer": "nowhere", "train": [{"path": "nowhere"}], "pack_tokens": 512, "num_rows": 8},
        "optim": {"steps": 10, "learning_rate": 1e-3},
        "checkpoint": {"every": 5},
    }
    return parse_config({**tree, **changes})


def a_pack() -> Pack:
    documents = [
        document("understand", 30, 100, 50, seed=1),
        document("generate", 20, 100, 1, seed=2),
        document("text", 30, 0, 100, seed=3),
    ]
    return make_pack(documents, 512, 0, (0, 0))


def real_pass(config: Config, pack: Pack) -> int:
    """Bytes above the weights at the peak of a pass with data."""
    from uvlm.backbone import DTYPES, build_backbone
    from uvlm.model import UnifiedVLM

    backbone = build_backbone(config.model, VOCAB_SIZE, DTYPES[config.dtype])
    model = UnifiedVLM(backbone, config.policy, config.recompute)
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    plan = TokenPlan.of(pack, config.policy, model.num_layers, config.seed)
    with LiveMemory() as live:
        live.claim("weights", model.parameters())
        before = live.now()[ALL]
        with live.phase("pass"):
            loss, *_ = model(pack, plan, torch.zeros(len(plan.supervised)))
            loss.backward()
    return live.peaks()["pass"][ALL] - before


@pytest.mark.parametrize(
    ("roles", "recompute", "dtype"),
    [
        ("dense", "none", "bf16"),
        ("dense", "none", "fp32"),
        ("dense", "selective", "bf16"),
        ("route", "none", "bf16"),
        ("route", "full", "bf16"),
        ("pyramid", "none", "bf16"),
        ("himix and hmgen", "selective", "bf16"),
    ],
)
def test_a_pass_without_data_takes_what_a_real_one_takes(roles: str, recompute: str, dtype: str) -> None:
    config, pack = a_config(policy=ROLES[roles], recompute=recompute, dtype=dtype), a_pack()
    made = trace(config, VOCAB_SIZE, [pack], "cpu")
    assert made.together == pytest.approx(real_pass(config, pack), rel=0.01)
    assert made.together <= made.activations + made.logits + made.workspace


def test_layers_that_are_alike_are_not_all_traced_and_it_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    config, pack = a_config(), a_pack()
    for device in ("cpu", "cuda"):
        few = trace(config, VOCAB_SIZE, [pack], device)
        monkeypatch.setattr("uvlm.memory_plan._ENOUGH", 100)
        assert trace(config, VOCAB_SIZE, [pack], device) == few
        monkeypatch.undo()


def test_roles_and_recomputation_save_and_the_dense_end_of_a_run_counts() -> None:
    pack = a_pack()

    def together(**changes: Any) -> int:
        return trace(a_config(**changes), VOCAB_SIZE, [pack], "cuda").together

    assert together(policy=ROLES["route"]) < together()
    assert together(recompute="full") < together(recompute="selective") < together()
    assert together(policy={**ROLES["route"], "full_tail": 0.2}) == together()


def complete(name: str, config: Config, world_size: int, **zero: Any) -> dict[str, Any]:
    tree = read_deepspeed_json(Path(name))
    tree["zero_optimization"].update(zero)
    return resolve(tree, config, world_size)


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json"])
def test_shards_shrink_with_the_ranks_and_buckets_do_not(name: str) -> None:
    config = a_config()
    shapes = Shapes([[64 * 4096] * 8, [64] * 8], [])
    one, many = (zero_memory(shapes, complete(name, config, size), size, 1) for size in (1, 8))
    assert many.optimizer == pytest.approx(one.optimizer / 8, rel=0.01)
    assert many.step_gradients < one.step_gradients
    assert many.idle_buffers == one.idle_buffers


def test_offload_moves_the_optimizer_to_the_host_and_no_byte_is_lost() -> None:
    config, shapes = a_config(), Shapes([[64 * 4096] * 8, [64] * 8], [])
    here = zero_memory(shapes, complete("zero3.json", config, 4), 4, 1)
    there = zero_memory(shapes, complete("zero3.json", config, 4, offload_optimizer={"device": "cpu"}), 4, 1)
    assert there.optimizer == there.step_gradients == 0
    assert there.host >= here.optimizer - here.update


def test_a_part_of_the_optimizer_may_stay_and_whole_gradients_of_stage_1_do() -> None:
    config, shapes = a_config(), Shapes([[64 * 4096] * 8, [64] * 8], [])
    here = zero_memory(shapes, complete("zero3.json", config, 4), 4, 2)
    offload = {"device": "cpu", "ratio": 0.25}
    part = zero_memory(shapes, complete("zero3.json", config, 4, offload_optimizer=offload), 4, 2)
    assert part.optimizer == pytest.approx(0.75 * here.optimizer, rel=0.01)
    first = zero_memory(shapes, complete("zero2.json", config, 4, stage=1, offload_optimizer={"device": "cpu"}), 4, 2)
    second = zero_memory(shapes, complete("zero2.json", config, 4, offload_optimizer={"device": "cpu"}), 4, 2)
    assert first.pass_gradients >= 2 * sum(shapes.trained) > second.pass_gradients == 0
    on_disk = zero_memory(shapes, complete("zero3.json", config, 4, offload_optimizer={"device": "nvme"}), 4, 2)
    assert on_disk.optimizer == 0
    assert on_disk.host < here.optimizer


def test_whole_weights_are_limited_in_all_and_each() -> None:
    config, shapes = a_config(), Shapes([[1000] * 8], [])
    plain = zero_memory(shapes, complete("zero3.json", config, 2), 2, 1).parameters
    limited = complete("zero3.json", config, 2, stage3_model_persistence_threshold=3000)
    assert plain - zero_memory(shapes, limited, 2, 1).parameters == 2 * 5000


def test_a_second_copy_of_the_weights_in_each_node_counts() -> None:
    config, shapes = a_config(), Shapes([[64 * 4096] * 8], [])
    plain, hpz = (zero_memory(shapes, complete(name, config, 8), 8, 1) for name in ("zero3.json", "zero3_hpz.json"))
    assert hpz.parameters - plain.parameters == 2 * 64 * 4096 * 8 // 8


def test_frozen_weights_have_neither_gradient_nor_moments() -> None:
    free, frozen = a_config(), a_config(model={**a_config().model.model_dump(), "freeze": ["model.layers.*"]})
    shapes = [shapes_of(meta_model(config, VOCAB_SIZE), config) for config in (free, frozen)]
    assert sum(shapes[0].all) == sum(shapes[1].all)
    tree = complete("zero3.json", free, 2)
    made = trace(free, VOCAB_SIZE, [a_pack()], "cpu")
    whole, part = (plan_memory(each, tree, 2, 1, made) for each in shapes)
    assert part.optimizer < whole.optimizer
    assert part.gradients < whole.gradients
    assert part.parameters == whole.parameters
