"""What can be known before a run starts: refused here in one sentence, not by sixty-four ranks in an hour."""

from __future__ import annotations

import json
import math
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from data_pipeline.sources import open_sources
from data_pipeline.vocab import Vocab
from uvlm import checkpoint
from uvlm.attention import missing_backend
from uvlm.backbone import build_backbone, weights_folder
from uvlm.config import Config
from uvlm.deepspeed_config import read_deepspeed_json, resolve, zero_stage
from uvlm.engine import compiler_missing
from uvlm.model import UnifiedVLM
from uvlm.weights import Weights, check_weights, freeze

# Weights in training dtype, and in fp32 the master copy and two Adam moments.
_CHECKPOINT_BYTES = {"bf16": 2 + 12, "fp16": 2 + 12, "fp32": 4 + 12}


def check(config: Config, world_size: int, data_is_there: bool = True, on_gpus: bool | None = None) -> dict[str, Any]:
    """Raise ValueError with a remedy where the run cannot work: ranks, JSON, compiler, data, checkpoints, disk.

    Returns the complete DeepSpeed config.

    Args:
        data_is_there: False where another job is still to make the shards: those that are not there are no error.
        on_gpus: whether the run will have GPUs; as this machine has them, unless given.
    """
    if config.data.num_rows % world_size:
        num_rows = config.data.num_rows
        ranks = [str(size) for size in range(1, num_rows + 1) if num_rows % size == 0]
        above = -(-num_rows // world_size) * world_size
        raise ValueError(
            f"data.num_rows={num_rows} does not divide over {world_size} ranks; "
            f"start {' or '.join(ranks)} ranks, or set data.num_rows={above}"
        )
    tree = resolve(read_deepspeed_json(config.deepspeed), config, world_size)
    is_here = on_gpus is None
    on_gpus = torch.cuda.is_available() if on_gpus is None else on_gpus
    if not on_gpus and (sentence := compiler_missing()):
        raise ValueError(sentence)
    if config.dtype == "fp16" and not on_gpus:
        raise ValueError("DeepSpeed trains with dtype=fp16 on GPUs only; use dtype=bf16")
    if is_here and (sentence := missing_backend(config.dtype)):
        raise ValueError(sentence)
    rows_a_rank = config.data.num_rows // world_size
    if config.data.num_workers and rows_a_rank % config.data.num_workers:
        raise ValueError(
            f"data.num_workers={config.data.num_workers} does not divide the {rows_a_rank} rows of a rank; "
            f"set data.num_workers={rows_a_rank}, or 0"
        )
    if config.data.pack_tokens > config.model.max_position:
        raise ValueError(
            f"data.pack_tokens={config.data.pack_tokens} allows longer documents than "
            f"model.max_position={config.model.max_position}; "
            + (
                f"set data.pack_tokens={config.model.max_position}"
                if config.model.init_from
                else f"set model.max_position={config.data.pack_tokens}"
            )
        )
    check_full_tail(config.policy.full_tail, config.optim.steps)
    if config.run.exists() and not config.run.is_dir():
        raise ValueError(f"run={config.run} is a file; give the path of a folder")
    vocab = Vocab.load(config.data.tokenizer)
    with torch.device("meta"):
        model = UnifiedVLM(build_backbone(config.model, vocab.size), config.policy)
    freeze(model, config.model.freeze)
    if config.model.init_from:
        check_start(config.model.init_from, model, config.data.tokenizer, vocab)
    if data_is_there:
        for sources in filter(None, (config.data.train, config.data.valid)):
            open_sources([source.source() for source in sources], vocab)
    fixed = checkpoint.fixed_values(config, vocab.fingerprint, zero_stage(tree))
    checkpoint.check_fits(config, fixed)
    _check_disk(config, sum(p.numel() for p in model.parameters()))
    return tree


def check_full_tail(full_tail: float, steps: int) -> None:
    """Raise ValueError where the dense end of a run would have no step."""
    if 0 < full_tail * steps < 1 - 1e-9:
        raise ValueError(
            f"policy.full_tail={full_tail} of optim.steps={steps} is less than a step; "
            f"set policy.full_tail={math.ceil(1e6 / steps) / 1e6}, or 0"
        )


def check_start(init_from: Path, model: UnifiedVLM, tokenizer: Path, vocab: Vocab) -> None:
    """Raise ValueError where what `model.init_from` names cannot become the first weights of `model` (which may be on
    the meta device): weights that lack or do not fit, another tokenizer, or the codes of another image tokenizer."""
    folder = weights_folder(init_from)
    check_weights(model, Weights(folder))
    check_same_words(folder, tokenizer, vocab)
    trained_with = json.loads((folder / "config.json").read_text()).get("uvlm_vocabulary")
    if trained_with not in (None, vocab.fingerprint):
        raise ValueError(
            f"model.init_from={init_from} was trained with vocabulary {trained_with}, {tokenizer} holds "
            f"{vocab.fingerprint}; give data.tokenizer the folder that it was trained with"
        )


def check_same_words(pretrained: Path, tokenizer: Path, vocab: Vocab) -> None:
    """Raise ValueError where a pretrained model numbers its tokens otherwise than `vocab`, read from `tokenizer`.

    All would run, with the words of one for those of the other. A folder without tokenizer.json is taken on trust.
    """
    path = pretrained / "tokenizer.json"
    if not path.is_file():
        return
    try:
        numbers = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is no tokenizer of the tokenizers library: {error}") from None
    for token, number in sorted(numbers.items(), key=itemgetter(1)):
        if vocab.token(number) != token:
            raise ValueError(
                f"token {number} is {token!r} to model.init_from={pretrained} and {vocab.token(number)!r} to "
                f"{tokenizer}; make {tokenizer / 'text' / 'tokenizer.json'} from the model's own tokenizer.json, as "
                "docs/data.md says"
            )


def _check_disk(config: Config, num_parameters: int) -> None:
    # One more than are kept, since the new one is complete before the oldest goes; and the exported model.
    needed = num_parameters * (_CHECKPOINT_BYTES[config.dtype] * (config.checkpoint.keep + 1) + 4)
    written = [*(config.run / "checkpoints").rglob("*"), *(config.run / "model").rglob("*")]
    needed -= sum(path.stat().st_size for path in written if path.is_file())  # a resumed run has most of it already
    require_disk(config.run, needed, "checkpoints", "or lower checkpoint.keep")


def require_disk(folder: Path, num_bytes: int, purpose: str, alternative: str) -> None:
    """Raise ValueError where the file system of `folder` (which need not exist yet) lacks `num_bytes` for `purpose`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} needs {num_bytes / 1e6:,.0f} MB for {purpose} and its disk has {free / 1e6:,.0f} MB free; "
            f"free some space, choose another folder, {alternative}"
        )
