"""A start of a run: what could refuse it is asked, the model is built where it will live, and the loop takes over."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch.distributed as dist

from data_pipeline.vocab import Vocab
from uvlm import checkpoint, distributed, run_folder
from uvlm import engine as deepspeed_engine
from uvlm.backbone import DTYPES, build_backbone, use_fused_kernels, weights_folder
from uvlm.check import check
from uvlm.collectives import from_rank_0
from uvlm.config import Config, dump_config
from uvlm.deepspeed_config import zero_stage
from uvlm.engine import Engine
from uvlm.flops import Widths
from uvlm.life import EXIT_STOPPED
from uvlm.metrics import MetricWriter
from uvlm.model import UnifiedVLM
from uvlm.preflight import preflight
from uvlm.trainer import Trainer
from uvlm.weights import Weights, fill, freeze


def train(config: Config, trust: bool = False, preflight: bool = False) -> int:
    """Run to `optim.steps`, from the newest checkpoint of the run folder if it has one. Every rank calls this.

    Args:
        trust: go on from a checkpoint that is not this user's own (trust.py).
        preflight: let the ranks look at nodes, data and links first (preflight.py).

    Returns:
        The exit code: 0, or EXIT_STOPPED where the run was asked to stop and has written a checkpoint.
    """
    started = time.monotonic()
    place = distributed.world()
    tree = None if preflight else check(config, place.size)
    with run_folder.held(config.run) if place.rank == 0 else contextlib.nullcontext():
        return _train(config, tree, place, started, trust)


def _train(config: Config, tree: dict[str, Any] | None, place: distributed.World, started: float, trust: bool) -> int:
    """`tree`: the complete DeepSpeed config, where `check` has been passed; None to do so after a preflight."""
    distributed.end_with_launcher()
    device = deepspeed_engine.start()
    if tree is None:
        preflight(config, device)
        tree = check(config, place.size)
    vocab = Vocab.load(config.data.tokenizer)
    model, first_words = build(config, vocab, tree)
    widths = Widths.of(model.backbone.config)
    engine = Engine(model, config, tree)
    fixed = checkpoint.fixed_values(config, vocab.fingerprint, zero_stage(tree))
    position = checkpoint.load_latest(engine, config, fixed, trust)
    trainer = Trainer(config, engine, vocab, device, fixed, position, widths, started, trust)
    # Nothing has been written yet: whatever could refuse this start has had its say.
    if place.rank != 0:
        was_stopped = trainer.run(None)
    else:
        print(_headline(config, model, vocab, place.size), flush=True)
        run_folder.prepare(config, tree)
        if position.step < config.optim.steps:
            run_folder.forget_results(config.run)
        with MetricWriter(config.run, position.step) as writer:
            if first_words:
                print(first_words, flush=True)
            writer.text(position.step, "config", f"```yaml\n{dump_config(config)}```")
            was_stopped = trainer.run(writer)
    dist.barrier()  # once a rank has ended with EXIT_STOPPED, launchers end the others: not before all is written
    dist.destroy_process_group()
    return EXIT_STOPPED if was_stopped else 0


def build(config: Config, vocab: Vocab, tree: dict[str, Any]) -> tuple[UnifiedVLM, str]:
    """The model of a run, with the values it starts from, and a sentence that says where they come from.

    Under ZeRO-3 each rank holds its share from the first moment. Where a checkpoint is to be loaded, nothing is read or
    drawn: it brings everything.

    Args:
        tree: the complete DeepSpeed config.
    """
    with deepspeed_engine.partitioned(tree):
        backbone = build_backbone(config.model, vocab.size, DTYPES[config.dtype])
        backbone.tie_weights()
        model = UnifiedVLM(backbone, config.policy, config.recompute)
    use_fused_kernels(backbone)
    backbone.lm_head.z_loss = config.loss.z_loss
    sentences = []
    if not from_rank_0(lambda: checkpoint.complete(config.run)):
        folder = weights_folder(config.model.init_from) if config.model.init_from else None
        weights = Weights(folder) if folder else None
        sentences.append(fill(model, config.seed, weights, deepspeed_engine.gathered).sentence(folder))
    if num_frozen := freeze(model, config.model.freeze):
        sentences.append(f"{num_frozen / 1e6:.1f}M weights are frozen")
    return model, "; ".join(sentences)


def _headline(config: Config, model: UnifiedVLM, vocab: Vocab, world_size: int) -> str:
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return (
        f"{num_parameters / 1e6:.1f}M parameters, vocabulary {vocab.size}, {world_size} rank(s), "
        f"{config.data.num_rows} packs of {config.data.pack_tokens} tokens a step, policy {config.policy.title}, "
        f"{config.dtype}, run folder {config.run}"
    )
