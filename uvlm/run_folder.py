"""The run folder: everything a run was made from and everything it made. Pointing at it is how a run goes on.

config.yaml  deepspeed.json  environment.txt     what it was started with, resolved
checkpoints/step_*/                              engine and data state
quarantine/rank_*.jsonl                          documents that could not be used, and why
tensorboard/  metrics.jsonl  metrics.json        records by step, and the summary
events.jsonl                                     what happened to the run: rollbacks, say
SAVE  STOP                                       made by whoever wants a checkpoint, or a stop (life.py)
model/                                           the trained model, an ordinary Hugging Face folder
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_pipeline.files import replace_file
from data_pipeline.vocab import Vocab
from uvlm.backbone import LOCAL_DATA
from uvlm.collectives import from_rank_0
from uvlm.config import Config, dump_config, load_config
from uvlm.metrics import median_of, read_records, update_summary
from uvlm.model import UnifiedVLM
from uvlm.weights import IMAGE_PROJECTIONS, write_weights

_LOCK_SECONDS = 30


def prepare(config: Config, deepspeed_config: dict[str, Any]) -> None:
    """Make the folder and write down what the run is started with."""
    config.run.mkdir(parents=True, exist_ok=True)
    replace_file(config.run / "config.yaml", dump_config(config))
    replace_file(config.run / "deepspeed.json", json.dumps(deepspeed_config, indent=2) + "\n")
    packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions())
    environment = "\n".join([f"python=={platform.python_version()}", *packages]) + "\n"
    replace_file(config.run / "environment.txt", environment)


def note_event(run: Path, sentence: str) -> None:
    """Add a line to RUN/events.jsonl: what happened to a run, with the time."""
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": sentence}) + "\n")


def forget_results(run: Path) -> None:
    """Remove model and summary of an earlier end: what stands there speaks of the finished model only."""
    shutil.rmtree(run / "model", ignore_errors=True)
    (run / "metrics.json").unlink(missing_ok=True)


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder for this process: two trainings that write to one folder would ruin both.

    It is the kernel's lock, so it ends with the process, however that ends. ValueError where another holds it for
    longer than a stopping training needs.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        for attempts_left in range(_LOCK_SECONDS, -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    print(f"{run} lies on a file system without locks; take care that nothing else trains into it")
                    break
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if attempts_left == _LOCK_SECONDS:
                    print(f"another training still writes to {run}; waiting for its end", flush=True)
                if not attempts_left:
                    raise ValueError(f"another training writes to {run}; stop it, or give another run folder") from None
                time.sleep(1)
        yield


def read_config(run: Path) -> Config:
    """The resolved config of a run; ValueError where the folder holds none."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder (it has no config.yaml); give the folder that `uvlm train` printed")
    return load_config(path)


def model_folder(run: Path) -> Path:
    """The trained model of a run; ValueError where training has not come to its end."""
    folder = run / "model"
    if not folder.is_dir():
        raise ValueError(f"{run} has no trained model yet; bring its training to its end with `uvlm launch`")
    return folder


def load_model(run: Path, vocab: Vocab) -> UnifiedVLM:
    """The trained model of a run, in evaluation mode, on a GPU if there is one. Only safetensors are read.

    ValueError where there is none, or where `vocab` is not the vocabulary it was trained with.
    """
    transformers_logging.disable_progress_bar()
    folder = model_folder(run)
    try:
        backbone = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **LOCAL_DATA)
        model = UnifiedVLM(backbone, read_config(run).policy)
        load_image_projections(model, folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is damaged ({' '.join(str(error).split())}); start the training again, which writes the model "
            "from its last checkpoint"
        ) from error
    trained_with = getattr(backbone.config, "uvlm_vocabulary", None)
    if trained_with != vocab.fingerprint:
        raise ValueError(
            f"{run} was trained with vocabulary {trained_with}, its tokenizer folder now holds {vocab.fingerprint}; "
            "put the old tokenizer back, or train again"
        )
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)  # flash-attn has no kernel for fp32
    return model.eval()


def load_image_projections(model: UnifiedVLM, folder: Path) -> None:
    """Read what `save_model` wrote beside the backbone. OSError, RuntimeError or SafetensorError where that is not what
    the model has."""
    path = folder / IMAGE_PROJECTIONS
    if model.image_projections.state_dict() or path.exists():
        model.image_projections.load_state_dict(load_file(path))


def save_model(
    config: Config, model: UnifiedVLM, vocab: str, whole: Callable[[nn.Parameter], Any] = nn.Parameter.detach
) -> None:
    """RUN/model with weights, config and text tokenizer, whole or not at all; image projections in a file of their own.

    Args:
        vocab: fingerprint of the vocabulary, kept in the model's config.
        whole: gives a weight on rank 0, which writes it, and None elsewhere (`Engine.whole`); all ranks call this.
    """
    folder = config.run / "model"
    partial = config.run / ".partial_model"
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    wrong: list[str] = []

    def read(name: str) -> Any:
        value = whole(weights[name])
        if value is not None and not value.isfinite().all():
            wrong.append(name)
        return value

    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    weights = dict(model.backbone.named_parameters())
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in weights.items()}
    write_weights(partial, shapes, next(iter(weights.values())).dtype, read)
    if dist.is_initialized():
        wrong = from_rank_0(lambda: wrong)
    if wrong:
        raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more weights are not finite; no model is written")
    projections = {name: whole(weight) for name, weight in model.image_projections.named_parameters()}
    if not is_writer:
        return
    if projections:
        save_file(projections, partial / IMAGE_PROJECTIONS)
    model.backbone.config.uvlm_vocabulary = vocab
    model.backbone.config.architectures = [type(model.backbone).__name__]
    model.backbone.config.save_pretrained(partial)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(config.data.tokenizer / "text" / "tokenizer.json"))
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def summarise(run: Path, vocab_size: int) -> None:
    """Put what is known of training into metrics.json."""
    records = read_records(run)
    update_summary(
        run,
        {
            "first_loss": next((r["loss/mean"] for r in records if "loss/mean" in r), None),
            "log_vocab": math.log(vocab_size),
            "tokens_per_second": median_of(run, "speed/tokens_per_second"),
            "fill_share": median_of(run, "data/fill_share"),
        },
    )
