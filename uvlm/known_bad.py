"""Settings that DeepSpeed takes one by one and that fail, do nothing, or hurt together.

Each rule was run here on deepspeed 0.19.8 ("run"), or stands in the page that is named. What fails, or silently is not
what was asked for, is an error; what works but costs, or does nothing, is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from uvlm import deepspeed_schema as schema
from uvlm.config import Config
from uvlm.finding import Finding
from uvlm.zero_memory import bucket_bytes

_DEEPSPEED = "https://github.com/deepspeedai/DeepSpeed/"
_CONFIG_PAGE = "https://www.deepspeed.ai/docs/config-json/"
_ZERO = "zero_optimization."
_QUANTIZED = {
    "zero_quantized_weights": _DEEPSPEED + "issues/4852",
    "zero_quantized_nontrainable_weights": _DEEPSPEED + "issues/4885",
    "zero_quantized_gradients": _DEEPSPEED + "issues/4886",
}
# Read by the other stages only, where they change speed and memory and nothing is lost without them.
_ONLY_UNDER_3 = ("sub_group_size", "memory_efficient_linear", "leaf_module", "override_module_apply")
_NOT_UNDER_3 = (
    "allgather_bucket_size",
    "allgather_partitions",
    "ignore_unused_parameters",
    "parameter_alignment",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
)


@dataclass(frozen=True)
class Facts:
    """What the rules may look at. `tree`: a complete DeepSpeed config of a ZeRO stage from 1 to 3. `shapes`: the number
    of elements of each parameter, empty where the model could not be built. `gpu_memory`: bytes, if known."""

    config: Config
    tree: dict[str, Any]
    world_size: int
    on_gpus: bool
    ranks_per_node: int | None = None
    shapes: tuple[int, ...] = ()
    gpu_memory: float | None = None

    @property
    def zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = self.tree["zero_optimization"]
        return zero

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    def get(self, key: str) -> Any:
        """The value of a key of zero_optimization, or DeepSpeed's default."""
        section, _, name = key.rpartition(".")
        tree = self.zero.get(section, {}) if section else self.zero
        return tree[name] if name in tree else schema.default(_ZERO + key)

    def device(self, what: str) -> str:
        """Where offload_optimizer or offload_param puts it: none, cpu or nvme."""
        return str(self.get(f"offload_{what}.device"))

    @property
    def largest(self) -> int:
        return max(self.shapes, default=0)

    @property
    def hpz(self) -> int:
        return int(self.get("zero_hpz_partition_size"))

    @property
    def reduce_bytes(self) -> int:
        """Of the buffers of gradients."""
        return bucket_bytes(self.tree)


class _Rule(NamedTuple):
    level: Any
    key: str
    applies: Callable[[Facts], bool]
    sentence: Callable[[Facts], str]
    reference: str


