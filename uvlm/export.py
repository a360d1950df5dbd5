"""`uvlm export`: a trained model as an ordinary Hugging Face folder, made by one process, without GPU or process group.

config.json  generation_config.json  model*.safetensors    what `transformers` loads
tokenizer.json  tokenizer_config.json                       its text tokenizer; markers in a text stay plain text
tokenizer/text/  tokenizer/image/                           the tokenizer folder of uvlm: `data.tokenizer` takes it
vocabulary.json                                             which ids are text, specials and image codes
README.md                                                   the model card

The weights come from RUN/model, or from a checkpoint's own files. Both stay on disk until a weight's turn comes (under
ZeRO-1 and 2 DeepSpeed's tool holds the fp32 model), so memory is one shard. A weight in bf16 is the optimizer's fp32
copy rounded, which is bit for bit what the forward passes of training used (run, stages 1 to 3).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_pipeline.image_tokens import PREPROCESSING_NAME, Preprocessing, codes_hw_of
from data_pipeline.vocab import SPECIALS, Vocab
from uvlm.backbone import DTYPES, LOCAL_DATA, build_backbone
from uvlm.check import require_disk
from uvlm.checkpoint import complete, refuse_newer
from uvlm.checkpoint_files import FileRecord, damage, read_marker, step_of
from uvlm.config import Config
from uvlm.engine import checkpoint_weights
from uvlm.model_card import Facts, model_card
from uvlm.policies.dense import Dense
from uvlm.run_folder import read_config
from uvlm.trust import check_trusted
from uvlm.weights import IMAGE_PROJECTIONS, MAX_SHARD_BYTES, write_weights

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


class Trained(NamedTuple):
    """A trained backbone, not yet read.

    Attributes:
        tensors: by the names of `transformers`; values have `shape` and `dtype`, and `contiguous()` reads one.
        config: of `transformers`.
        step: optimizer steps done.
        is_finished: training came to its end.
    """

    tensors: Mapping[str, Any]
    config: Any
    step: int
    is_finished: bool


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    dense: bool = False,
    trust: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Trained:
    """Write OUT, whole or not at all, and return what it was made from.

    Args:
        step: of a checkpoint; else the finished model, or the newest checkpoint where training goes on.
        dtype: "bf16", "fp16" or "fp32"; else that of training.
        dense: export a model that leaves tokens out, though `transformers` will leave out none.
        trust: open a checkpoint that is not this user's own (trust.py).

    Raises:
        ValueError: the run cannot be exported, or not to there, with a remedy.
    """
    config = read_config(run)
    check_out(out)
    dtype = dtype or config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"there is no dtype {dtype}; use {', '.join(DTYPES)}")
    check_policy(config, dense)
    transformers_logging.disable_progress_bar()
    vocab = Vocab.load(config.data.tokenizer)
    progress = progress or (lambda *_: None)
    weights = open_weights(run, config, vocab, step, trust, progress)
    tokenizer_files = _tokenizer_files(config.data.tokenizer)

    num_bytes = sum(math.prod(tensor.shape) for tensor in weights.tensors.values()) * DTYPES[dtype].itemsize
    needed = num_bytes + sum(path.stat().st_size for path in tokenizer_files.values()) + 2**20
    require_disk(out, needed, "the exported model", "or give a smaller --dtype")
    partial = out.absolute().with_name(f".partial_{out.absolute().name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, weights, DTYPES[dtype], max_shard_bytes, progress)
        _write_configs(partial, weights, vocab, DTYPES[dtype])
        _write_tokenizers(partial, config.data.tokenizer, tokenizer_files, vocab)
        facts = Facts.of(run, config, vocab, weights.config, weights.step, weights.is_finished, dtype)
        (partial / "README.md").write_text(model_card(out.absolute().name, facts))
        _flush(partial)
        partial.replace(out.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return weights


def check_out(out: Path) -> None:
    """Raise ValueError where something is there already."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is no folder; give the path of a new one")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give the path of a new folder, or remove it")


def check_policy(config: Config, dense: bool) -> None:
    """Raise ValueError where `transformers` would run another model than the one that was trained."""
    if any(config.policy.own_projections(config.model.num_layers)):
        raise ValueError(
            "the run's policy gives images projections of their own, for which a model of transformers has no place; "
            "use the run with `uvlm ask` and `uvlm generate`, or train with input_projections=target_projections=shared"
        )
    if not dense and (names := left_out(config)):
        raise ValueError(
            f"the finished model leaves out image tokens ({names}), and transformers would leave out none, which is "
            "another model; give --dense to export it all the same, or train with policy.full_tail=0.1 for a dense end"
        )


def left_out(config: Config) -> str:
    """The policy by which the finished model leaves out tokens, for people; empty where it is dense."""
    policy = config.policy.at_inference()
    kinds = {"input": policy.input, "target": policy.target}
    return ", ".join(f"{kind}: {image.name}" for kind, image in kinds.items() if not isinstance(image, Dense))


def open_weights(run: Path, config: Config, vocab: Vocab, step: int | None, trust: bool, progress: Progress) -> Trained:
    """The weights of a finished run, or of a checkpoint; ValueError where there are none, or they do not fit."""
    if (run / "model").is_dir() and step is None:
        return _finished(run, config, vocab)
    found = {step_of(folder): folder for folder in complete(run)}
    if not found:
        raise ValueError(f"{run} has neither a trained model nor a complete checkpoint; train it with `uvlm launch`")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(f"{run} has no checkpoint of step {step}; its steps are {', '.join(map(str, found))}")
    folder = found[step]
    check_trusted(folder, run, trust)
    return _from_checkpoint(config, vocab, folder, _checked(folder, progress), trust)


