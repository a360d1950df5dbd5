"""The DeepSpeed JSON of a run: what the user tunes, joined with what the YAML owns. DeepSpeed is not imported here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uvlm.config import Config

_OWNED_BY_YAML = {
    "train_batch_size": "data.num_rows",
    "train_micro_batch_size_per_gpu": "data.num_rows",
    "gradient_accumulation_steps": "data.num_rows",
    "gradient_clipping": "optim.gradient_clipping",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "fp16": "dtype",
    "scheduler": "optim.schedule",
}
# These would go around what writes and checks checkpoints, or put them where only one node sees them.
_OWN_WRITING = (
    "checkpoint.writer",
    "checkpoint.use_node_local_storage",
    "checkpoint.load_universal",
    "datastates_ckpt",
)
_OWNED_OPTIMIZER_PARAMS = {
    "lr": "optim.learning_rate",
    "betas": "optim.betas",
    "eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The user's JSON, by path or by its name in the shipped ds_configs/. ValueError with the remedy."""
    import uvlm

    package = Path(uvlm.__file__).parent
    shipped = [package / "ds_configs" / path, package.parent / "ds_configs" / path]
    is_plain_name = path == Path(path.name)  # a mistyped path must not silently become a file of ours
    for candidate in [path, *shipped] if is_plain_name else [path]:
        if candidate.is_file():
            break
    else:
        raise ValueError(f"there is no DeepSpeed JSON {path}; give a path, or a name in ds_configs/ such as zero3.json")
    try:
        tree = json.loads(candidate.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{candidate} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{candidate} holds no JSON object; see ds_configs/zero3.json")
    return tree


def resolve(tree: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed config of a run.

    "auto" becomes the usual function of the hidden size h: reduce bucket h^2, prefetch bucket 0.9 h^2, persistence
    threshold 10 h (as in the Hugging Face integration of DeepSpeed).

    Raises:
        ValueError: a key that the YAML owns stands in the JSON; both values are named.
    """
    resolved: dict[str, Any] = json.loads(json.dumps(tree))
    yaml_tree = config.model_dump(mode="json")
    for key, owner in _OWNED_BY_YAML.items():
        if key in resolved:
            raise ValueError(_clash(key, resolved[key], owner, yaml_tree))
    for section in ("optimizer", "checkpoint", "zero_optimization"):
        if not isinstance(resolved.get(section, {}), dict):
            raise ValueError(f"{section} must be an object of keys and values; see ds_configs/zero3.json")
    for key in _OWN_WRITING:
        section, _, name = key.partition(".")
        if key in resolved or (name and name in resolved.get(section, {})):
            raise ValueError(f"the DeepSpeed JSON sets {key}, but uvlm writes and converts checkpoints; remove it")
    optimizer = resolved.setdefault("optimizer", {"type": "AdamW"})
    params = optimizer.setdefault("params", {})
    for key, owner in _OWNED_OPTIMIZER_PARAMS.items():
        if key in params:
            raise ValueError(_clash(f"optimizer.params.{key}", params[key], owner, yaml_tree))
    params.update(
        lr=config.optim.learning_rate,
        betas=list(config.optim.betas),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    hidden = config.model.hidden_size
    automatic = {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    zero = resolved.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage={zero.get('stage', 0)!r} is not supported; use 1, 2 or 3")
    zero.update({key: automatic[key] for key, value in zero.items() if value == "auto" and key in automatic})
    if left := _keys_of_auto(resolved):
        raise ValueError(f'{left[0]}: "auto" is not allowed here; write a value')
    resolved["train_micro_batch_size_per_gpu"] = 1
    resolved["gradient_accumulation_steps"] = config.data.num_rows // world_size
    resolved["gradient_clipping"] = config.optim.gradient_clipping
    for dtype in ("bf16", "fp16"):
        resolved[dtype] = {"enabled": config.dtype == dtype}
    return resolved


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage of a complete DeepSpeed config."""
    return int(tree["zero_optimization"]["stage"])


def _keys_of_auto(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = [prefix + key for key, value in tree.items() if value == "auto"]
    for key, value in tree.items():
        if isinstance(value, dict):
            keys += _keys_of_auto(value, f"{prefix}{key}.")
    return keys


def _clash(key: str, value: Any, owner: str, yaml_tree: dict[str, Any]) -> str:
    for part in owner.split("."):
        yaml_tree = yaml_tree[part]
    return (
        f"the DeepSpeed JSON sets {key}={value!r}, the YAML owns it as {owner}={yaml_tree!r}; remove it from the JSON"
    )
