"""The door to DeepSpeed for all that trains.

`start` joins the process group, `partitioned` and `gathered` are for building a model, and `Engine` is the handful of
calls the trainer makes.
On a CPU, DeepSpeed compiles a shared-memory collective with ninja and a C++ compiler at the first start (20-40 s on two
cores) and loads it from a cache later.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import io
import logging
import os
import pickle
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # importing it later, inside zero.Init, fails
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from data_pipeline.packing import Pack
from uvlm.backbone import restore_rotation
from uvlm.checkpoint_files import FileRecord, StateWriter
from uvlm.config import Config
from uvlm.deepspeed_config import zero_stage
from uvlm.distributed import device_index, end_with_launcher, export_world
from uvlm.model import UnifiedVLM
from uvlm.optim import apply_learning_rate, parameter_groups, settings
from uvlm.token_plan import TokenPlan
from uvlm.trust import REMEDY

_FROZEN = "frozen.pt"  # beside a universal checkpoint

# Of a collective until the first steps are done: some ranks compile, read and convert while others wait.
START_TIMEOUT = timedelta(minutes=30)


def start(alone: Callable[[], None] | None = None) -> torch.device:
    """Join the process group through DeepSpeed and return this rank's device.

    Args:
        alone: of a rehearsal, whose group is there and moves nothing: called before DeepSpeed joins.
    """
    export_world()
    if not alone and (sentence := compiler_missing()):
        raise ValueError(sentence)
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    device = torch.device("cuda", device_index(torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    transformers_logging.disable_progress_bar()
    # DeepSpeed still calls collectives by the names that torch renamed; the warning comes once a call.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    with _quiet():
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if alone:
            alone()
        elif not cuda:
            _compile_shared_memory_op()
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=START_TIMEOUT, verbose=False)
    return device


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
        if not any(folder.glob(f"{builder.NAME}*/*.so")):
            print("compiling DeepSpeed's operator for CPUs: half a minute, once", file=sys.stderr, flush=True)
        builder.load(verbose=False)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide what DeepSpeed prints to standard output while it starts."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def partitioned(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Modules that are made inside keep, under ZeRO-3, only this rank's share of their weights. Whatever the stage, the
    values are undefined until `weights.fill` gives them. ValueError where DeepSpeed refuses the config."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from transformers.initialization import no_init_weights

    with _quiet(), no_init_weights(), contextlib.ExitStack() as stack:
        try:
            DeepSpeedConfig(copy.deepcopy(deepspeed_config))
        except (DeepSpeedConfigError, ValueError) as error:
            raise ValueError(f"DeepSpeed refuses its JSON: {' '.join(str(error).split())}") from error
        if zero_stage(deepspeed_config) == 3:
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=deepspeed_config))
        yield


@contextlib.contextmanager
def gathered(parameters: Sequence[torch.nn.Parameter]) -> Iterator[bool]:
    """These weights are whole on every rank; what rank 0, for which the value is true, writes into them stays.

    Before an Engine exists for it, a model that is not partitioned is only written on rank 0: DeepSpeed sends it from
    there to the others. All ranks call it. In a rehearsal nothing is sent, and each rank writes for itself.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield dist.get_rank() == 0 or dist.get_backend() == "fake"


