"""The DeepSpeed JSON of a run: what the user tunes, joined with what the YAML owns.

DeepSpeed itself takes unknown keys at the top without a word, so each key and value is held against what the installed
version knows (deepspeed_schema). What would go around uvlm, or do nothing in it, is refused with a reason.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uvlm import deepspeed_schema as schema
from uvlm.config import Config
from uvlm.deepspeed_refused import REFUSED
from uvlm.finding import Finding, refuse

OWNED_BY_YAML = {
    "train_batch_size": "data.num_rows",
    "train_micro_batch_size_per_gpu": "data.num_rows",
    "gradient_accumulation_steps": "data.num_rows",
    "gradient_clipping": "optim.gradient_clipping",
    "bf16": "dtype",
    "bfloat16": "dtype",
    "fp16": "dtype",
    "torch_autocast": "dtype",
    "data_types.param_dtype": "dtype",
    "scheduler": "optim.schedule",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.max_grad_norm": "optim.gradient_clipping",
}
# These would go around what writes and checks checkpoints, or put them where only one node sees them.
_OWN_WRITING = (
    "checkpoint.writer",
    "checkpoint.checkpoint_serialization",
    "checkpoint.parallel_write",
    "checkpoint.use_node_local_storage",
    "checkpoint.load_universal",
    "datastates_ckpt",
)
AUTOMATIC = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
_KEYS_PAGE = "https://www.deepspeed.ai/docs/config-json/"
_AUTO_THREAD = "https://github.com/huggingface/accelerate/issues/3152"


def find_json(path: Path) -> Path:
    """The user's file, by path or by its name in the shipped ds_configs/. ValueError where there is none."""
    import uvlm

    package = Path(uvlm.__file__).parent
    shipped = [package / "ds_configs" / path, package.parent / "ds_configs" / path]
    is_plain_name = path == Path(path.name)  # a mistyped path must not silently become a file of ours
    for candidate in [path, *shipped] if is_plain_name else [path]:
        if candidate.is_file():
            return candidate
    raise ValueError(f"there is no DeepSpeed JSON {path}; give a path, or a name in ds_configs/ such as zero3.json")


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The user's JSON as it stands, but 5e8 is the whole number that it means. ValueError with the remedy."""
    path = find_json(path)
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; save it as UTF-8") from None
    twice: list[str] = []
    strange: list[str] = []
    try:
        tree = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, twice),
            parse_float=_number,
            parse_constant=strange.append,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}{_hint(text, error.pos)}") from None
    except RecursionError:
        raise ValueError(f"{path} is no DeepSpeed JSON: it is nested too deeply; see ds_configs/zero3.json") from None
    if twice:  # json, as DeepSpeed's own reader of a dict, would take the last one
        raise ValueError(f"{path} sets {', '.join(dict.fromkeys(twice))} twice; keep one of them")
    if strange:
        raise ValueError(f"{path} holds {', '.join(strange)}, which is no number of JSON; write a number")
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no JSON object; see ds_configs/zero3.json")
    return tree


def find_faults(tree: dict[str, Any], yaml_tree: dict[str, Any]) -> list[Finding]:
    """Every key of the user's JSON that is unknown, of the wrong type, the YAML's, or of no use to uvlm.

    Args:
        yaml_tree: the config as plain values; where it has faults of its own, as it stands in the YAML.
    """
    findings = list(_faults(tree, "", yaml_tree))
    zero = tree.get("zero_optimization", {})
    if isinstance(zero, dict) and not _is_stage(stage := zero.get("stage", 0)):
        key = "zero_optimization.stage"
        said = f"={json.dumps(stage)} is not supported" if "stage" in zero else " is missing"
        findings.append(Finding("error", key, f"{key}{said}; use 1, 2 or 3, without quotes", _KEYS_PAGE))
    return findings


