"""Plain ranks that validate a tiny model on a small corpus, without DeepSpeed, and write what they saw.

Used by tests/test_validation.py, in its own process too, as a world of one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from data_pipeline.loader import Loader
from data_pipeline.packing import Pack
from data_pipeline.vocab import Vocab
from tests.helpers import tiny_model
from uvlm.config import Config, SourceConfig, load_config
from uvlm.engine import Engine
from uvlm.model import UnifiedVLM
from uvlm.token_plan import TokenPlan
from uvlm.validation import Validation

CPU = torch.device("cpu")
PROMPTS = ["a red thing", "a blue thing"]


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


class PlainEngine:
    """What Validation asks of an Engine, around a model without DeepSpeed.

    A pass takes `seconds` of the clock, a pass through the head of a snapshot, one for each token that is drawn,
    `drawing_seconds`.
    """

    def __init__(self, model: UnifiedVLM, clock: Clock, seconds: float = 0.0, drawing_seconds: float = 0.0) -> None:
        self.model = model.train()
        self.clock = clock
        self.seconds, self.drawing_seconds = seconds, drawing_seconds
        self.num_calls = self.num_snapshots = 0

    def __call__(self, pack: Pack, plan: TokenPlan, weights_S: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.num_calls += 1
        self.clock.seconds += self.seconds
        logits_SV, labels_S = self.model.logits(pack, plan).float(), pack.labels[plan.supervised]
        nll_S = cross_entropy(logits_SV, labels_S, reduction="none")
        return (nll_S * weights_S).sum(), nll_S, logits_SV.argmax(dim=1) == labels_S

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def snapshot(self) -> UnifiedVLM | None:
        if dist.get_rank() != 0:
            return None
        self.num_snapshots += 1
        model = copy.deepcopy(self.model).eval()
        model.backbone.lm_head.register_forward_hook(self._drawn)
        return model

    def _drawn(self, *_: Any) -> None:
        self.clock.seconds += self.drawing_seconds


def configured(path: Path, *overrides: str) -> Config:
    """The corpus config, with both kinds of held-out documents."""
    folder = path.parent
    valid = [{"path": str(folder / task)} for task in ("understand", "generate")]
    options = {"every": 10, "steps": 2, "prompts": PROMPTS, "max_share": 0.5}
    return load_config(path, [f"data.valid={json.dumps(valid)}", f"validation={json.dumps(options)}", *overrides])


def make_loader(config: Config, vocab: Vocab) -> Callable[[Sequence[SourceConfig]], Loader]:
    """As the trainer has it: this rank's packs of some sources from their start."""

    def loader(sources: Sequence[SourceConfig]) -> Loader:
        return Loader(
            [source.source() for source in sources],
            vocab,
            pack_tokens=config.data.pack_tokens,
            num_rows=config.data.num_rows,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )

    return loader


def validation(
    config: Config, clock: Clock, should_stop: Callable[[], bool] = lambda: False, **seconds: float
) -> tuple[Validation, PlainEngine]:
    """A validation of a tiny model on this rank's rows."""
    vocab = Vocab.load(config.data.tokenizer)
    engine = PlainEngine(tiny_model(num_layers=3, policy=config.policy, vocab_size=vocab.size), clock, **seconds)
    loader = make_loader(config, vocab)
    return Validation(config, cast("Engine", engine), vocab, CPU, loader, should_stop, clock), engine


class StopOnLastRank:
    """The last rank wants to stop from its n-th question on; the answer is agreed on all ranks, as the trainer's is."""

    def __init__(self, question: int) -> None:
        self.question = question
        self.num_asked = 0

    def __call__(self) -> bool:
        self.num_asked += 1
        is_last = dist.get_rank() == dist.get_world_size() - 1
        flag = torch.tensor(float(is_last and self.num_asked >= self.question))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def run_rank(rank: int, num_ranks: int, config_path: Path, folder: Path) -> None:
    """One rank. It writes FOLDER/RANK.json, and each part of it is a promise of test_validation.py."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), num_ranks), rank=rank, world_size=num_ranks
    )
    config = configured(config_path)
    report: dict[str, Any] = {}

    whole, engine = validation(config, Clock(1.0))
    values, picture = whole.run(20)
    report["values"] = {name: value for name, value in values.items() if not name.startswith("speed/")}
    report["picture"] = None if picture is None else picture.tolist()
    report["num_calls"] = engine.num_calls

    # To its own clock, each rank but 0 has time enough; rank 0 has not.
    clock = Clock()
    costly, _ = validation(configured(config_path, "validation.prompts=[]"), clock, seconds=1.0)
    costly.run(10)
    clock.seconds += 0.0 if rank == 0 else 1e6
    report["is_due"] = [costly.is_due(step) for step in (11, 10, 20)]
    clock.seconds += 1e6
    report["is_due"] += [costly.is_due(10)]

    stop = StopOnLastRank(2)
    stopped, engine = validation(config, Clock(), stop)
    report["stopped"] = [list(stopped.run(20)), engine.num_calls, stop.num_asked]

    # Drawing takes two seconds a token; rank 0 asks once a second.
    num_packs = 2 * len(range(rank, config.data.num_rows, num_ranks))
    stop = StopOnLastRank(num_packs + 3)
    stopped, _ = validation(config, Clock(), stop, drawing_seconds=2.0)
    values, picture = stopped.run(20)
    report["stopped_drawing"] = ["valid/understand" in values, picture is None, stop.num_asked - num_packs]

    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