class Engine:
    """DeepSpeed around one UnifiedVLM. Call order in every micro-step: engine(...), backward, step."""

    def __init__(self, model: UnifiedVLM, config: Config, deepspeed_config: dict[str, Any]) -> None:
        import deepspeed

        self._deepspeed = deepspeed
        self._policy = config.policy
        groups = parameter_groups(model, config.optim)
        self._group_settings = settings(groups)
        try:
            with _quiet():
                self._engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=deepspeed_config)
        except (AssertionError, TypeError) as error:  # an optimizer it does not have, say, or keys that are not its own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"DeepSpeed cannot start with its JSON ({reason}); see ds_configs/README.md") from error
        restore_rotation(model.backbone)
        self.device: torch.device = self._engine.device
        self._writer = StateWriter(config.checkpoint.background)
        self._engine.checkpoint_engine.save = self._writer.save
        # It would put scripts to run beside the data, and raise on one rank alone where the disk is full.
        self._engine._copy_recovery_script = lambda save_path: None

    def __call__(
        self, pack: Pack, plan: TokenPlan, weights_S: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`UnifiedVLM.forward`: the weighted loss, nll_S and right_S; all arguments lie on the engine's device."""
        return self._engine(pack, plan, weights_S)

    @property
    def module(self) -> UnifiedVLM:
        """The model, its weights as DeepSpeed keeps them."""
        return self._engine.module

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Count one micro-step; at the end of the accumulation window, update the weights."""
        self._engine.step()

    def set_learning_rate(self, value: float) -> None:
        apply_learning_rate(self._engine.optimizer.param_groups, self._group_settings, value)

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last update's gradients before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def skipped_steps(self) -> int:
        """Updates left out because a gradient was not finite."""
        return int(self._engine.skipped_steps)

    def save(self, folder: Path, tag: str) -> None:
        """Have this rank's part of the state written into folder/tag. All ranks call it, `written` in between.

        With `checkpoint.background` it returns once the state is copied, else once it is written.
        """
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    @property
    def is_written(self) -> bool:
        """Whether nothing of what `save` was given is left to write, or it has failed."""
        return self._writer.is_done

    def written(self) -> list[FileRecord]:
        """Wait, and give the files that this rank has written since the last call. OSError where it could not."""
        return self._writer.written()

    @property
    def checkpoint_bytes(self) -> int:
        """About what `save` writes on all ranks together: in fp32 the weights and two moments, and the weights."""
        parameters = list(self._engine.module.parameters())
        return sum(getattr(p, "ds_numel", p.numel()) * (12 + p.element_size()) for p in parameters)

    def not_convertible(self) -> str | None:
        """A clause if a `Conversion` cannot serve this engine."""
        if self._engine.zero_nvme_offload_optimizer():
            return "DeepSpeed converts no optimizer state that lies on NVMe; start as many ranks again"
        return None

    def load(self, checkpoint: Path, is_universal: bool = False, trust: bool = False) -> None:
        """Read it back, on all ranks. ValueError where it holds more than data or cannot be read.

        Args:
            is_universal: made by a conversion.Conversion. DeepSpeed is told so for this load alone.
            trust: its files may run code.
        """
        self._engine._config.load_universal_checkpoint = is_universal
        try:
            with _quiet(), data_only(checkpoint, trust):
                loaded, _ = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
                if is_universal:
                    self._complete_universal(checkpoint)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{checkpoint} cannot be loaded ({reason}), though it is as it was written; use the versions that "
                "environment.txt of the run names"
            ) from error
        finally:
            self._engine._config.load_universal_checkpoint = False
        if loaded is None:
            raise ValueError(f"{checkpoint} cannot be loaded (DeepSpeed finds no files in it)")

    @torch.no_grad()
    def _complete_universal(self, checkpoint: Path) -> None:
        """What DeepSpeed leaves out: frozen weights, and under stage 3 a count of steps for each group of parameters.
        All groups share one tensor, which each of them raises in each step (run)."""
        for state in self._engine.optimizer.state.values():
            state["step"] = copy.deepcopy(state["step"])
        weights = torch.load(checkpoint / _FROZEN, map_location="cpu", mmap=True)
        for name, parameter in self._engine.module.named_parameters():
            if name in weights:
                with gathered([parameter]):
                    parameter.copy_(weights[name])

    def whole(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """A trained weight, in its training dtype, in host memory of rank 0; None elsewhere. All ranks call it."""
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None

    def snapshot(self) -> UnifiedVLM | None:
        """The trained weights in a model without DeepSpeed, in their training dtype, on rank 0; None elsewhere. All
        ranks call it.

        One parameter at a time is gathered, so no rank but 0 ever holds more than its shard and that one.
        """
        state = {name: self.whole(parameter) for name, parameter in self.module.named_parameters()}
        if dist.get_rank() != 0:
            return None
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(self.module.backbone.config)
            model = UnifiedVLM(backbone, self._policy)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        assert not unexpected, unexpected
        assert set(missing) <= {"backbone.lm_head.weight"}, missing  # tied to the embedding
        backbone.tie_weights()
        restore_rotation(backbone)
        return model.eval()


def _convert(checkpoint: Path, target: Path, trust: bool) -> None:
    """What the process of a conversion.Conversion does. Frozen weights, which DeepSpeed leaves out, go into a file."""
    end_with_launcher()  # so does this process with the rank that started it, and those that it starts
    os.register_at_fork(after_in_child=end_with_launcher)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint import ds_to_universal

    num_processes = min(8, len(os.sched_getaffinity(0)))
    with data_only(checkpoint, trust):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(checkpoint),
                output_folder=str(target),
                num_extract_workers=num_processes,
                num_merge_workers=num_processes,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # that it is a plain model, without tensor parallelism
            )
        )
        torch.save(_frozen_weights(checkpoint), target / _FROZEN)


def _frozen_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole weights by name, of those that the optimizer does not hold."""
    if (path := checkpoint / "mp_rank_00_model_states.pt").exists():  # not stage 3
        state = torch.load(path, map_location="cpu", mmap=True)
        held = {*state["shared_params"], *(name for group in state["param_shapes"] for name in group)}
        return {name: weight for name, weight in state["module"].items() if name not in held}
    paths = list(checkpoint.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"))
    paths.sort(key=lambda path: int(path.name.split("_")[3]))
    states = [torch.load(path, map_location="cpu", mmap=True) for path in paths]
    return {
        name: torch.cat([state["frozen_param_fragments"][name] for state in states])[: shape.numel()].view(shape)
        for name, shape in states[0]["frozen_param_shapes"].items()
    }


def compiler_missing() -> str | None:
    """A sentence if this machine would need a C++ compiler that it does not have."""
    if torch.cuda.is_available() or shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]):
        return None
    return (
        "no C++ compiler was found, and DeepSpeed builds a small extension at its first start on a CPU; "
        "install one (Debian: apt-get install g++) or name it in CXX"
    )


