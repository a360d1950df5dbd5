"""The second door to DeepSpeed: which keys its JSON may hold, of which type, with which default.

Asked of the installed version, because keys come and go: 0.19 removed eleven blocks that 0.18 had. Most sections are
pydantic models; of what DeepSpeed reads by hand the names are listed here and the defaults are taken from its modules.
Needs no process group and no GPU. Importing DeepSpeed costs 0.15 s beside what torch and transformers take (run).
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError

_Precision = Literal["fp16", "bf16", "fp32"]
# Keys at the top that DeepSpeed reads one by one: the type, and the name of the default in its runtime/constants.py.
_TOP: dict[str, tuple[Any, str]] = {
    "train_batch_size": (int, "TRAIN_BATCH_SIZE_DEFAULT"),
    "train_micro_batch_size_per_gpu": (int, "TRAIN_MICRO_BATCH_SIZE_PER_GPU_DEFAULT"),
    "gradient_accumulation_steps": (int, "GRADIENT_ACCUMULATION_STEPS_DEFAULT"),
    "managed_gradient_accumulation": (bool, "MANAGED_GRADIENT_ACCUMULATION_DEFAULT"),
    "gradient_clipping": (float, "GRADIENT_CLIPPING_DEFAULT"),
    "gradient_allreduce_op": (Literal["mean", "sum"], "GRADIENT_ALLREDUCE_OP_DEFAULT"),
    "gradient_predivide_factor": (float, "GRADIENT_PREDIVIDE_FACTOR_DEFAULT"),
    "prescale_gradients": (bool, "PRESCALE_GRADIENTS_DEFAULT"),
    "communication_data_type": (_Precision, "COMMUNICATION_DATA_TYPE_DEFAULT"),
    "seq_parallel_communication_data_type": (_Precision, "SEQ_PARALLEL_COMMUNICATION_DATA_TYPE_DEFAULT"),
    "disable_allgather": (bool, "DISABLE_ALLGATHER_DEFAULT"),
    "disable_python_gc": (bool, "DISABLE_PYTHON_GC_DEFAULT"),
    "dataloader_drop_last": (bool, "DATALOADER_DROP_LAST_DEFAULT"),
    "dump_state": (bool, "DUMP_STATE_DEFAULT"),
    "log_level": (Literal["debug", "info", "warning", "error", "critical"], "LOG_LEVEL_DEFAULT"),
    "memory_breakdown": (bool, "MEMORY_BREAKDOWN_DEFAULT"),
    "steps_per_print": (int, "STEPS_PER_PRINT_DEFAULT"),
    "use_data_before_expert_parallelism": (bool, "USE_DATA_BEFORE_EXPERT_PARALLEL_DEFAULT"),
    "vocabulary_size": (int, "VOCABULARY_SIZE_DEFAULT"),
    "wall_clock_breakdown": (bool, "WALL_CLOCK_BREAKDOWN_DEFAULT"),
    "zero_allow_untested_optimizer": (bool, "ZERO_ALLOW_UNTESTED_OPTIMIZER_DEFAULT"),
    "zero_force_ds_cpu_optimizer": (bool, "ZERO_FORCE_DS_CPU_OPTIMIZER_DEFAULT"),
    "data_types.grad_accum_dtype": (_Precision, "GRAD_ACCUM_DTYPE_DEFAULT"),
    "data_types.param_dtype": (_Precision, "PARAM_DTYPE_DEFAULT"),
    "data_types.buffer_dtype": (_Precision, "BUFFER_DTYPE_DEFAULT"),
    "data_types.keep_in_fp32_modules": (list[str], "KEEP_IN_FP32_MODULES_DEFAULT"),
    "checkpoint.tag_validation": (Literal["Ignore", "Warn", "Fail"], "CHECKPOINT_TAG_VALIDATION_DEFAULT"),
    "checkpoint.load_universal": (bool, "LOAD_UNIVERSAL_CHECKPOINT_DEFAULT"),
    "checkpoint.use_node_local_storage": (bool, "USE_NODE_LOCAL_STORAGE_CHECKPOINT_DEFAULT"),
    "checkpoint.parallel_write": (dict[str, Any], ""),
    "checkpoint.checkpoint_serialization": (bool, ""),
    "checkpoint.writer": (dict[str, Any], ""),
    "optimizer.type": (str, "OPTIMIZER_TYPE_DEFAULT"),
    "optimizer.params": (dict[str, Any], ""),
    "optimizer.legacy_fusion": (bool, "LEGACY_FUSION_DEFAULT"),
    "scheduler.type": (str, "SCHEDULER_TYPE_DEFAULT"),
    "scheduler.params": (dict[str, Any], ""),
    "torch_autocast.enabled": (bool, "TORCH_AUTOCAST_ENABLED_DEFAULT"),
    "torch_autocast.dtype": (str, ""),
    "torch_autocast.lower_precision_safe_modules": (list[str], ""),
}
# Blocks whose inside no run of ours uses: known by name, so that they are refused with a reason, not as typos.
_CLOSED_BLOCKS = (
    "autotuning",
    "bfloat16",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
)


class _Field(NamedTuple):
    annotation: Any
    default: Any


def known_keys(section: str = "") -> list[str]:
    """Names of the keys of a section by its dotted path, "" for the top. Empty where it is none, or takes any key."""
    prefix = f"{section}." if section else ""
    names = (path.removeprefix(prefix).partition(".")[0] for path in _fields() if path.startswith(prefix))
    return list(dict.fromkeys(names))


def is_section(path: str) -> bool:
    """Whether a dotted path holds keys of its own that are known."""
    return any(other.startswith(f"{path}.") for other in _fields())


def default(path: str) -> Any:
    """DeepSpeed's default of a key by its dotted path, as plain values; None for a section or where there is none."""
    field = _fields().get(path)
    return field and field.default


