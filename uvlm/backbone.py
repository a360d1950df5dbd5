"""The backbone: an ordinary `transformers` causal language model, from a configuration or from a pretrained folder."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import AfterValidator, Field, model_validator
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from uvlm.strict import Strict

# Families whose decoder layer is the one that model.py runs: pre-norm, rotary grouped-query attention, gated FFN.
# Another one of this shape comes in by its name here; test_model.py then holds it against transformers' own forward
# pass.
Family = Literal["llama", "qwen2", "qwen3"]
_FROM_FOLDER = {
    "family": "model_type",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
}


class ModelConfig(Strict):
    """The backbone. `pretrained` alone is enough; without it the sizes are. Names are the field's."""

    pretrained: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        default=None, description="Hugging Face folder to start from; the sizes below are then read from it"
    )
    family: Family = "qwen3"
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the gated FFN")
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    tie_embeddings: bool = True
    rope_theta: float = Field(
        default=10_000.0, description="of a fresh model; a pretrained one brings its own rotation"
    )
    max_position: int = Field(default=4096, description="longest document the exported model claims to handle")

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_folder(cls, tree: Any) -> Any:
        """Fill in what the folder's config.json says; a size that contradicts it is an error with both values."""
        if not isinstance(tree, dict) or not tree.get("pretrained"):
            return tree
        folder = Path(str(tree["pretrained"]))
        if not (folder / "config.json").is_file():
            if {name for name, field in cls.model_fields.items() if field.is_required()} <= set(tree):
                return tree  # a resolved config of a finished run reads without its starting point
            raise ValueError(f"{folder} has no config.json; give the folder of a Hugging Face model")
        read = _read_sizes(folder)
        for name, value in read.items():
            if tree.get(name, value) != value:
                raise ValueError(f"{name}={tree[name]!r}, but {folder} has {value!r}; remove {name} from the config")
        return {**read, **tree}


def _read_sizes(folder: Path) -> dict[str, Any]:
    try:
        found = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises what its checks of each family raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}/config.json is not that of a Hugging Face language model: {reason}") from None
    if found.model_type not in get_args(Family):
        raise ValueError(f"{folder} holds a {found.model_type} model; the families are {', '.join(get_args(Family))}")
    sizes: dict[str, Any] = {name: getattr(found, theirs, None) for name, theirs in _FROM_FOLDER.items()}
    sizes["num_kv_heads"] = sizes["num_kv_heads"] or sizes["num_heads"]
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // max(1, sizes["num_heads"])
    return sizes


def build_backbone(config: ModelConfig, vocab_size: int) -> PreTrainedModel:
    """An fp32 backbone of at least `vocab_size` words: the pretrained one, or a fresh one seeded by
    `torch.manual_seed`.

    Under `torch.device("meta")` no weight is read or made. A pretrained vocabulary grows at its end; the new rows are
    drawn around the mean of the old ones, as `transformers` does it.

    Raises:
        ValueError: heads that do not divide, or a pretrained folder that cannot be read.
    """
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.num_heads={config.num_heads} does not divide over model.num_kv_heads={config.num_kv_heads} groups; "
            f"use num_kv_heads={config.num_heads}"
        )
    if config.pretrained is None:
        return AutoModelForCausalLM.from_config(_fresh_config(config, vocab_size), dtype=torch.float32)
    try:
        if torch.empty(0).device.type == "meta":
            hf_config = AutoConfig.from_pretrained(config.pretrained)
            hf_config.vocab_size = max(vocab_size, hf_config.vocab_size)
            return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        model, report = AutoModelForCausalLM.from_pretrained(
            config.pretrained, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.pretrained={config.pretrained} cannot be read; it needs the weights of its config.json as "
            f"safetensors ({reason})"
        ) from error
    if missing := sorted(report["missing_keys"]):  # they would be drawn at random
        raise ValueError(f"model.pretrained={config.pretrained} lacks {len(missing)} of its weights: {missing[0]}, ...")
    if vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size)
    return model


def fingerprint(pretrained: Path) -> str:
    """16 hex characters over a pretrained folder's config.json: rotation, epsilons, whatever no weight holds."""
    path = pretrained / "config.json"
    if not path.is_file():
        raise ValueError(f"model.pretrained={pretrained} has no config.json; a run that began there needs it to go on")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def use_fused_kernels(backbone: PreTrainedModel) -> bool:
    """Replace norms and gated FFNs by Liger's kernels, where the package is installed and there is a GPU.

    Weights and names stay. The package patches the classes in `transformers` too, for the whole process.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # Its cross-entropy is not used: head.py's loop has weights for each token. Our rotation has one angle a row.
    others = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=backbone, rms_norm=True, swiglu=True, **others)
    return True


def _fresh_config(config: ModelConfig, vocab_size: int) -> Any:
    return AutoConfig.for_model(
        config.family,
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