def _finished(run: Path, config: Config, vocab: Vocab) -> Trained:
    folder = run / "model"
    if (folder / IMAGE_PROJECTIONS).exists():
        raise ValueError(f"{folder} has image projections of its own, for which a model of transformers has no place")
    try:
        hf_config = AutoConfig.from_pretrained(folder, **LOCAL_DATA)
        tensors: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)  # mapped, not read
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(hf_config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is damaged ({reason}); give --step with a checkpoint, or train again") from error
    _check_vocabulary(folder, getattr(hf_config, "uvlm_vocabulary", None), vocab)
    return Trained(_fitting(tensors, skeleton, folder), skeleton.config, config.optim.steps, True)


def _checked(folder: Path, progress: Progress) -> dict[str, Any]:
    """The state of a checkpoint all of whose files are as they were written; ValueError where one is not."""
    state = read_marker(folder)
    if isinstance(state, str):
        raise ValueError(f"{state}; give --step with another checkpoint")
    refuse_newer(folder, state)
    files = state.get("files", {})  # a checkpoint of format 1 has no checksums
    for number, (name, file) in enumerate(files.items(), 1):
        if wrong := damage(folder, [FileRecord(name, file["bytes"], file["sha256"])]):
            raise ValueError(f"{wrong}; give --step with another checkpoint")
        progress("checking files", number, len(files))
    return state


def _from_checkpoint(config: Config, vocab: Vocab, folder: Path, state: dict[str, Any], trust: bool) -> Trained:
    _check_vocabulary(folder, state["fixed"].get("vocabulary"), vocab)
    with torch.device("meta"):
        skeleton = build_backbone(config.model, vocab.size)
    skeleton.config.uvlm_vocabulary = vocab.fingerprint
    tensors = checkpoint_weights(folder, trust)
    if any(name.startswith("image_projections.") for name in tensors):
        raise ValueError(f"{folder} has image projections of its own, for which a model of transformers has no place")
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    step = state["step"]
    return Trained(_fitting(tensors, skeleton, folder), skeleton.config, step, step == config.optim.steps)


def _check_vocabulary(folder: Path, trained_with: str | None, vocab: Vocab) -> None:
    if trained_with != vocab.fingerprint:
        raise ValueError(
            f"{folder} was trained with vocabulary {trained_with}, the tokenizer folder now holds {vocab.fingerprint}; "
            "put the old tokenizer back"
        )


def _fitting(tensors: Mapping[str, Any], skeleton: Any, folder: Path) -> dict[str, Any]:
    """The tensors in the skeleton's order, a tied head left out; ValueError where they are not the skeleton's."""
    skeleton.config.architectures = [type(skeleton).__name__]
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    if skeleton.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    for name, shape in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            has = f"{name} of shape {list(tensors[name].shape)}" if name in tensors else f"no {name}"
            raise ValueError(f"{folder} has {has}, the run's config wants {list(shape)}; put its config.yaml back")
    return {name: tensors[name] for name in expected}


def _write_weights(out: Path, weights: Trained, dtype: torch.dtype, max_shard_bytes: int, progress: Progress) -> None:
    num_done = 0

    def read(name: str) -> torch.Tensor:
        nonlocal num_done
        num_done += 1
        progress("reading weights", num_done, len(weights.tensors))
        return weights.tensors[name].contiguous().detach()

    write_weights(out, {name: tensor.shape for name, tensor in weights.tensors.items()}, dtype, read, max_shard_bytes)


def _write_configs(out: Path, weights: Trained, vocab: Vocab, dtype: torch.dtype) -> None:
    weights.config.dtype = dtype
    weights.config.save_pretrained(out)
    GenerationConfig(
        bos_token_id=vocab.bos, eos_token_id=[vocab.end, vocab.eos], pad_token_id=vocab.pad
    ).save_pretrained(out)


def _tokenizer_files(tokenizer: Path) -> dict[str, Path]:
    """What a tokenizer folder consists of, by its name in it: JSON and safetensors, nothing else."""
    image = tokenizer / "image"
    files = [image / "config.json", image / PREPROCESSING_NAME, *sorted(image.glob("*.safetensors"))]
    return {str(path.relative_to(tokenizer)): path for path in [tokenizer / "text" / "tokenizer.json", *files]}


def _write_tokenizers(out: Path, tokenizer: Path, files: Mapping[str, Path], vocab: Vocab) -> None:
    for name, path in files.items():
        copy = out / "tokenizer" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "text" / "tokenizer.json"),
        pad_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        split_special_tokens=True,  # as in training: what a user types is never a marker
    ).save_pretrained(out)
    ids = (vocab.pad, vocab.bos, vocab.eos, vocab.end, vocab.image_start, vocab.image_end)
    facts = {
        "num_text": vocab.num_text,
        "specials": dict(zip(SPECIALS, ids, strict=True)),
        "first_code": vocab.first_code,
        "num_codes": vocab.num_codes,
        "size": vocab.size,
        "codes_hw": codes_hw_of(tokenizer / "image"),
        "image_size": Preprocessing.load(tokenizer / "image").image_size,
        "image_tokenizer": vocab.image_tokenizer,
        "fingerprint": vocab.fingerprint,
    }
    (out / "vocabulary.json").write_text(json.dumps(facts, indent=2) + "\n")


def _flush(folder: Path) -> None:
    """To the disk, so that a crash of the machine leaves no folder of empty files; all with the rights of config.json
    (safetensors writes for nobody else)."""
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copymode(folder / "config.json", path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
