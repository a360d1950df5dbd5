"""The backbone: an ordinary `transformers` causal language model, by sizes or by those of a folder.

What its weights start from is weights.py's business: under ZeRO-3 no process ever holds all of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import AfterValidator, Field, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from uvlm.strict import Strict

# Families whose decoder layer is the one that model.py runs: pre-norm, rotary grouped-query attention, gated FFN.
# Another one of this shape comes in by its name here; test_model.py then holds it against transformers' own forward
# pass.
Family = Literal["llama", "qwen2", "qwen3"]
# For every from_pretrained: nothing is downloaded, and no code of a folder runs.
LOCAL_DATA: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by the config's names
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
    """The backbone. `init_from` alone is enough; without it the sizes are. Names are the field's."""

    init_from: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        default=None,
        description="finished run or Hugging Face folder whose weights training starts from; the sizes are read there",
    )
    freeze: list[str] = Field(
        default=[], description="weights that are not trained, by name, such as 'model.layers.0.*' or 'lm_head.weight'"
    )
    family: Family = "qwen3"
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the gated FFN")
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2, description="even, as its halves are rotated against each other")
    tie_embeddings: bool = True
    rope_theta: float = Field(
        default=10_000.0, gt=0, description="of a fresh model; a pretrained one brings its own rotation"
    )
    max_position: int = Field(default=4096, description="longest document the exported model claims to handle")

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_folder(cls, tree: Any) -> Any:
        """Fill in what the folder's config.json says; a size that contradicts it is an error with both values."""
        if not isinstance(tree, dict) or not tree.get("init_from"):
            return tree
        folder = weights_folder(Path(str(tree["init_from"])))
        if not (folder / "config.json").is_file():
            if {name for name, field in cls.model_fields.items() if field.is_required()} <= set(tree):
                return tree  # a resolved config of a finished run reads without its starting point
            raise ValueError(f"{folder} has no config.json; give a finished run, or the folder of a Hugging Face model")
        read = _read_sizes(folder)
        for name, value in read.items():
            if tree.get(name, value) != value:
                raise ValueError(f"{name}={tree[name]!r}, but {folder} has {value!r}; remove {name} from the config")
        return {**read, **tree}


def _read_sizes(folder: Path) -> dict[str, Any]:
    try:
        model_type = json.loads((folder / "config.json").read_bytes())["model_type"]
        # For a type that it does not know, transformers would ask whether to run the folder's own code.
        found = AutoConfig.from_pretrained(folder, **LOCAL_DATA) if model_type in get_args(Family) else None
    except Exception as error:  # transformers raises what its checks of each family raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}/config.json is not that of a Hugging Face language model: {reason}") from None
    if found is None:
        raise ValueError(f"{folder} holds a {model_type} model; the families are {', '.join(get_args(Family))}")
    sizes: dict[str, Any] = {name: getattr(found, theirs, None) for name, theirs in _FROM_FOLDER.items()}
    sizes["num_kv_heads"] = sizes["num_kv_heads"] or sizes["num_heads"]
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // max(1, sizes["num_heads"])
    return sizes


def weights_folder(init_from: Path) -> Path:
    """The Hugging Face folder that `model.init_from` names: itself, or the trained model of a run folder.

    ValueError where a run has none yet.
    """
    if not (init_from / "config.yaml").is_file():
        return init_from
    if not (init_from / "model").is_dir():
        raise ValueError(
            f"model.init_from={init_from} is a run without a trained model; bring it to its end, or export its last "
            f"checkpoint (uvlm export {init_from} OUT) and give OUT"
        )
    return init_from / "model"


def build_backbone(config: ModelConfig, vocab_size: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A backbone of at least `vocab_size` words (a folder's vocabulary grows at its end and never shrinks).

    Its weights are drawn by the global generator where it is built on a real device; `weights.fill` gives them the
    values that training starts from. Its rotation is fp32 whatever `dtype` is.

    Raises:
        ValueError: heads that do not divide, or an unreadable config.json.
    """
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.num_heads={config.num_heads} does not divide over model.num_kv_heads={config.num_kv_heads} groups; "
            f"use num_kv_heads={config.num_heads}"
        )
    if config.init_from and not (weights_folder(config.init_from) / "config.json").is_file():
        raise ValueError(f"model.init_from={config.init_from} has no config.json; put the folder back where it was")
    if config.init_from is None:
        hf_config = _fresh_config(config, vocab_size)
    else:
        hf_config = AutoConfig.from_pretrained(weights_folder(config.init_from), **LOCAL_DATA)
        hf_config.vocab_size = max(vocab_size, hf_config.vocab_size)
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype)


def restore_rotation(backbone: PreTrainedModel) -> None:
    """Make the table of rotary frequencies anew, in fp32.

    Inside `deepspeed.zero.Init` every floating-point tensor is made in the training dtype, this one too, and a
    DeepSpeed JSON may ask for another dtype of buffers. In bf16 a frequency is off by up to 0.4%, an angle by half a
    turn at position 7,190, and nothing says so (run, heads of 64).
    """
    backbone.model.rotary_emb = type(backbone.model.rotary_emb)(backbone.config).to(backbone.lm_head.weight.device)


def fingerprint(init_from: Path) -> str:
    """16 hex characters over a folder's config.json: rotation, epsilons, whatever no weight holds."""
    path = weights_folder(init_from) / "config.json"
    if not path.is_file():
        raise ValueError(f"model.init_from={init_from} has no config.json; a run that began there needs it to go on")
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
