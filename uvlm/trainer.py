"""The training loop: next, forward, backward, step, log, validate, save.

One optimizer step consumes one pack of each of the G rows. A rank computes its rows one after the other (the
micro-steps of gradient accumulation), so any number of ranks that divides G sees the same global batches.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.loader import DataState, Loader
from data_pipeline.packing import Pack
from data_pipeline.vocab import Vocab
from uvlm import checkpoint, distributed, run_folder
from uvlm.collectives import from_rank_0
from uvlm.config import Config, SourceConfig
from uvlm.engine import START_TIMEOUT, Engine
from uvlm.flops import Widths
from uvlm.guard import Guard
from uvlm.life import SPARE_SECONDS, Life, Skips, Spikes, Wishes
from uvlm.losses import by_task, task_counts, task_ids, task_scales, task_sums
from uvlm.metrics import MetricWriter
from uvlm.optim import learning_rate
from uvlm.token_plan import TokenPlan
from uvlm.validation import Validation
from uvlm.watchdog import Phase, Watchdog, lower_timeout
from uvlm.window import Window

_FIRST_STEPS = 3  # of a start: slower than others, and more closely watched
_PATIENCE = 0.8  # share of the collective timeout after which ranks that wait are reported


class Trainer:
    """The loop and what each of its steps needs.

    Args:
        fixed: what `checkpoint.fixed_values` gave for this run.
        position: where the run stands.
        started: when this start began, by `time.monotonic`.
        trust: checkpoints that are not this user's own may be opened (trust.py).
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        vocab: Vocab,
        device: torch.device,
        fixed: dict[str, Any],
        position: checkpoint.Position,
        widths: Widths,
        started: float,
        trust: bool,
    ) -> None:
        self.config = config
        self.trust = trust
        self.engine = engine
        self.vocab = vocab
        self.device = device
        self.fixed = fixed
        self.widths = widths
        quarantine = config.run / "quarantine" / f"rank_{distributed.world().rank}.jsonl"
        self.loader = self._loader(config.data.train, config.data.num_workers, position.data_state, quarantine)
        self.saver = checkpoint.Saver(engine, config, fixed, lambda: self.watchdog.at(self.step, "save"))
        self.life = Life(config.life, config.run, started)
        self.skips = Skips(config.life.max_skipped_steps, engine.skipped_steps)
        self.spikes = Spikes(config.life.spike)
        self.validation = Validation(config, engine, vocab, device, self._loader_of_held_out, self._stop_wanted)
        self.guard = Guard(engine.module, config.life.guard_every, _FIRST_STEPS)
        self.watchdog = Watchdog(_PATIENCE * START_TIMEOUT.total_seconds(), self.guard)
        self.step = position.step
        self.window = Window(device)
        self.record: dict[str, float] = {}
        self.writer: MetricWriter | None = None
        self.num_rejected = 0.0
        self.num_rollbacks = 0
        self.is_saved = True  # no checkpoint has failed since the last one that was written
        self.saving_since: float | None = None  # by `time.perf_counter`
        self.started = 0.0  # the first step of this start, by `time.perf_counter`

    def run(self, writer: MetricWriter | None) -> bool:
        """Train to the end and write the model.

        Args:
            writer: on rank 0; None elsewhere.

        Returns:
            Whether the run was asked to stop before. Then a checkpoint is written and no model.

        Raises:
            ValueError: the ranks diverged, too many steps made no sense, or the last checkpoint could not be written.
        """
        self.writer = writer
        try:
            with self.life.listening():
                self._steps()
                is_saved = self._finish_saving()
        except RuntimeError as error:  # of a collective, say
            if sentence := self.watchdog.explain_crash():
                raise ValueError(sentence) from error
            if "gloo" in str(error) or isinstance(error, dist.DistError):
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"rank {dist.get_rank()} lost the other ranks in step {self.step + 1} ({reason}); whichever ended "
                    "first has the cause. The same command goes on from the newest checkpoint"
                ) from error
            raise
        if not is_saved:
            raise ValueError(f"the checkpoint of step {self.step} could not be written, for the reason above")
        stopped = self.step < self.config.optim.steps
        if not stopped:
            self._write_model()
        elif writer:
            print(f"stopped after step {self.step}: {self.life.reason}; the same command goes on from here", flush=True)
        self.watchdog.close()
        return stopped

    def _steps(self) -> None:
        """Next, forward, backward, step, log, validate, save."""
        config, last_step, num_done = self.config, self.config.optim.steps, 0
        self.started = time.perf_counter()
        batches = iter(self.loader)
        while self.step < last_step:
            with self._phase("data"):
                packs, data_state = next(batches)
            loss = self.train_step(packs, self.step)
            self.step, num_done = self.step + 1, num_done + 1
            if num_done == _FIRST_STEPS:
                lower_timeout(config.life.collective_timeout)
                self.watchdog.limit = _PATIENCE * config.life.collective_timeout
            if loss is not None and self.spikes.add(loss) and self.roll_back(loss, data_state):
                continue
            if self.step == 1 or self.step % config.log_every == 0 or self.step == last_step:
                seconds_a_step = (time.perf_counter() - self.started) / num_done
                self.log(self.step, seconds_a_step * (last_step - self.step), data_state)
            with self.window.paused():
                if self.validation.is_due(self.step):
                    self.validate(self.step)
                self.watchdog.at(self.step, "log")
                wishes = self.life.agree(unwritten=not self.saver.is_written)
                self.save(self.step, data_state, wishes)
            if wishes.stop:
                break

    @contextlib.contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        self.watchdog.at(self.step, name)
        with self.window.phases(name):
            yield

    def _stop_wanted(self) -> bool:
        self.watchdog.at(self.step, "validation")  # it takes long, and goes on
        return self.life.stop_wanted()

    def train_step(self, packs: list[Pack], step: int) -> float | None:
        """One optimizer step over this rank's packs: forward and backward for each, then the update.

        Returns:
            The mean loss over tasks and ranks, where somebody watches it and the update was not left out.
        """
        own_counts_K = task_counts(packs)
        counts_K = own_counts_K.to(self.device, copy=True)
        self.watchdog.at(step, "forward")  # who waits here for a slow loader is not in "data" any more
        dist.all_reduce(counts_K)
        scales_K = task_scales(counts_K, self.config.loss.weights, self.config.data.num_rows)
        self.engine.set_learning_rate(learning_rate(self.config.optim, step))
        progress = step / self.config.optim.steps
        nll_K = torch.zeros(len(counts_K), device=self.device)
        for pack in packs:
            plan = TokenPlan.of(pack, self.config.policy, self.config.model.num_layers, self.config.seed, progress)
            self.guard.begin()
            with self._phase("forward"):
                ids_S = task_ids(pack).to(self.device)
                loss, nll_S, _ = self.engine(pack.to(self.device), plan.to(self.device), scales_K[ids_S])
                nll_K += task_sums(nll_S, ids_S)
            self.guard.backward()
            with self._phase("backward"):
                self.engine.backward(loss)
            self.guard.end()
            if pack is packs[-1]:
                self.guard.compare(step)
            with self._phase("step"):
                self.engine.step()
            self.window.add_pack(pack, plan, self.widths)
        was_skipped = self.skips.add(self.engine.skipped_steps, step + 1, self.config.dtype)
        self.window.add_step(nll_K, own_counts_K, was_skipped)
        if was_skipped or not self.config.life.spike.factor:
            return None
        dist.all_reduce(nll_K)
        losses = by_task((nll_K / counts_K.clamp(min=1)).cpu(), counts_K.cpu())
        return sum(losses.values()) / max(1, len(losses))

    def save(self, step: int, data_state: DataState, wishes: Wishes) -> None:
        """Write a checkpoint where one is due or wished for; bring the one before to its end once all have written."""
        if not wishes.unwritten:
            self._finish_saving()
        if wishes.any_save or due(step, self.config.checkpoint.every, self.config.optim.steps):
            self._begin_saving(step, data_state)
        if wishes.any_save:
            self._finish_saving()
            self.life.fulfilled(wishes)

    def _begin_saving(self, step: int, data_state: DataState) -> None:
        self.saving_since = time.perf_counter()
        with self._phase("save"):
            self.is_saved = self.saver.save(step, data_state, self.record)

    def _finish_saving(self) -> bool:
        """Whether the last checkpoint is complete, if there was one; what it took is kept free in the time budget."""
        self.is_saved = self.saver.finish() and self.is_saved
        if self.saving_since is not None:
            self.life.seconds_to_stop = 2 * (time.perf_counter() - self.saving_since) + SPARE_SECONDS
            self.saving_since = None
        return self.is_saved

    def roll_back(self, loss: float, data_state: DataState) -> bool:
        """After a spike of the loss: the weights go back to the last checkpoint, the data do not. So the packs since
        then, the offending ones among them, are left out for good.

        Returns:
            Whether there was a checkpoint to go back to.

        Raises:
            ValueError: it has happened too often.
        """
        step = self.step
        self._finish_saving()
        if not from_rank_0(lambda: checkpoint.complete(self.config.run)):
            self._say_event(f"step {step}: the loss rose to {loss:.3f}, and there is no checkpoint to go back to")
            return False
        self.num_rollbacks += 1
        if self.num_rollbacks > self.config.life.spike.max_rollbacks:
            raise ValueError(
                f"the loss rose to {loss:.3f} at step {step}, after {self.num_rollbacks - 1} rollbacks of this start; "
                "lower optim.learning_rate, look at the data around it (RUN/events.jsonl), or set "
                "life.spike.max_rollbacks"
            )
        back = checkpoint.load_latest(self.engine, self.config, self.fixed, self.trust).step
        self.skips = Skips(self.config.life.max_skipped_steps, self.engine.skipped_steps)
        self.window = Window(self.device)
        if self.writer:
            self.writer.rewind(back)
        self._say_event(
            f"step {step}: the loss rose to {loss:.3f}; back to the checkpoint of step {back}, leaving out the packs "
            f"of the {step - back} steps since"
        )
        self.step = back
        self._begin_saving(back, data_state)  # or a start after a crash would read those packs again
        return True

    def _say_event(self, sentence: str) -> None:
        if self.writer:
            run_folder.note_event(self.config.run, sentence)
            print(sentence, flush=True)

    def log(self, step: int, seconds_left: float, data_state: DataState) -> None:
        self.watchdog.at(step, "log")
        rejected = Counter[str]()
        for state in data_state.values():
            rejected.update(state["rejected"])
        values = self.window.reduced(num_rejected=rejected.total())
        values["optim/learning_rate"] = learning_rate(self.config.optim, step - 1)
        values["optim/gradient_norm"] = self.engine.gradient_norm
        values["health/skipped_steps"] = self.engine.skipped_steps
        values["speed/guard_share"] = self.guard.seconds / (time.perf_counter() - self.started)
        self.record = values
        self.window = Window(self.device)
        if self.writer:
            self.writer.scalars(step, values)
            losses = "  ".join(f"{name[5:]} {value:.3f}" for name, value in values.items() if name.startswith("loss/"))
            if values["data/rejected_documents"] > self.num_rejected:
                self.num_rejected = values["data/rejected_documents"]
                print(f"{self.num_rejected:.0f} documents could not be used; of rank 0: {dict(rejected)}", flush=True)
            print(
                f"step {step}/{self.config.optim.steps}  loss: {losses or 'not finite'}  "
                f"{values['speed/tokens_per_second']:,.0f} tokens/s  {duration(seconds_left)} left",
                flush=True,
            )

    def validate(self, step: int) -> None:
        """Losses and answers on held-out packs, and pictures of the fixed prompts."""
        self.watchdog.at(step, "validation")
        values, picture = self.validation.run(step)
        if self.writer and values:
            self.writer.scalars(step, values)
            shown = {name[6:]: value for name, value in values.items() if name.startswith("valid/")}
            print(f"step {step}  validation: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)
        if self.writer and picture is not None:
            self.writer.image(step, "generated", picture)

    def _write_model(self) -> None:
        """Write the trained model as an ordinary folder, and the summary of the run."""
        self.watchdog.at(self.step, "save")
        run_folder.save_model(self.config, self.engine.module, self.vocab.fingerprint, self.engine.whole)
        if self.writer:
            run_folder.summarise(self.config.run, self.vocab.size)
            print(f"trained model: {self.config.run / 'model'}", flush=True)

    def _loader_of_held_out(self, sources: Sequence[SourceConfig]) -> Loader:
        """From the beginning. Starting workers each time would take longer than reading a few steps."""
        return self._loader(sources, num_workers=0)

    def _loader(
        self,
        sources: Sequence[SourceConfig],
        num_workers: int,
        state: DataState | None = None,
        quarantine: Path | None = None,
    ) -> Loader:
        place, data = distributed.world(), self.config.data
        return Loader(
            [source.source() for source in sources],
            self.vocab,
            pack_tokens=data.pack_tokens,
            num_rows=data.num_rows,
            rank=place.rank,
            world_size=place.size,
            num_workers=num_workers,
            seed=self.config.seed,
            max_rejected_share=data.max_rejected_share,
            quarantine=quarantine,
            state=state,
        )


def due(step: int, every: int, last_step: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step`. 0 means never."""
    return every > 0 and (step % every == 0 or step == last_step)


def duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