class NotDataError(ValueError):
    """Opening a file could run code."""


@contextlib.contextmanager
def data_only(checkpoint: Path, trust: bool = False) -> Iterator[None]:
    """Inside, a checkpoint's files are opened by torch's restricted unpickler, whatever DeepSpeed asks for: it builds
    tensors, plain values and the few classes that DeepSpeed's own checkpoints hold, so no file runs code.

    NotDataError where `checkpoint` holds more. With `trust` nothing is restricted.
    """
    if trust:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by each torch.load, and stronger than its weights_only=False
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise
        raise NotDataError(f"a file in {checkpoint} holds {found[1]}, which is no data; {REMEDY}") from error
    finally:
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def checkpoint_weights(checkpoint: Path, trust: bool = False) -> dict[str, Any]:
    """The trained weights of a checkpoint's files by name, put together without process group or GPU.

    Stages 1 to 3 give the optimizer's fp32 copy, and a frozen weight as it was trained with; without ZeRO it is all as
    trained with. Values have `shape`, `dtype` and `contiguous()`. Under stage 3 the files stay on disk and
    `contiguous()` reads one weight; under stages 1 and 2 the whole fp32 model is in memory.

    ValueError where files are missing or damaged, or hold more than data and there is no `trust`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # bars
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with data_only(checkpoint, trust):
                if any(checkpoint.glob("*_optim_states.pt")):
                    return get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, checkpoint.name, lazy_mode=True)
                path = checkpoint / "mp_rank_00_model_states.pt"
                return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)["module"]
    except NotDataError:
        raise
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint} cannot be read ({reason}); give --step with another checkpoint") from error


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]), trust=sys.argv[3:] == ["--trust"])