def type_error(path: str, value: Any) -> str | None:
    """A clause such as "input should be a valid integer" where a value of the JSON has the wrong type or range.

    A number in quotes is not taken for a number, nor 0 and 1 for false and true: what DeepSpeed makes of these differs
    from key to key.
    """
    field = _fields().get(path)
    if field is None:
        return None
    try:
        TypeAdapter(field.annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        message = str(error.errors()[0]["msg"])
        return message[0].lower() + message[1:]
    return None


def removed(path: str) -> str | None:
    """What DeepSpeed says of a key that an older version had."""
    _prepare()
    from deepspeed.runtime import config

    section, _, name = path.rpartition(".")
    tables = {"": config._REMOVED_TOP_LEVEL_CONFIG_KEYS, "zero_optimization": config._REMOVED_ZERO_CONFIG_KEYS}
    message = tables.get(section, {}).get(name)
    return message and " ".join(message.split())


def optimizer_types() -> list[str]:
    """The types that `optimizer.type` may name: DeepSpeed's own in small letters, and the classes of torch.optim."""
    _prepare()
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    classes = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and name != "Optimizer"]
    return [*DEEPSPEED_OPTIMIZERS, *classes]


def optimizer_params(name: str, *, torch_adam: bool, on_host: bool) -> list[str] | None:
    """What `optimizer.params` may hold for a type, from the signature of the class that DeepSpeed would make.

    None where that class is not known without building it. `on_host`: the optimizer is offloaded.
    """
    _prepare()
    from deepspeed.ops import adagrad, adam, lion
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    switches: tuple[str, ...] = ()
    if name.lower() in ("adam", "adamw"):
        kind: Any = torch.optim.AdamW if torch_adam else adam.DeepSpeedCPUAdam if on_host else adam.FusedAdam
        switches = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
    elif name.lower() == "adagrad":
        kind = adagrad.DeepSpeedCPUAdagrad if on_host else torch.optim.Adagrad
    elif name.lower() == "lion":
        kind = lion.DeepSpeedCPULion if on_host else lion.FusedLion
    elif name.lower() in DEEPSPEED_OPTIMIZERS:
        kind = None
    else:
        kind = getattr(torch.optim, name, None)
    if kind is None:
        return None
    return [*switches, *list(inspect.signature(kind.__init__).parameters)[2:]]  # without self and the parameters


@cache
def _fields() -> dict[str, _Field]:
    """Every key that is no section, by its dotted path."""
    _prepare()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "zero_optimization.": DeepSpeedZeroConfig,
        "bf16.": DeepSpeedBF16Config,
        "fp16.": DeepSpeedFP16Config,
        "comms_logger.": CommsLoggerConfig,
        "compile.": CompileConfig,
        "hybrid_engine.": HybridEngineConfig,
        "timers.throughput.": DeepSpeedThroughputTimerConfig,
        "weight_quantization.": WeightQuantConfig,
        "": DeepSpeedMonitorConfig,
    }
    by_hand = {
        "activation_checkpointing.": ACT_CHKPT_DEFAULT,
        "aio.": AIO_DEFAULT_DICT,
        "flops_profiler.": vars(DeepSpeedFlopsProfilerConfig({})),
    }
    fields = {path: _Field(kind, getattr(constants, name, None)) for path, (kind, name) in _TOP.items()}
    fields |= {path: _Field(Any, None) for path in _CLOSED_BLOCKS}
    for prefix, defaults in by_hand.items():
        for name, value in defaults.items():
            fields[prefix + name] = _Field(Any if value is None else type(value), value)
    for prefix, model in models.items():
        fields |= dict(_of_model(model, prefix))
    return fields


def _of_model(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, _Field]]:
    for name, info in model.model_fields.items():
        path = prefix + (info.alias or name)
        if inner := _model_inside(info.annotation):
            yield from _of_model(inner, f"{path}.")
        else:
            value = info.get_default(call_default_factory=True)
            plain = int(value) if type(value) is not bool and isinstance(value, int) else value  # a printing subclass
            yield path, _Field(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation, plain)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, which may be optional."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for kind in typing.get_args(annotation) if is_union else (annotation,):
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            return kind
    return None


def _prepare() -> None:
    """Import DeepSpeed, which looks for an accelerator then and remembers it. What it is told must not reach what this
    process starts: a job on GPUs, say."""
    if "deepspeed" in sys.modules or "DS_ACCELERATOR" in os.environ:
        return
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        importlib.import_module("deepspeed")
    finally:
        del os.environ["DS_ACCELERATOR"]
