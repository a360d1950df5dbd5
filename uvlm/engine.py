"""The one door to DeepSpeed.

`resolve` joins the user's DeepSpeed JSON with what the YAML owns; `Engine` is the handful of calls the trainer makes.
On a CPU, DeepSpeed compiles a shared-memory collective with ninja and a C++ compiler at the first start (20-40 s on two
cores) and loads it from a cache later.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pickle
import shlex
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # importing it later, inside zero.Init, fails
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from data_pipeline.packing import Pack
from uvlm.config import Config
from uvlm.distributed import be_alone_unless_launched, world
from uvlm.model import UnifiedVLM
from uvlm.optim import parameter_groups
from uvlm.token_plan import TokenPlan

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
    if not isinstance(zero, dict):
        raise ValueError("zero_optimization must be an object of keys and values; see ds_configs/zero3.json")
    zero.update({key: automatic[key] for key, value in zero.items() if value == "auto" and key in automatic})
    if left := _keys_of_auto(resolved):
        raise ValueError(f'{left[0]}: "auto" is not allowed here; write a value')
    resolved["train_micro_batch_size_per_gpu"] = 1
    resolved["gradient_accumulation_steps"] = config.data.num_rows // world_size
    resolved["gradient_clipping"] = config.optim.gradient_clipping
    resolved["bf16"] = {"enabled": config.dtype == "bf16"}
    return resolved


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage of a complete DeepSpeed config; DeepSpeed's default is 0."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


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


def start() -> torch.device:
    """Join the process group through DeepSpeed and return this rank's device."""
    be_alone_unless_launched()
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    place = world()
    if cuda:
        torch.cuda.set_device(place.local_rank)
    transformers_logging.disable_progress_bar()
    # DeepSpeed still calls collectives by the names that torch renamed; the warning comes once a call.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    with _quiet():
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not cuda:
            _compile_shared_memory_op()
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", timeout=timedelta(minutes=30), verbose=False
        )
    return torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")


def _compile_shared_memory_op() -> None:
    """Build DeepSpeed's CPU collective, one process at a time.

    torch.utils.cpp_extension guards a build with a lock *file*, which outlives a process that is killed; the next start
    then waits for ever, silently. We hold a kernel lock, which does not outlive us, so any lock file we find is stale.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder = ShareMemCommBuilder()
    if not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "uvlm.lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        for stale in folder.glob(f"{builder.NAME}*/lock"):
            stale.unlink()
        builder.load(verbose=False)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide what DeepSpeed prints to standard output while it starts."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Engine:
    """DeepSpeed around one UnifiedVLM. Call order in every micro-step: engine(...), backward, step."""

    def __init__(self, model: UnifiedVLM, config: Config, deepspeed_config: dict[str, Any]) -> None:
        import deepspeed

        self._deepspeed = deepspeed
        self._hf_config = model.backbone.config
        self._policy = config.policy
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=parameter_groups(model, config.optim), config=deepspeed_config
            )
        self.device: torch.device = self._engine.device

    def __call__(self, pack: Pack, plan: TokenPlan, weights_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`UnifiedVLM.forward`: the weighted loss and nll_S; all arguments lie on the engine's device."""
        return self._engine(pack, plan, weights_S)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Count one micro-step; at the end of the accumulation window, update the weights."""
        self._engine.step()

    def set_learning_rate(self, value: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = value

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last update's gradients before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def skipped_steps(self) -> int:
        """Updates left out because a gradient was not finite."""
        return int(self._engine.skipped_steps)

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's part of the state into folder/tag. All ranks call it."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read it back. It unpickles: only for folders that this trainer wrote. ValueError where files are missing."""
        remedy = f"remove {folder / tag} to go on from the checkpoint before it"
        try:
            with _quiet():
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder / tag} cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
        if loaded is None:
            raise ValueError(f"{folder / tag} lacks files; {remedy}")

    def snapshot(self) -> UnifiedVLM | None:
        """The trained weights in a model without DeepSpeed, in their training dtype, on rank 0; None elsewhere. All
        ranks call it.

        One parameter at a time is gathered, so no rank but 0 ever holds more than its shard and that one.
        """
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            with self._deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
        if dist.get_rank() != 0:
            return None
        dtype = next(iter(state.values())).dtype
        model = UnifiedVLM(AutoModelForCausalLM.from_config(self._hf_config, dtype=dtype), self._policy)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"backbone.lm_head.weight"}, missing  # tied to the embedding
        return model.eval()


def compiler_missing() -> str | None:
    """A sentence if this machine would need a C++ compiler that it does not have."""
    if torch.cuda.is_available() or shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):
        return None
    return (
        "no C++ compiler was found, and DeepSpeed builds a small extension at its first start on a CPU; "
        "install one (Debian: apt-get install g++) or name it in CXX"
    )
