"""The training loop: next, forward, backward, step, log, save.

One optimizer step consumes one pack of each of the G rows. A rank computes its rows one after the other (the
micro-steps of gradient accumulation), so any number of ranks that divides G sees the same global batches.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from data_pipeline.loader import DataState, Loader
from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from uvlm import checkpoint, distributed, run_folder
from uvlm import engine as deepspeed_engine
from uvlm.backbone import build_backbone, use_fused_kernels
from uvlm.check import check
from uvlm.config import Config, SourceConfig, dump_config
from uvlm.engine import Engine
from uvlm.flops import Widths, dense_flops, flops
from uvlm.losses import by_task, task_counts, task_ids, task_scales, task_sums
from uvlm.metrics import MetricWriter
from uvlm.model import UnifiedVLM
from uvlm.optim import learning_rate
from uvlm.token_plan import TokenPlan


class Window:
    """Sums over the steps since the last record, on this rank. They are reduced over ranks only for a record."""

    def __init__(self, device: torch.device) -> None:
        self.nll_K = torch.zeros(len(TASKS), dtype=torch.float64, device=device)
        self.counts_K = torch.zeros(len(TASKS), dtype=torch.float64)
        self.num_tokens = 0  # of documents; the unused tail of a pack does not count
        self.num_places = 0  # tokens that the packs could hold
        self.num_packs = 0
        self.query_shares = 0.0
        self.image_query_shares = 0.0
        self.flops = 0
        self.dense_flops = 0
        self.data_wait = 0.0
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not training does not count as time of the window."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def add(self, pack: Pack, plan: TokenPlan, widths: Widths, sums_K: torch.Tensor) -> None:
        self.nll_K += sums_K.detach()
        self.num_tokens += num_useful_tokens(pack)
        self.num_places += len(pack.ids)
        self.num_packs += 1
        self.query_shares += plan.query_share
        self.image_query_shares += plan.image_query_share
        self.flops += flops(plan, widths).total
        self.dense_flops += dense_flops(plan, widths)

    def reduced(self, num_rejected: int) -> dict[str, float]:
        """The record of these steps over all ranks; every rank calls it, with the documents its rows have left out."""
        seconds = time.perf_counter() - self.started
        sums = torch.tensor(
            [
                self.num_tokens,
                self.num_places,
                self.query_shares,
                self.image_query_shares,
                self.num_packs,
                self.flops,
                self.dense_flops,
                self.data_wait,
                num_rejected,
            ],
            dtype=torch.float64,
        )
        totals = torch.cat([self.nll_K.cpu(), self.counts_K, sums]).to(self.nll_K.device)
        dist.all_reduce(totals)
        num_tasks = len(TASKS)
        nll_K, counts_K, rest = totals.cpu().split([num_tasks, num_tasks, len(sums)])
        num_tokens, num_places, queries, image_queries, num_packs, spent, dense, data_wait, all_rejected = rest.tolist()
        losses = by_task(nll_K / counts_K.clamp(min=1), counts_K)
        return {
            "loss/mean": sum(losses.values()) / max(1, len(losses)),
            **{f"loss/{task}": value for task, value in losses.items()},
            "roles/query_share": queries / num_packs,
            "roles/image_query_share": image_queries / num_packs,
            "roles/flop_share": spent / dense,
            "speed/tokens_per_second": num_tokens / seconds,
            "speed/data_wait_share": data_wait / dist.get_world_size() / seconds,
            "data/fill_share": num_tokens / num_places,
            "data/rejected_documents": all_rejected,
        }


def train(config: Config) -> None:
    """Run to `optim.steps`, from the newest checkpoint of the run folder if it has one. Every rank calls this."""
    place = distributed.world()
    tree = check(config, place.size)
    with run_folder.held(config.run) if place.rank == 0 else contextlib.nullcontext():
        _train(config, tree, place)


def _train(config: Config, tree: dict[str, Any], place: distributed.World) -> None:
    distributed.end_with_torchrun()
    device = deepspeed_engine.start()
    vocab = Vocab.load(config.data.tokenizer)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model, vocab.size)
    use_fused_kernels(backbone)
    model = UnifiedVLM(backbone, config.policy, config.recompute)
    if config.model.pretrained:
        start_from_projections(model, config.model.pretrained)
    headline = _headline(config, model, vocab, place.size)
    engine = Engine(model, config, tree)
    position = checkpoint.load_latest(engine, config.run)
    fixed = checkpoint.fixed_values(config, vocab.fingerprint, deepspeed_engine.zero_stage(tree))
    trainer = Trainer(config, engine, vocab, device, fixed, position, Widths.of(backbone.config))
    # Nothing has been written yet: whatever could refuse this start has had its say.
    if place.rank != 0:
        trainer.run(None)
        return
    print(headline, flush=True)
    run_folder.prepare(config, tree)
    if position.step < config.optim.steps:
        run_folder.forget_results(config.run)
    with MetricWriter(config.run, position.step) as writer:
        if position.step:
            print(f"resumed at step {position.step} of {config.optim.steps}", flush=True)
        writer.text(position.step, "config", f"```yaml\n{dump_config(config)}```")
        trainer.run(writer)


def start_from_projections(model: UnifiedVLM, pretrained: Path) -> None:
    """Take over the image projections that stand beside pretrained weights, if there are any.

    ValueError where they are others than the model's policy has.
    """
    if not (pretrained / run_folder.IMAGE_PROJECTIONS).exists():
        return
    try:
        run_folder.load_image_projections(model, pretrained)
    except (RuntimeError, SafetensorError):
        raise ValueError(
            f"model.pretrained={pretrained} has image projections of its own, which are not those of this policy; give "
            f"the policy it was trained with, or remove its {run_folder.IMAGE_PROJECTIONS}"
        ) from None


class Trainer:
    """The loop and what each of its steps needs. The writer is None on every rank but 0."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        vocab: Vocab,
        device: torch.device,
        fixed: dict[str, Any],
        position: checkpoint.Position,
        widths: Widths,
    ) -> None:
        self.config = config
        self.engine = engine
        self.vocab = vocab
        self.device = device
        self.fixed = fixed
        self.first_step = position.step
        quarantine = config.run / "quarantine" / f"rank_{distributed.world().rank}.jsonl"
        self.loader = self._loader(config.data.train, position.data_state, quarantine)
        self.window = Window(device)
        self.widths = widths
        self.num_rejected = 0.0

    def run(self, writer: MetricWriter | None) -> None:
        """Next, forward, backward, step, log, save."""
        config, step, last_step = self.config, self.first_step, self.config.optim.steps
        started = time.perf_counter()
        batches = iter(self.loader)
        while step < last_step:
            waited = time.perf_counter()
            packs, data_state = next(batches)
            self.window.data_wait += time.perf_counter() - waited
            self.train_step(packs, step)
            step += 1
            if step == 1 or step % config.log_every == 0 or step == last_step:
                seconds_a_step = (time.perf_counter() - started) / (step - self.first_step)
                self.log(step, seconds_a_step * (last_step - step), data_state, writer)
            with self.window.paused():
                if due(step, config.validation.every, last_step):
                    self.validate(step, writer)
                if due(step, config.checkpoint.every, last_step):
                    checkpoint.save(self.engine, config, step, data_state, self.fixed)
        self.finish()

    def train_step(self, packs: list[Pack], step: int) -> None:
        """One optimizer step over this rank's packs: forward and backward for each, then the update."""
        counts_K = task_counts(packs)
        self.window.counts_K += counts_K
        counts_K = counts_K.to(self.device)
        dist.all_reduce(counts_K)
        scales_K = task_scales(counts_K, self.config.loss.weights, self.config.data.num_rows)
        self.engine.set_learning_rate(learning_rate(self.config.optim, step))
        progress = step / self.config.optim.steps
        for pack in packs:
            plan = TokenPlan.of(pack, self.config.policy, self.config.model.num_layers, self.config.seed, progress)
            loss, sums_K = self._forward(pack, plan, scales_K)
            self.engine.backward(loss)
            self.engine.step()
            self.window.add(pack, plan, self.widths, sums_K)

    def log(self, step: int, seconds_left: float, data_state: DataState, writer: MetricWriter | None) -> None:
        rejected = Counter[str]()
        for state in data_state.values():
            rejected.update(state["rejected"])
        values = self.window.reduced(num_rejected=rejected.total())
        values["optim/learning_rate"] = learning_rate(self.config.optim, step - 1)
        values["optim/gradient_norm"] = self.engine.gradient_norm
        values["health/skipped_steps"] = self.engine.skipped_steps
        self.window = Window(self.device)
        if writer:
            writer.scalars(step, values)
            losses = "  ".join(f"{name[5:]} {value:.3f}" for name, value in values.items() if name.startswith("loss/"))
            if values["data/rejected_documents"] > self.num_rejected:
                self.num_rejected = values["data/rejected_documents"]
                print(f"{self.num_rejected:.0f} documents could not be used; of rank 0: {dict(rejected)}", flush=True)
            print(
                f"step {step}/{self.config.optim.steps}  loss: {losses}  "
                f"{values['speed/tokens_per_second']:,.0f} tokens/s  {duration(seconds_left)} left",
                flush=True,
            )

    @torch.no_grad()
    def validate(self, step: int, writer: MetricWriter | None) -> None:
        """Loss by task on held-out packs, with the roles of the finished model, and pictures of the fixed prompts."""
        self.engine.train(False)
        policy, num_layers = self.config.policy.at_inference(), self.config.model.num_layers
        scales_K = torch.ones(len(TASKS), device=self.device)
        totals = torch.zeros(2, len(TASKS), dtype=torch.float64, device=self.device)
        if self.config.data.valid:
            for packs, _ in itertools.islice(self._loader(self.config.data.valid), self.config.validation.steps):
                totals[1] += task_counts(packs).to(self.device)
                for pack in packs:
                    totals[0] += self._forward(pack, TokenPlan.of(pack, policy, num_layers, progress=1.0), scales_K)[1]
        dist.all_reduce(totals)
        self.engine.train()
        nll_K, counts_K = totals.cpu()
        values = {f"valid/{task}": loss for task, loss in by_task(nll_K / counts_K.clamp(min=1), counts_K).items()}
        snapshot = self.engine.snapshot() if self.config.validation.prompts else None
        if writer:
            writer.scalars(step, values)
            print(f"step {step}  validation: " + "  ".join(f"{k[6:]} {v:.3f}" for k, v in values.items()), flush=True)
            if snapshot:
                from uvlm.generate import Generator
                from uvlm.pictures import picture_grid

                prompts = self.config.validation.prompts
                generator = Generator(snapshot.to(self.device), self.vocab, self.config.data.tokenizer, policy)
                images = generator.images(prompts, range(len(prompts)))
                writer.image(step, "generated", picture_grid(images, prompts))
        dist.barrier()

    def finish(self) -> None:
        """Write the trained model as an ordinary folder, and the summary of the run."""
        snapshot = self.engine.snapshot()
        if snapshot:
            run_folder.save_model(self.config, snapshot, self.vocab.fingerprint)
            run_folder.summarise(self.config.run, self.vocab.size)
            print(f"trained model: {self.config.run / 'model'}", flush=True)
        dist.barrier()
        dist.destroy_process_group()

    def _forward(self, pack: Pack, plan: TokenPlan, scales_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, scaled by task, and the cross-entropy summed by task over supervised tokens, fp32 [K]."""
        ids_S = task_ids(pack).to(self.device)
        loss, nll_S = self.engine(pack.to(self.device), plan.to(self.device), scales_K[ids_S])
        return loss, task_sums(nll_S, ids_S)

    def _loader(
        self, sources: Sequence[SourceConfig], state: DataState | None = None, quarantine: Path | None = None
    ) -> Loader:
        place, data = distributed.world(), self.config.data
        return Loader(
            [source.source() for source in sources],
            self.vocab,
            pack_tokens=data.pack_tokens,
            num_rows=data.num_rows,
            rank=place.rank,
            world_size=place.size,
            num_workers=data.num_workers,
            seed=self.config.seed,
            max_rejected_share=data.max_rejected_share,
            quarantine=quarantine,
            state=state,
        )


def due(step: int, every: int, last_step: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step`. 0 means never."""
    return every > 0 and (step % every == 0 or step == last_step)


def num_useful_tokens(pack: Pack) -> int:
    """Tokens of documents; the unused tail does not count."""
    return int(pack.cu_seqlens.diff()[pack.doc_task >= 0].sum())


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _headline(config: Config, model: UnifiedVLM, vocab: Vocab, world_size: int) -> str:
    num_parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{num_parameters / 1e6:.1f}M parameters, vocabulary {vocab.size}, {world_size} rank(s), "
        f"{config.data.num_rows} packs of {config.data.pack_tokens} tokens a step, policy {config.policy.title}, "
        f"{config.dtype}, run folder {config.run}"
    )