_RULES = (
    _Rule(
        "error",
        "zero_optimization.offload_param",
        lambda f: f.stage != 3 and f.device("param") != "none",
        lambda f: f"does nothing under stage {f.stage}, where weights are whole; set stage to 3, or remove it",
        _DEEPSPEED + "issues/1403",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_optimizer.device",
        lambda f: f.stage != 3 and f.device("optimizer") == "nvme",
        lambda f: f'"nvme" keeps the state in host memory under stage {f.stage}; set stage to 3, or write "cpu"',
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_optimizer.nvme_path",
        lambda f: f.device("optimizer") == "nvme" and not f.get("offload_optimizer.nvme_path"),
        lambda f: 'is missing beside "device": "nvme"; name a folder on a local NVMe disk of each node',
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_param.nvme_path",
        lambda f: f.device("param") == "nvme" and not f.get("offload_param.nvme_path"),
        lambda f: 'is missing beside "device": "nvme"; name a folder on a local NVMe disk of each node',
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_param.buffer_size",
        lambda f: f.device("param") == "nvme" and -(-f.largest // f.world_size) > f.get("offload_param.buffer_size"),
        lambda f: (
            f"={f.get('offload_param.buffer_size'):,} is less than a rank's share of the largest weight; "
            f"set it to {-(-f.largest // f.world_size)} or more"
        ),
        _DEEPSPEED + "issues/3376",
    ),
    _Rule(
        "warning",
        "zero_optimization.offload_optimizer.device",
        lambda f: f.stage == 3 and f.device("optimizer") == "nvme",
        lambda f: '"nvme" binds the run to its number of ranks: DeepSpeed converts no such checkpoint; prefer "cpu"',
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_optimizer.ratio",
        lambda f: f.device("optimizer") != "none" and f.get("offload_optimizer.ratio") < 1 and f.stage != 3,
        lambda f: f"below 1 needs stage 3, here it is {f.stage}; set stage to 3, or ratio to 1",
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.offload_optimizer.super_offload",
        lambda f: bool(f.get("offload_optimizer.super_offload")) and (f.stage != 3 or not f.on_gpus),
        lambda f: "needs stage 3 and NVIDIA GPUs beside the host's memory; remove it",
        "run",
    ),
    _Rule(
        "error",
        "optimizer.params.torch_adam",
        lambda f: f.device("optimizer") != "none" and f.get("offload_optimizer.ratio") < 1 and torch_adam(f),
        lambda f: "cannot go with offload_optimizer.ratio below 1, which needs DeepSpeed's CPU Adam; remove torch_adam",
        "run",
    ),
    _Rule(
        "warning",
        "optimizer.params.torch_adam",
        lambda f: f.device("optimizer") != "none" and torch_adam(f),
        lambda f: "beside offload_optimizer steps on the host with PyTorch's Adam, 5 to 7 times slower; remove it",
        "https://www.deepspeed.ai/tutorials/zero-offload/",
    ),
    _Rule(
        "error",
        "zero_optimization.zero_hpz_partition_size",
        lambda f: f.stage != 3 and f.hpz > 1,
        lambda f: f"does nothing under stage {f.stage}; set stage to 3, or remove it",
        "run",
    ),
    _Rule(
        "error",
        "zero_optimization.zero_hpz_partition_size",
        lambda f: f.stage == 3 and f.hpz > 1 and f.world_size % min(f.hpz, f.world_size) != 0,
        lambda f: (
            f"={f.hpz} does not divide {f.world_size} ranks; "
            f"set it to {_divisor_below(f.world_size, f.hpz)}, or start {f.world_size // f.hpz * f.hpz} ranks"
        ),
        "run",
    ),
    _Rule(
        "warning",
        "zero_optimization.zero_hpz_partition_size",
        lambda f: bool(
            f.stage == 3
            and (group := min(f.hpz, f.world_size)) > 1
            and f.world_size % group == 0
            and f.ranks_per_node
            and f.ranks_per_node % group
        ),
        lambda f: f"={f.hpz} makes groups that cross nodes of {f.ranks_per_node} ranks; set it to {f.ranks_per_node}",
        "https://www.deepspeed.ai/tutorials/zeropp/",
    ),
    _Rule(
        "warning",
        "zero_optimization.zero_hpz_partition_size",
        lambda f: f.stage == 3 and f.hpz > 1 and (f.device("param") != "none" or f.device("optimizer") != "none"),
        lambda f: "with offloading has trained worse than without it; remove one of the two",
        _DEEPSPEED + "issues/4851",
    ),
    _Rule(
        "error",
        "gradient_predivide_factor",
        lambda f: _scatters(f) and f.tree.get("gradient_predivide_factor", 1) != 1,
        lambda f: f"is refused by DeepSpeed under stage {f.stage}; remove it",
        _DEEPSPEED + "pull/4964",
    ),
    _Rule(
        "error",
        "prescale_gradients",
        lambda f: _scatters(f) and bool(f.tree.get("prescale_gradients")),
        lambda f: f"is refused by DeepSpeed under stage {f.stage}; remove it",
        _DEEPSPEED + "pull/4964",
    ),
    _Rule(
        "error",
        "zero_optimization.allgather_bucket_size",
        lambda f: f.stage != 3 and f.get("allgather_bucket_size") % 2 == 1,
        lambda f: f"={f.get('allgather_bucket_size')} is odd, which DeepSpeed refuses; use an even number",
        "run",
    ),
    _Rule(
        "error",
        "aio.use_gds",
        lambda f: not f.on_gpus and bool(f.tree.get("aio", {}).get("use_gds")),
        lambda f: "needs GPUs; set it to false",
        "run",
    ),
    _Rule(
        "warning",
        "aio",
        lambda f: "aio" in f.tree and "nvme" not in (f.device("param"), f.device("optimizer")),
        lambda f: 'does nothing where nothing has "device": "nvme"; remove it',
        _CONFIG_PAGE,
    ),
    _Rule(
        "warning",
        "zero_force_ds_cpu_optimizer",
        lambda f: "zero_force_ds_cpu_optimizer" in f.tree,
        lambda f: "is about optimizers that a program makes itself, and does nothing here; remove it",
        _CONFIG_PAGE,
    ),
    _Rule(
        "warning",
        "communication_data_type",
        lambda f: f.tree.get("communication_data_type") == "fp16" and f.config.dtype != "fp16",
        lambda f: f"=fp16 overflows above 65,504, which dtype={f.config.dtype} does not; write fp32, or remove it",
        _CONFIG_PAGE,
    ),
    _Rule(
        "warning",
        "wall_clock_breakdown",
        lambda f: bool(f.tree.get("wall_clock_breakdown")),
        lambda f: 'waits for the GPU several times a step, and shows nothing without "log_level": "info"; remove it',
        _DEEPSPEED + "issues/2903",
    ),
    _Rule(
        "warning",
        "flops_profiler.enabled",
        lambda f: bool(f.tree.get("flops_profiler", {}).get("enabled")),
        lambda f: "times every step of the run, not only the profiled one; remove it once you have read its table",
        _DEEPSPEED + "issues/2903",
    ),
    _Rule(
        "warning",
        "zero_optimization.reduce_bucket_size",
        lambda f: bool(
            f.gpu_memory
            and f.on_gpus
            and f.shapes
            and f.reduce_bytes > 0.1 * f.gpu_memory
            and f.get("reduce_bucket_size") > 4 * sum(f.shapes)
        ),
        lambda f: (
            f"={f.get('reduce_bucket_size'):,} takes {f.reduce_bytes / 1e9:.1f} GB of each GPU for a model of "
            f'{sum(f.shapes):,} parameters; set it to {max(sum(f.shapes), 2)}, or "auto"'
        ),
        _DEEPSPEED + "issues/4875",
    ),
    _Rule(
        "warning",
        "zero_optimization.stage3_param_persistence_threshold",
        lambda f: (
            f.stage == 3
            and f.get("stage3_param_persistence_threshold")
            > schema.default(_ZERO + "stage3_param_persistence_threshold")
            and bool(f.shapes)
            and f.get("stage3_param_persistence_threshold") >= f.largest
        ),
        lambda f: (
            f"={f.get('stage3_param_persistence_threshold'):,} keeps every weight whole on every rank (the largest has "
            f"{f.largest:,} elements), as stage 2 does with less communication; set it to "
            f"{10 * f.config.model.hidden_size}"
        ),
        _CONFIG_PAGE,
    ),
    _Rule(
        "warning",
        "zero_optimization.stage3_prefetch_bucket_size",
        lambda f: f.stage == 3 and f.get("stage3_prefetch_bucket_size") > f.get("stage3_max_live_parameters"),
        lambda f: (
            f"={f.get('stage3_prefetch_bucket_size'):,} is more than stage3_max_live_parameters, which stops fetching "
            f"ahead; set it to {f.get('stage3_max_live_parameters')} or less"
        ),
        _DEEPSPEED + "issues/6420",
    ),
    _Rule(
        "error",
        "zero_optimization.stage3_module_granularity_threshold",
        lambda f: f.stage == 3 and f.get("stage3_module_granularity_threshold") > 0,
        lambda f: "lets modules hold weights that uvlm cannot fill when it starts; remove it",
        "run",
    ),
    _Rule(
        "warning",
        "zero_optimization.load_from_fp32_weights",
        lambda f: f.get("load_from_fp32_weights") is False,
        lambda f: "=false does nothing in uvlm, whose checkpoints hold the optimizer and are loaded with it; remove it",
        "run",
    ),
    _Rule(
        "warning",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        lambda f: bool(f.get("stage3_gather_16bit_weights_on_model_save")),
        lambda f: "does nothing in uvlm, which gathers one weight at a time when it writes a model; remove it",
        "https://github.com/huggingface/transformers/issues/12587",
    ),
)


def known_bad(facts: Facts) -> list[Finding]:
    """What of a complete config is known to fail or to hurt, beside its optimizer. Every rule is asked."""
    found = [
        Finding(rule.level, rule.key, _said(rule.key, rule.sentence(facts)), rule.reference)
        for rule in _RULES
        if rule.applies(facts)
    ]
    return [*found, *_quantized(facts), *_idle(facts)]


def _said(key: str, words: str) -> str:
    return f"{key}{words}" if words.startswith("=") else f"{key} {words}"


def torch_adam(facts: Facts) -> bool:
    return bool(facts.tree["optimizer"]["params"].get("torch_adam"))


def _scatters(facts: Facts) -> bool:
    return facts.stage > 1 and bool(facts.get("reduce_scatter"))


def _divisor_below(number: int, limit: int) -> int:
    return next(size for size in range(min(limit, number), 0, -1) if number % size == 0)


def _quantized(facts: Facts) -> Iterator[Finding]:
    for name, reference in _QUANTIZED.items():
        key = _ZERO + name
        if not facts.get(name):
            continue
        if facts.stage != 3:
            yield Finding(
                "error", key, f"{key} does nothing under stage {facts.stage}; set stage to 3, or remove it", "run"
            )
        elif not facts.on_gpus and name != "zero_quantized_gradients":
            yield Finding("error", key, f"{key} needs a kernel that exists for GPUs only; remove it", "run")
        else:
            words = "has been reported to crash, to give losses that are not finite, and no gain on one node"
            yield Finding("warning", key, f"{key} {words}; compare losses with and without it, or remove it", reference)


def _idle(facts: Facts) -> Iterator[Finding]:
    """Sizes and switches that the stage does not read."""
    for name in facts.zero:
        only_under_3 = name.startswith("stage3_") or name in _ONLY_UNDER_3
        if (only_under_3 and facts.stage != 3) or (name in _NOT_UNDER_3 and facts.stage == 3):
            sentence = f"{_ZERO}{name} does nothing under stage {facts.stage}; remove it"
            yield Finding("warning", _ZERO + name, sentence, _DEEPSPEED + "issues/6420")