def resolve(tree: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed config of a run. ValueError with every fault of the user's JSON."""
    refuse(find_faults(tree, config.model_dump(mode="json")))
    return complete(tree, config, world_size)


def complete(tree: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """Join a JSON without faults with what the YAML owns; "auto" becomes the number that it stands for."""
    resolved: dict[str, Any] = json.loads(json.dumps(tree))
    params = resolved.setdefault("optimizer", {}).setdefault("params", {})
    resolved["optimizer"].setdefault("type", "AdamW")
    params.update(
        lr=config.optim.learning_rate,
        betas=list(config.optim.betas),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    zero = resolved.setdefault("zero_optimization", {})
    for name, value in automatic_sizes(config.model.hidden_size).items():
        if zero.get(name) == "auto":
            zero[name] = value
    resolved["train_micro_batch_size_per_gpu"] = 1
    resolved["gradient_accumulation_steps"] = config.data.num_rows // world_size
    resolved["gradient_clipping"] = config.optim.gradient_clipping
    for dtype in ("bf16", "fp16"):
        resolved[dtype] = {"enabled": config.dtype == dtype}
    return resolved


def automatic_sizes(hidden_size: int) -> dict[str, int]:
    """What "auto" stands for, by the name of the key: the usual function of the hidden size h, reduce bucket h^2,
    prefetch bucket 0.9 h^2, persistence threshold 10 h (as in the Hugging Face integration of DeepSpeed)."""
    values = (hidden_size * hidden_size, int(0.9 * hidden_size * hidden_size), 10 * hidden_size)
    return {path.rpartition(".")[2]: value for path, value in zip(AUTOMATIC, values, strict=True)}


def without(tree: dict[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """A copy of the JSON without the keys that have faults, so that the rest can be looked at."""
    copy: dict[str, Any] = json.loads(json.dumps(tree))
    for finding in findings:
        section: Any = copy
        *parents, last = finding.key.split(".")
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    return copy


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage of a complete DeepSpeed config."""
    return int(tree["zero_optimization"]["stage"])


def _faults(tree: dict[str, Any], prefix: str, yaml_tree: dict[str, Any]) -> Iterator[Finding]:
    known = schema.known_keys(prefix.removesuffix("."))
    for name, value in tree.items():
        key = prefix + name
        if "." in name:
            section, _, inner = name.partition(".")
            sentence = f"the DeepSpeed JSON has the key {name!r}, which it never reads; write "
            yield Finding("error", key, sentence + json.dumps({section: {inner: value}}))
        elif owner := OWNED_BY_YAML.get(key):
            yield Finding("error", key, _clash(key, value, owner, yaml_tree))
        elif key in _OWN_WRITING:
            sentence = f"the DeepSpeed JSON sets {key}, but uvlm writes and converts checkpoints; remove it"
            yield Finding("error", key, sentence)
        elif key in REFUSED:
            reason, reference = REFUSED[key]
            yield Finding("error", key, f"the DeepSpeed JSON sets {key}: {reason}", reference)
        elif message := schema.removed(key):
            reference = "https://github.com/deepspeedai/DeepSpeed/issues/8489"
            yield Finding("error", key, f"{key}: {message} Remove it from the JSON", reference)
        elif known and name not in known:
            sentence = f"unknown key {key!r} in the DeepSpeed JSON; the nearest known one is {_nearest(key)!r}"
            yield Finding("error", key, sentence, "https://github.com/deepspeedai/DeepSpeed/issues/653")
        elif schema.is_section(key) or key == "optimizer.params":
            if isinstance(value, dict):
                yield from _faults(value, f"{key}.", yaml_tree)
            else:
                sentence = f"{key} must be an object of keys and values; see ds_configs/zero3.json"
                yield Finding("error", key, sentence, _KEYS_PAGE)
        elif value == "auto":
            if key not in AUTOMATIC:
                yield Finding("error", key, f'{key}: "auto" is not allowed here; write a value', _AUTO_THREAD)
        elif key != "zero_optimization.stage" and (message := schema.type_error(key, value)):
            given = schema.default(key)
            remedy = "write another value" if given is None else f"DeepSpeed's default is {json.dumps(given)}"
            reference = "https://github.com/deepspeedai/DeepSpeed/issues/6525"
            yield Finding("error", key, f"{key}={json.dumps(value)}: {message}; {remedy}", reference)


def _nearest(key: str) -> str:
    """The known key that was meant: the one whose name reads most like it, of its own section where two do."""
    section, _, name = key.rpartition(".")
    places = [section, "zero_optimization", "zero_optimization.offload_optimizer", "optimizer", "data_types", ""]
    paths = [
        f"{place}.{known}" if place else known for place in dict.fromkeys(places) for known in schema.known_keys(place)
    ]
    return max(paths, key=lambda path: difflib.SequenceMatcher(None, name, path.rpartition(".")[2]).ratio())


def _is_stage(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value in (1, 2, 3)


def _unique(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            twice.append(key)
        tree[key] = value
    return tree


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _hint(text: str, position: int) -> str:
    """A remedy for what people write into JSON that it does not allow."""
    rest, before = text[position:].lstrip(), text[:position].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments, remove it"
    if rest.startswith(("}", "]")) and before.endswith(","):
        return "; remove the comma before it"
    if rest.startswith(("True", "False", "None", "'")):
        return "; JSON writes true, false, null and double quotes"
    return ""


def _clash(key: str, value: Any, owner: str, yaml_tree: dict[str, Any]) -> str:
    owned: Any = yaml_tree
    for part in owner.split("."):
        owned = owned.get(part) if isinstance(owned, dict) else None
    return f"the DeepSpeed JSON sets {key}={value!r}, the YAML owns it as {owner}={owned!r}; remove it from the JSON"
