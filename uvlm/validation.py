"""Validation inside the training loop: losses and answers on held-out packs, pictures of fixed prompts.

Every rank calls it in lock-step, with equal numbers of forward passes, as ZeRO-3 needs. The packs are those of the
first steps of a loader that starts anew each time, so each validation sees the same documents, on any number of ranks;
sums are taken pack by pack in the order of the packs' names, so the numbers are the same to the last bit too.

It must not eat the training: beyond `validation.max_share` of the time since the start a due validation is put off to
the next due step. Losses come first; pictures, drawn by rank 0 alone while the others wait, only where they fit beside
them. What has never been measured counts as free, so the first validation may exceed the share and the next ones wait
until it is paid; the last step's takes place whatever it costs. Rank 0's clock decides for all.

Cost (run, 25M and 126M weights, bf16, ZeRO-3 on two busy cores): a third of the time that training on the same packs
takes. For pictures 0.02 s a million weights until rank 0 has them all, then what `uvlm generate` takes. It holds one
copy of the weights, two while that is built, and lets go of it when the pictures are drawn; on a GPU the copy is moved
there and stands beside the training's own state.

Legend: S supervised tokens of a pack, A answers in it.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from uvlm.config import Config, SourceConfig
from uvlm.engine import Engine
from uvlm.generate import Generator
from uvlm.model import UnifiedVLM
from uvlm.pictures import picture_grid
from uvlm.token_plan import TokenPlan

BEAT_SECONDS = 1.0  # between signs of life of rank 0 while it draws; far below any collective's timeout
MAX_SOURCES, MAX_NAME = 32, 60  # documents name their source themselves: any number of names, of any length

Sums = dict[str, tuple[float, int]]  # metric -> (sum, what to divide it by)


class _StopError(Exception):
    """Ends the drawing on rank 0 once all ranks have agreed to stop."""


class Validation:
    """What a run measures between two steps. One object serves a start of the run; it keeps account of its time.

    Args:
        loader: makes an iterable over this rank's (packs of a step, anything) from the start of the given sources. All
            ranks get the same number of packs.
        should_stop: whether the run is to stop, agreed by all ranks, which call it together: between packs, and about
            once a second while pictures are drawn.
        clock: seconds; counts from here.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        vocab: Vocab,
        device: torch.device,
        loader: Callable[[Sequence[SourceConfig]], Iterable[tuple[list[Pack], Any]]],
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._engine = engine
        self._vocab = vocab
        self._device = device
        self._loader = loader
        self._should_stop = should_stop
        self._clock = clock
        self._policy = config.policy.at_inference()
        self._started = clock()
        self._spent = 0.0
        self._losses_seconds = 0.0  # of the last time; zero as long as it is not known
        self._pictures_seconds = 0.0
        self._last_beat = 0.0
        self._can_draw = True
        self._said: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether `run` is to be called after `step`. Every rank asks after every step and gets the same answer.

        Ranks speak to each other only in steps of `validation.every`.
        """
        options, last_step = self._config.validation, self._config.optim.steps
        if not options.every or not (self._config.data.valid or options.prompts):
            return False
        if step == last_step:
            return True
        return step % options.every == 0 and self._fits(self._losses_seconds, "validations")

    def run(self, step: int) -> tuple[dict[str, float], np.ndarray | None]:
        """Validate with the weights as they are. Every rank calls it.

        Returns:
            Values by name, and on rank 0 the grid of pictures, uint8 [height, width, 3], where some were drawn.
            valid/TASK: mean loss in nats over supervised tokens; valid/answers_right: share of answers whose every
            token is the model's first choice; valid_source/NAME: mean loss by what documents name as their source,
            where they name several. They are equal on all ranks. speed/validation_*: seconds of this rank, and its
            share of the time since the start. Where the run is to stop, what is not complete is left out.
        """
        started = self._clock()
        losses = self._losses() if self._config.data.valid else {}
        seconds = self._clock() - started
        self._spent += seconds
        if losses is None:
            return {}, None
        self._losses_seconds = seconds
        values = {**losses, "speed/validation_losses_seconds": seconds}
        picture = None
        if self._config.validation.prompts and self._may_draw(step):
            started = self._clock()
            picture = self._draw()
            self._pictures_seconds = self._clock() - started
            self._spent += self._pictures_seconds
            values["speed/validation_pictures_seconds"] = self._pictures_seconds
        values["speed/validation_share"] = self._share()
        return values, picture

    @torch.no_grad()
    def _losses(self) -> dict[str, float] | None:
        """Means over all held-out packs of all ranks; None if the run is to stop."""
        sums_by_pack: dict[tuple[int, int], Sums] = {}
        self._engine.train(False)
        try:
            for packs, _ in itertools.islice(self._loader(self._config.data.valid), self._config.validation.steps):
                for pack in packs:
                    if self._should_stop():
                        return None
                    sums_by_pack[pack.name] = self._measured(pack)
        finally:
            self._engine.train()
        everyone: list[dict[tuple[int, int], Sums]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, sums_by_pack)
        return means({name: sums for each in everyone for name, sums in each.items()})

    def _measured(self, pack: Pack) -> Sums:
        plan = TokenPlan.of(pack, self._policy, self._config.model.num_layers, progress=1.0)
        weights_S = torch.ones(len(plan.supervised), device=self._device)
        _, nll_S, right_S = self._engine(pack.to(self._device), plan.to(self._device), weights_S)
        return pack_sums(pack, plan.supervised, nll_S.cpu(), right_S.cpu())

    def _may_draw(self, step: int) -> bool:
        if step == self._config.optim.steps:
            return self._agreed(self._can_draw)
        return self._fits(self._pictures_seconds, "pictures of validation.prompts") and self._agreed(self._can_draw)

    def _draw(self) -> np.ndarray | None:
        """Pictures of the prompts on rank 0, prompt i always from seed i. The other ranks wait, and hear from it."""
        snapshot = self._engine.snapshot()
        if snapshot is None:
            while self._agreed(False):  # what rank 0 says
                if self._should_stop():
                    break
            return None
        try:
            picture = self._picture(snapshot)
        except _StopError:  # the others have heard it too
            return None
        except (torch.OutOfMemoryError, ValueError) as error:  # no reason to end a training
            self._say(f"no pictures of validation.prompts will be drawn from now on: {error}", "failure")
            self._can_draw, picture = False, None
        del snapshot
        if self._device.type == "cuda":  # NCCL and DeepSpeed also need memory that torch keeps for itself
            torch.cuda.empty_cache()
        self._agreed(False)
        return picture

    def _picture(self, snapshot: UnifiedVLM) -> np.ndarray:
        prompts = self._config.validation.prompts
        self._last_beat = self._clock()
        snapshot.backbone.lm_head.register_forward_hook(self._beat)  # called once for each token that is drawn
        tokenizer = self._config.data.tokenizer
        generator = Generator(snapshot.to(self._device), self._vocab, tokenizer, self._policy)
        return picture_grid(generator.images(prompts, range(len(prompts))), prompts)

    def _beat(self, *_: Any) -> None:
        """On rank 0: tell the others now and then that it still draws, and agree with them whether to stop."""
        if self._clock() - self._last_beat < BEAT_SECONDS:
            return
        self._agreed(True)
        if self._should_stop():
            raise _StopError
        self._last_beat = self._clock()

    def _fits(self, seconds: float, what: str) -> bool:
        """Whether so many more seconds stay within the share; every rank calls it. If not, rank 0 says it once."""
        share, largest = self._share(seconds), self._config.validation.max_share
        fits = self._agreed(share <= largest)
        if not fits:
            self._say(
                f"{what} are put off where they would take more than validation.max_share={largest} of the run's time, "
                f"here {share:.3f}; raise it, or validation.every",
                what,
            )
        return fits

    def _share(self, seconds: float = 0.0) -> float:
        """Share of the time since the start that validations have taken, were they to take so many seconds more."""
        return (self._spent + seconds) / max(self._clock() - self._started + seconds, 1e-9)

    def _agreed(self, value: bool) -> bool:
        """Rank 0's value, on all ranks; every rank calls it."""
        flag = torch.tensor([value], dtype=torch.int32, device=self._device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def _say(self, sentence: str, subject: str) -> None:
        """Print a sentence on rank 0, one on each subject."""
        if dist.get_rank() == 0 and subject not in self._said:
            self._said.add(subject)
            print(sentence, flush=True)


def pack_sums(pack: Pack, supervised_S: torch.Tensor, nll_S: torch.Tensor, right_S: torch.Tensor) -> Sums:
    """What one pack adds to each metric. All arguments lie on the host.

    An answer is a run of supervised tokens in a document of the task understand, as in evaluate.py for documents of one
    question; it is right if all of them are.

    Args:
        supervised_S: int64, positions in the pack, ascending. nll_S: fp32, in nats. right_S: bool, whether the token is
            the model's first choice.
    """
    document_S = torch.arange(len(pack.doc_task)).repeat_interleave(pack.cu_seqlens.diff())[supervised_S].numpy()
    task_S = pack.doc_task.numpy()[document_S]
    positions_S, nats_S, is_right_S = supervised_S.numpy(), nll_S.double().numpy(), right_S.numpy()
    names_S = {f"valid/{task}": task_S == number for number, task in enumerate(TASKS)}
    sources_n = np.array([source[:MAX_NAME] for source in pack.doc_source])
    for source in sorted(set(sources_n.tolist()) - {""}):
        names_S[f"valid_source/{source}"] = (sources_n == source)[document_S]
    sums = {name: (float(nats_S[is_S].sum()), int(is_S.sum())) for name, is_S in names_S.items()}
    begins_S = np.ones(len(positions_S), dtype=np.bool_)
    begins_S[1:] = np.diff(positions_S) != 1  # a document's last token predicts nothing, so no run crosses its end
    num_wrong_A = np.bincount(begins_S.cumsum()[~is_right_S] - 1, minlength=int(begins_S.sum()))
    is_asked_A = task_S[begins_S] == TASKS.index("understand")
    sums["valid/answers_right"] = (float((num_wrong_A[is_asked_A] == 0).sum()), int(is_asked_A.sum()))
    return sums


def means(sums_by_pack: dict[tuple[int, int], Sums]) -> dict[str, float]:
    """Each metric over all packs, added in the order of their names; those of nothing are left out.

    Where all documents name one source there is none by source; else of the MAX_SOURCES with the most tokens.
    """
    totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for _, sums in sorted(sums_by_pack.items()):
        for name, (value, count) in sums.items():
            totals[name] = (totals[name][0] + value, totals[name][1] + count)
    of_sources = sorted((name for name in totals if name.startswith("valid_source/")), key=lambda n: (-totals[n][1], n))
    left_out = of_sources[MAX_SOURCES:] if len(of_sources) > 1 else of_sources
    return {name: value / count for name, (value, count) in totals.items() if count and name not in left_out}
