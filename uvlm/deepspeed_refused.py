"""Keys that DeepSpeed knows and uvlm cannot use: what is wrong with each, with a remedy, and where to read about it.

"run" is for what was reproduced here; no page, for what follows from how uvlm is built.
"""

from __future__ import annotations

_MONITOR = (
    "DeepSpeed's own monitor logs a learning rate and, since 0.18.3, no loss; remove it, uvlm writes tensorboard/ and "
    "metrics.jsonl of the run folder",
    "run",
)
_ONE_DIMENSION = ("uvlm shards by ZeRO alone; remove it", "")
_OLD_OFFLOAD = (
    "DeepSpeed has replaced it; write offload_{} as an object with a device, as in ds_configs/zero3_offload.json"
)
_CONFIG_PAGE = "https://www.deepspeed.ai/docs/config-json/"

# key -> (reason and remedy, reference)
REFUSED: dict[str, tuple[str, str]] = {
    "activation_checkpointing": (
        "it does nothing unless a model calls DeepSpeed's own function; set recompute in the YAML, and remove it",
        "https://github.com/deepspeedai/DeepSpeed/issues/5704",
    ),
    "autotuning": (
        "it is for DeepSpeed's launcher, which uvlm does not use; remove it and run `uvlm tune`",
        "https://www.deepspeed.ai/tutorials/autotuning/",
    ),
    "compile": ("uvlm does not compile the engine, so it would do nothing; remove it", ""),
    "comet": _MONITOR,
    "csv_monitor": _MONITOR,
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "data_efficiency": (
        "its curriculum needs DeepSpeed's loader, its random-LTD gathers neither position ids nor cu_seqlens; remove "
        "it, and use policy and the weights of data.train in the YAML",
        "https://www.deepspeed.ai/tutorials/data-efficiency/",
    ),
    "data_types.buffer_dtype": (
        "it would round the rotary positions, which stay fp32; remove it",
        _CONFIG_PAGE,
    ),
    "dataloader_drop_last": ("uvlm has its own loader, so it would do nothing; remove it", ""),
    "expert_parallel": _ONE_DIMENSION,
    "gradient_allreduce_op": (
        "uvlm's loss counts on the mean over ranks; remove it",
        "https://github.com/deepspeedai/DeepSpeed/pull/8232",
    ),
    "hybrid_engine": ("it generates text inside training, which uvlm does by itself; remove it", ""),
    "disable_allgather": ("DeepSpeed reads it and does nothing with it; remove it", "run"),
    "managed_gradient_accumulation": ("false would update the weights after each micro-step; remove it", "run"),
    "pipeline": _ONE_DIMENSION,
    "sequence_parallel_size": _ONE_DIMENSION,
    "seq_parallel_communication_data_type": _ONE_DIMENSION,
    "tensor_parallel": _ONE_DIMENSION,
    "use_data_before_expert_parallelism": _ONE_DIMENSION,
    "vocabulary_size": ("DeepSpeed only looks at whether it is a multiple of 8; remove it", _CONFIG_PAGE),
    "weight_quantization": ("it is for inference; remove it", ""),
    "zero_optimization.compute_grad_norm": (
        "uvlm clips by the norm and logs it; remove it",
        "https://www.deepspeed.ai/docs/config-json/",
    ),
    "zero_optimization.cpu_offload": (_OLD_OFFLOAD.format("optimizer"), _CONFIG_PAGE),
    "zero_optimization.cpu_offload_param": (_OLD_OFFLOAD.format("param"), _CONFIG_PAGE),
    "zero_optimization.cpu_offload_use_pin_memory": (
        "DeepSpeed has replaced it; write pin_memory inside offload_optimizer and offload_param",
        _CONFIG_PAGE,
    ),
    "zero_optimization.elastic_checkpoint": (
        "DeepSpeed has given it up; remove it, uvlm resumes on another number of ranks by itself",
        _CONFIG_PAGE,
    ),
    "zero_optimization.legacy_stage1": ("DeepSpeed raises where it is set; remove it", "run"),
    "zero_optimization.pipeline_loading_checkpoint": ("uvlm loads weights by itself; remove it", ""),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "uvlm gathers one weight at a time when it writes a model; remove it",
        "https://github.com/huggingface/transformers/issues/12587",
    ),
    "zero_optimization.zenflow": (
        "it updates weights steps late, and its losses were not finite from the first step on a CPU; remove it",
        "run",
    ),
}
