"""What can be known before a run starts: refused here in one sentence, not by sixty-four ranks in an hour."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer

from data_pipeline.sources import open_sources
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab
from uvlm import checkpoint
from uvlm.attention import missing_backend
from uvlm.backbone import build_backbone, weights_folder
from uvlm.bad_optimizer import bad_optimizer
from uvlm.config import Config
from uvlm.deepspeed_config import complete, find_faults, read_deepspeed_json, without, zero_stage
from uvlm.engine import compiler_missing
from uvlm.finding import Finding, refuse
from uvlm.known_bad import Facts, known_bad
from uvlm.model import UnifiedVLM
from uvlm.weights import Weights, check_weights, freeze

T = TypeVar("T")

# Weights in training dtype, and in fp32 the master copy and two Adam moments.
_CHECKPOINT_BYTES = {"bf16": 2 + 12, "fp16": 2 + 12, "fp32": 4 + 12}


@dataclass
class Checked:
    """What was found, and what was learned on the way; None where it could not be.

    `tree` is the complete DeepSpeed config, without the user's keys that have faults, `shapes` the number of elements
    of each parameter, `disk` the bytes needed and free.
    """

    findings: list[Finding]
    user_tree: dict[str, Any] | None = None
    tree: dict[str, Any] | None = None
    vocab: Vocab | None = None
    shapes: tuple[int, ...] = ()
    documents: dict[str, int] = field(default_factory=dict)
    disk: tuple[float, float] | None = None

    def ask(self, key: str, question: Callable[..., T], *arguments: Any) -> T | None:
        """The answer; where there is none, a finding about `key`."""
        try:
            return question(*arguments)
        except (ValueError, OSError) as error:
            self.findings.append(Finding("error", key, str(error)))
            return None


def check(
    config: Config,
    world_size: int,
    data_is_there: bool = True,
    on_gpus: bool | None = None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """Raise ValueError with a remedy where the run cannot work: ranks, JSON, compiler, data, checkpoints, disk.

    Returns the complete DeepSpeed config. Arguments are those of `look`.
    """
    checked = look(config, world_size, data_is_there, on_gpus, ranks_per_node)
    refuse(checked.findings)
    assert checked.tree is not None
    return checked.tree


def look(
    config: Config,
    world_size: int,
    data_is_there: bool = True,
    on_gpus: bool | None = None,
    ranks_per_node: int | None = None,
    gpu_memory: float | None = None,
) -> Checked:
    """Everything that can be known before a run starts, each thing asked by itself: a fault hides no other.

    Args:
        data_is_there: False where another job is still to make the shards: those that are not there are no error.
        on_gpus: whether the run will have GPUs; as this machine has them, unless given.
        ranks_per_node: where the run goes over nodes of a known size.
        gpu_memory: bytes of one GPU, if known.
    """
    checked = Checked([])
    is_here = on_gpus is None
    on_gpus = torch.cuda.is_available() if on_gpus is None else on_gpus
    checked.ask("data.num_rows", _check_rows, config, world_size, ranks_per_node)
    checked.ask("data.num_workers", _check_workers, config, world_size)
    checked.ask("data.pack_tokens", _check_length, config)
    checked.ask("policy.full_tail", check_full_tail, config.policy.full_tail, config.optim.steps)
    checked.ask("dtype", _check_machine, config, on_gpus, is_here)
    checked.user_tree = checked.ask("deepspeed", read_deepspeed_json, config.deepspeed)
    checked.vocab = checked.ask("data.tokenizer", Vocab.load, config.data.tokenizer)
    if checked.vocab:
        _look_at_model(checked, config, checked.vocab)
    if data_is_there:
        _look_at_data(checked, config)
    if checked.user_tree is not None:
        faults = find_faults(checked.user_tree, config.model_dump(mode="json"))
        checked.findings += faults
        checked.tree = complete(without(checked.user_tree, faults), config, world_size)
        if "stage" in checked.tree["zero_optimization"]:
            facts = Facts(config, checked.tree, world_size, on_gpus, ranks_per_node, checked.shapes, gpu_memory)
            checked.findings += [*known_bad(facts), *bad_optimizer(facts)]
            if checked.vocab:
                start = (config, checked.vocab.fingerprint, zero_stage(checked.tree))
                if fixed := checked.ask("model.init_from", checkpoint.fixed_values, *start):
                    checked.ask("run", checkpoint.check_fits, config, fixed)
    file = next((path for path in (config.run, *config.run.parents) if path.exists() and not path.is_dir()), None)
    if file:
        sentence = f"run={config.run}: {file} is a file; give the path of a folder"
        checked.findings.append(Finding("error", "run", sentence))
    elif checked.shapes:
        checked.disk = disk_bytes(config, sum(checked.shapes)), free_bytes(config.run)
        advice = "or lower checkpoint.keep"
        checked.ask("checkpoint.keep", require_disk, config.run, checked.disk[0], "checkpoints", advice)
    checked.findings = list(dict.fromkeys(checked.findings))
    return checked


def _look_at_model(checked: Checked, config: Config, vocab: Vocab) -> None:
    """The model on the meta device, and what it starts from."""
    if model := checked.ask("model", _meta_model, config, vocab):
        checked.shapes = tuple(parameter.numel() for parameter in model.parameters())
        checked.ask("model.freeze", freeze, model, config.model.freeze)
        if config.model.init_from:
            start = (config.model.init_from, model, config.data.tokenizer, vocab)
            checked.ask("model.init_from", check_start, *start)


def _look_at_data(checked: Checked, config: Config) -> None:
    for name, configs in (("train", config.data.train), ("valid", config.data.valid)):
        sources = [one.source() for one in configs]
        vocab = checked.vocab
        opened = checked.ask(f"data.{name}", open_sources, sources, vocab) if sources and vocab else None
        if opened:
            checked.documents |= {f"{name}: {one.source.name}": len(one.split) for one in opened}
        else:  # each by itself: all faults, and those without a tokenizer too
            for source in sources:
                checked.ask(f"data.{name}", Split.open, source.path, vocab.image_tokenizer if vocab else None)


def _meta_model(config: Config, vocab: Vocab) -> UnifiedVLM:
    with torch.device("meta"):
        return UnifiedVLM(build_backbone(config.model, vocab.size), config.policy)


def _check_rows(config: Config, world_size: int, ranks_per_node: int | None) -> None:
    num_rows = config.data.num_rows
    if num_rows % world_size == 0:
        return
    divisors = sorted(size for size in range(1, num_rows + 1) if num_rows % size == 0)
    nearest = sorted(sorted(divisors, key=lambda size: abs(size - world_size))[:4])
    above = -(-num_rows // world_size) * world_size
    rows = [str(size) for size in (above, above - world_size) if size]
    nodes = [size // ranks_per_node for size in divisors if size % ranks_per_node == 0] if ranks_per_node else []
    sentence = (
        f"data.num_rows={num_rows} does not divide over {world_size} ranks; start "
        f"{' or '.join(map(str, nearest))} ranks, or set data.num_rows={' or '.join(rows)}"
    )
    if nodes:
        nodes = sorted(sorted(nodes, key=lambda size: abs(size * (ranks_per_node or 1) - world_size))[:3])
        sentence += f"; of {ranks_per_node} ranks a node, {' or '.join(map(str, nodes))} nodes fit"
    raise ValueError(sentence)


def _check_workers(config: Config, world_size: int) -> None:
    rows_a_rank = config.data.num_rows // world_size
    is_even = config.data.num_rows % world_size == 0
    if config.data.num_workers and is_even and rows_a_rank % config.data.num_workers:
        raise ValueError(
            f"data.num_workers={config.data.num_workers} does not divide the {rows_a_rank} rows of a rank; "
            f"set data.num_workers={rows_a_rank}, or 0"
        )


def _check_length(config: Config) -> None:
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


def _check_machine(config: Config, on_gpus: bool, is_here: bool) -> None:
    if not on_gpus and (sentence := compiler_missing()):
        raise ValueError(sentence)
    if config.dtype == "fp16" and not on_gpus:
        raise ValueError("DeepSpeed trains with dtype=fp16 on GPUs only; use dtype=bf16")
    if is_here and (sentence := missing_backend(config.dtype)):
        raise ValueError(sentence)


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


def disk_bytes(config: Config, num_parameters: int) -> float:
    """What the run still writes at most: checkpoints and the exported model."""
    # One more than are kept, since the new one is complete before the oldest goes; and the exported model.
    needed = num_parameters * (_CHECKPOINT_BYTES[config.dtype] * (config.checkpoint.keep + 1) + 4)
    written = [*(config.run / "checkpoints").rglob("*"), *(config.run / "model").rglob("*")]
    # A resumed run has most of it already.
    return max(0, needed - sum(path.stat().st_size for path in written if path.is_file()))


def free_bytes(folder: Path) -> float:
    """Of the file system of `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_disk(folder: Path, num_bytes: int, purpose: str, alternative: str) -> None:
    """Raise ValueError where the file system of `folder` (which need not exist yet) lacks `num_bytes` for `purpose`."""
    if (free := free_bytes(folder)) < num_bytes:
        raise ValueError(
            f"{folder} needs {num_bytes / 1e6:,.0f} MB for {purpose} and its disk has {free / 1e6:,.0f} MB free; "
            f"free some space, choose another folder, {alternative}"
        )
