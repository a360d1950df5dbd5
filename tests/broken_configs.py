"""Broken DeepSpeed configs that people have run into, each with the page it is taken from and what a user must be told.

A reference of "run" is a fact that was reproduced here on deepspeed 0.19.8.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

DS = "https://github.com/deepspeedai/DeepSpeed/"
HF = "https://github.com/huggingface/"
ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


class Broken(NamedTuple):
    """`words` stand in the refusal: the key, and of the remedy. `text`: the file, as JSON or as it stands."""

    name: str
    text: str
    words: tuple[str, ...]
    reference: str
    world_size: int = 2
    overrides: tuple[str, ...] = ()


def _json(stage: Any = 3, top: dict[str, Any] | None = None, **zero: Any) -> str:
    return json.dumps({"optimizer": ADAM, "zero_optimization": {"stage": stage, **zero}, **(top or {})})


def _optimizer(name: str, **params: Any) -> str:
    return _json(top={"optimizer": {"type": name, "params": params}})


_CPU, _NVME = {"device": "cpu"}, {"device": "nvme"}

BROKEN = (
    # names
    Broken(
        "typo at the top",
        _json(top={"gradient_clipp1ng": 1}),
        ("gradient_clipp1ng", "'gradient_clipping'"),
        DS + "issues/653",
    ),
    Broken(
        "typo in zero", _json(overlap_com=True), ("overlap_com", "'zero_optimization.overlap_comm'"), DS + "issues/1809"
    ),
    Broken(
        "typo in offload",
        _json(offload_optimizer={"device": "cpu", "pin_memroy": True}),
        ("pin_memroy", "offload_optimizer.pin_memory"),
        DS + "issues/774",
    ),
    Broken(
        "typo in data_types",
        _json(top={"data_types": {"grad_acum_dtype": "fp32"}}),
        ("grad_acum_dtype", "data_types.grad_accum_dtype"),
        "run",
    ),
    Broken(
        "zero key at the top",
        _json(top={"overlap_comm": True}),
        ("'overlap_comm'", "zero_optimization.overlap_comm"),
        DS + "issues/774",
    ),
    Broken(
        "optimizer parameter typo",
        _optimizer("AdamW", torch_adam=True, bias_corection=True),
        ("bias_corection", "nearest"),
        "run",
    ),
    # types
    Broken(
        "size in quotes",
        _json(reduce_bucket_size="5e8"),
        ("reduce_bucket_size", "valid integer", "500000000"),
        HF + "accelerate/pull/2814",
    ),
    Broken(
        "fraction of an element",
        _json(stage3_prefetch_bucket_size=15099494.4),
        ("stage3_prefetch_bucket_size", "valid integer", "50000000"),
        DS + "issues/6525",
    ),
    Broken("no bucket", _json(reduce_bucket_size=0), ("reduce_bucket_size", "greater than 0"), DS + "issues/8260"),
    Broken("switch in quotes", _json(overlap_comm="true"), ("overlap_comm", "valid boolean"), DS + "issues/745"),
    Broken("stage in quotes", _json("3"), ('zero_optimization.stage="3"', "without quotes"), "run"),
    Broken("no stage 4", _json(4), ("zero_optimization.stage=4", "use 1, 2 or 3"), "run"),
    Broken(
        "zero as a switch",
        json.dumps({"zero_optimization": True}),
        ("zero_optimization must be an object",),
        DS + "issues/653",
    ),
    Broken(
        "dtype by another name",
        _json(top={"communication_data_type": "float32"}),
        ("communication_data_type", "'fp32'"),
        "run",
    ),
    Broken(
        "unknown device",
        _json(offload_param={"device": "disk"}),
        ("offload_param.device", "'nvme'"),
        DS + "issues/1403",
    ),
    # JSON
    Broken("twice", '{"zero_optimization": {"stage": 3, "stage": 2}}', ("stage twice", "keep one"), DS + "issues/653"),
    Broken("comment", '{"zero_optimization": {"stage": 3} // mine\n}', ("no comments", "remove it"), DS + "issues/653"),
    Broken("last comma", '{"zero_optimization": {"stage": 3,}}', ("not valid JSON", "comma"), "run"),
    Broken("no number", '{"zero_optimization": {"stage": NaN}}', ("NaN", "write a number"), "run"),
    Broken("Python", '{"zero_optimization": {"overlap_comm": True}}', ("true, false, null",), DS + "issues/653"),
    # auto and the YAML
    Broken(
        "auto clipping",
        _json(top={"gradient_clipping": "auto"}),
        ("gradient_clipping", "optim.gradient_clipping"),
        DS + "issues/1270",
    ),
    Broken(
        "auto batch",
        _json(top={"train_batch_size": "auto"}),
        ("train_batch_size", "data.num_rows"),
        HF + "accelerate/issues/3152",
    ),
    Broken(
        "auto elsewhere",
        _json(sub_group_size="auto"),
        ("sub_group_size", "write a value"),
        HF + "accelerate/issues/1644",
    ),
    Broken(
        "batch arithmetic",
        _json(top={"train_batch_size": 16}),
        ("train_batch_size=16", "data.num_rows"),
        DS + "issues/6914",
    ),
    Broken("learning rate", _optimizer("AdamW", lr=1e-4), ("optimizer.params.lr", "optim.learning_rate"), "run"),
    Broken(
        "max_grad_norm", _optimizer("AdamW", max_grad_norm=1.0), ("max_grad_norm", "optim.gradient_clipping"), "run"
    ),
    Broken("precision", _json(top={"bf16": {"enabled": True}}), ("bf16", "dtype='bf16'"), "run"),
    Broken("schedule", _json(top={"scheduler": {"type": "WarmupLR"}}), ("scheduler", "optim.schedule"), "run"),
    Broken(
        "rows over ranks", _json(), ("data.num_rows=4", "start 1 or 2 or 4", "data.num_rows=6"), DS + "issues/3228", 3
    ),
    Broken("half precision on a CPU", _json(), ("dtype=fp16", "use dtype=bf16"), "run", 2, ("dtype=fp16",)),
    # not for uvlm, or not any more
    Broken("MiCS", _json(mics_shard_size=2), ("mics_shard_size", "Remove it"), DS + "issues/4671"),
    Broken("elasticity", _json(top={"elasticity": {"enabled": True}}), ("elasticity", "Remove it"), DS + "issues/8489"),
    Broken(
        "curriculum",
        _json(top={"curriculum_learning": {"enabled": True}}),
        ("curriculum_learning", "Remove it"),
        DS + "issues/8489",
    ),
    Broken("random-LTD", _json(top={"data_efficiency": {"enabled": True}}), ("data_efficiency", "policy"), "run"),
    Broken(
        "activation checkpointing",
        _json(top={"activation_checkpointing": {"partition_activations": True}}),
        ("activation_checkpointing", "recompute"),
        DS + "issues/5704",
    ),
    Broken("monitor", _json(top={"tensorboard": {"enabled": True}}), ("tensorboard", "metrics.jsonl"), "run"),
    Broken("autotuner", _json(top={"autotuning": {"enabled": True}}), ("autotuning", "uvlm tune"), "run"),
    Broken(
        "writer", _json(top={"checkpoint": {"writer": {"type": "fast"}}}), ("checkpoint.writer", "remove it"), "run"
    ),
    Broken("ZenFlow", _json(2, zenflow={"topk_ratio": 0.1}), ("zenflow", "remove it"), "run"),
    Broken(
        "an update in each micro-step",
        _json(top={"managed_gradient_accumulation": False}),
        ("managed_gradient_accumulation", "remove it"),
        "run",
    ),
    Broken("old offload", _json(2, cpu_offload=True), ("cpu_offload", "offload_optimizer"), DS + "issues/745"),
    Broken(
        "sum of gradients",
        _json(2, top={"gradient_allreduce_op": "sum"}),
        ("gradient_allreduce_op", "mean"),
        DS + "pull/8232",
    ),
    # together
    Broken(
        "weights off a GPU that holds them",
        _json(2, offload_param=_CPU),
        ("offload_param", "set stage to 3"),
        DS + "issues/1403",
    ),
    Broken("NVMe without a folder", _json(offload_optimizer=_NVME), ("nvme_path", "name a folder"), "run"),
    Broken(
        "weights on NVMe without a folder",
        _json(offload_param=_NVME),
        ("offload_param.nvme_path", "name a folder"),
        DS + "issues/3376",
    ),
    Broken(
        "NVMe under stage 2",
        _json(2, offload_optimizer={**_NVME, "nvme_path": "/nvme"}),
        ("offload_optimizer.device", "set stage to 3"),
        "run",
    ),
    Broken(
        "hpZ over 3 ranks", _json(zero_hpz_partition_size=2), ("zero_hpz_partition_size=2", "set it to 1"), "run", 3
    ),
    Broken(
        "hpZ under stage 2", _json(2, zero_hpz_partition_size=2), ("zero_hpz_partition_size", "set stage to 3"), "run"
    ),
    Broken(
        "quantized on a CPU",
        _json(zero_quantized_weights=True),
        ("zero_quantized_weights", "remove it"),
        DS + "issues/4852",
    ),
    Broken(
        "quantized under stage 2",
        _json(2, zero_quantized_gradients=True),
        ("zero_quantized_gradients", "stage to 3"),
        "run",
    ),
    Broken(
        "pre-division",
        _json(top={"gradient_predivide_factor": 2.0}),
        ("gradient_predivide_factor", "remove it"),
        DS + "pull/4964",
    ),
    Broken(
        "pre-scaling", _json(2, top={"prescale_gradients": True}), ("prescale_gradients", "remove it"), DS + "pull/2523"
    ),
    Broken("odd bucket", _json(2, allgather_bucket_size=1001), ("allgather_bucket_size=1001", "even number"), "run"),
    Broken(
        "part of the offload", _json(2, offload_optimizer={**_CPU, "ratio": 0.5}), ("ratio", "set stage to 3"), "run"
    ),
    Broken(
        "coarse modules",
        _json(stage3_module_granularity_threshold=1000000),
        ("stage3_module_granularity_threshold", "remove it"),
        "run",
    ),
    Broken("1-bit Adam", _optimizer("OneBitAdam"), ("optimizer.type='OneBitAdam'", "use Adam"), DS + "issues/5046"),
    Broken("an optimizer without betas", _optimizer("SGD"), ("optimizer.type='SGD'", "use AdamW"), "run"),
    Broken(
        "untested optimizer",
        _optimizer("NAdam"),
        ("optimizer.type='NAdam'", "zero_allow_untested_optimizer"),
        DS + "pull/161",
    ),
    Broken("Lamb", _optimizer("Lamb"), ("optimizer.type='Lamb'", "use AdamW"), DS + "issues/1217"),
    Broken(
        "Lion", _optimizer("Lion"), ("takes no eps", "use AdamW"), "https://github.com/EleutherAI/gpt-neox/pull/1166"
    ),
)
