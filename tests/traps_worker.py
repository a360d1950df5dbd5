"""The traps of ZeRO, each on real ranks: what tests/test_zero3_traps.py looks at.

    python -m tests.traps_worker FOLDER [CASE ...]

A case is a function that every one of its ranks runs. What it returns is in FOLDER/<case>.<rank>.json, what it raised
under "error"; what it wrote to standard error is beside it. Every rank of every case is forked from one process that
has imported everything, so a case may crash or hang, and costs 2 s of processor time and not a start of DeepSpeed
(10 s; run). The modules here are broken on purpose.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before torch is imported
    from uvlm.distributed import prepare_environment

    prepare_environment()

import torch
import torch.distributed as dist
from torch import nn

from tests.traps_toy import (
    NUM_RANKS,
    RATE,
    WIDTH,
    Place,
    Steps,
    Toy,
    both,
    engine_of,
    guard_says,
    harm_and_guard,
    plainly,
    rows,
    train,
    weights_of,
)
from tests.zero3_worker import CASES as MODELS
from tests.zero3_worker import STEPS, batch, build
from uvlm.guard import Guard
from uvlm.model import UnifiedVLM
from uvlm.watchdog import Watchdog, lower_timeout

HANG_SECONDS = 60  # of one case
COLLECTIVE_SECONDS = 20
BEACON_SECONDS = 0.1


class Case(NamedTuple):
    function: Callable[[Place], dict[str, Any]]
    num_ranks: int


CASES: dict[str, Case] = {}


def case(num_ranks: int = NUM_RANKS) -> Callable[..., Any]:
    def registered(function: Callable[[Place], dict[str, Any]]) -> Callable[[Place], dict[str, Any]]:
        CASES[function.__name__] = Case(function, num_ranks)
        return function

    return registered


# ---- the cases


def unused_in_a_step(stage: int, place: Place) -> dict[str, Any]:
    """b is used in the first step only."""
    return harm_and_guard([[both("ab")], [both("a")]], place, stage)


def another_task_on_each_rank(stage: int, place: Place) -> dict[str, Any]:
    return harm_and_guard([[["a", "b"]]], place, stage)


def another_order_on_each_rank(stage: int, place: Place) -> dict[str, Any]:
    return harm_and_guard([[["ab", "ba"]]], place, stage)


@case()
def first_used_in_a_later_micro_step(place: Place) -> dict[str, Any]:
    return harm_and_guard([[both("a"), both("ab")]] * 2, place, stage=3)


@case()
def another_order_for_two_steps(place: Place) -> dict[str, Any]:
    return train([[["ab", "ba"]], [["ab", "ba"]]], place, stage=3)


@contextmanager
def watched(engine: Any, place: Place, limit: float) -> Iterator[tuple[Guard, Watchdog]]:
    guard = Guard(engine.module, every=1)
    watchdog = Watchdog(limit, guard, BEACON_SECONDS)
    yield guard, watchdog
    watchdog.close()


def crash_explained(engine: Any, place: Place, forward: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """One step in which ranks call different modules: what torch raised, and what the traces say."""
    lower_timeout(3)
    with watched(engine, place, limit=1e9) as (guard, watchdog):
        watchdog.at(0, "forward")
        guard.begin()
        try:
            loss = forward()
            watchdog.at(0, "backward")
            guard.backward()
            engine.backward(loss)
            guard.end()
            engine.step()
        except Exception as error:
            explained = watchdog.explain_crash(patience=8)
            return {"raised": str(error), "explained": explained}
    return {"raised": None, "explained": None}


@case()
def skipped_on_one_rank(place: Place) -> dict[str, Any]:
    engine = engine_of(Toy(), stage=3)
    return crash_explained(engine, place, lambda: engine(rows(0, 0, place.rank), ["ab", "a"][place.rank]))


@case()
def head_called_once_a_chunk(place: Place) -> dict[str, Any]:
    engine = engine_of(Toy(), stage=3)
    return crash_explained(engine, place, lambda: engine(rows(0, 0, place.rank), "ab", num_chunks=2 + place.rank))


class Broken(UnifiedVLM):
    """Leaves out the FFN of layer 1 on rank 1."""

    def feed_forward(self, number: int, hidden_D: torch.Tensor) -> torch.Tensor:
        if number == 1 and dist.get_rank() == 1:
            return hidden_D
        return super().feed_forward(number, hidden_D)


@case()
def our_model_broken(place: Place) -> dict[str, Any]:
    """Every rank has the same pack, so that nothing else can differ."""
    model = build(MODELS["dense-tied"])
    model.__class__ = Broken
    engine = engine_of(model, stage=3)
    return crash_explained(engine, place, lambda: engine(*batch(MODELS["dense-tied"], 0, 0, 0))[0])


@case()
def one_batch_more_on_one_rank(place: Place) -> dict[str, Any]:
    """Rank 1 makes a second micro-step; rank 0 has gone on to save."""
    engine = engine_of(Toy(), stage=3)
    with watched(engine, place, limit=1.0) as (guard, watchdog):
        try:
            for number in range(1 + place.rank):
                watchdog.at(0, "forward")
                guard.begin()
                loss = engine(rows(0, number, place.rank), "ab")
                engine.backward(loss)
                guard.end()
                engine.step()
                lower_timeout(8)
            watchdog.at(0, "save")
            dist.barrier()
        except Exception as error:
            return {"raised": str(error)}
    return {"raised": None}


@case()
def loss_that_forgets_the_averaging(place: Place) -> dict[str, Any]:
    """The sum over all rows divided by their number, as one process does it; with and without undoing ZeRO's means."""
    steps: Steps = [[both("ab"), both("ab")]]
    right = plainly(steps, place.num_ranks)["updates"][0]
    ratios = {}
    for name, factor in (("forgotten", 1), ("undone", place.num_ranks * 2)):
        engine = engine_of(Toy(), 3, accumulation=2)
        before = weights_of(engine)
        for micro_step in range(2):
            x = rows(0, micro_step, place.rank)
            engine.backward(engine(x, "ab") * len(x) * factor / (len(x) * place.num_ranks * 2))
            engine.step()
        after = weights_of(engine)
        ratios[name] = ((before["a.weight"] - after["a.weight"]) / RATE).norm().item() / right["a.weight"].norm().item()
    return ratios


class Words(nn.Module):
    def __init__(self, num_words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(num_words, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids)).pow(2).mean()


def vocabulary_grown_after_the_start(stage: int, _: Place) -> dict[str, Any]:
    """The embedding is replaced by a larger one when DeepSpeed already has the parameters."""
    engine = engine_of(Words(8), stage)
    guard = Guard(engine.module, every=1)
    grown = nn.Embedding(10, WIDTH)
    engine.module.embed = grown
    before, says = grown.weight.detach().clone(), None
    for _step in range(3):
        guard.begin()
        engine.backward(engine(torch.arange(10)))
        says = guard_says(guard.end)
        engine.step()
    gradient = grown.weight.grad
    return {
        "update": (grown.weight - before).abs().max().item(),
        "gradient": gradient.norm().item() if gradient is not None else 0.0,
        "guard": says,
    }


@case()
def initialised_inside_zero_init(place: Place) -> dict[str, Any]:
    """First losses of a fresh model of `transformers`, built outside and inside of zero.Init."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    zero = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    losses = {}
    for name in ("outside", "inside"):
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=zero, enabled=name == "inside"):
            model = AutoModelForCausalLM.from_config(config)
        engine = engine_of(model, stage=3)
        ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1))
        losses[name] = engine(input_ids=ids, labels=ids).loss.item()
    return losses


@case()
def saved_by_two_ranks(place: Place) -> dict[str, Any]:
    engine = engine_of(Toy(), stage=3)
    engine.save_checkpoint(str(place.folder / "checkpoint"), tag="two")
    return {}


@case(num_ranks=1)
def loaded_by_one_rank(place: Place) -> dict[str, Any]:
    engine = engine_of(Toy(), stage=3)
    engine.load_checkpoint(str(place.folder / "checkpoint"), tag="two")
    return {}


def ours(name: str, stage: int, place: Place) -> dict[str, Any]:
    """Our model under the guard, on two ranks that hold different tasks."""
    kind = MODELS[name]
    model = build(kind)
    engine = engine_of(model, stage, kind.accumulation)
    guard = Guard(model, every=1)
    num_events: list[int] = []
    for step, micro_steps in enumerate(STEPS[kind.accumulation]):
        for micro_step in range(len(micro_steps)):
            guard.begin()
            loss, *_ = engine(*batch(kind, step, micro_step, place.rank))
            guard.backward()
            engine.backward(loss)
            guard.end()
            num_events.append(len(guard.trace()["events"]))
            engine.step()
        guard.compare(step)
    return {"events": num_events}


OURS = {
    "joint-own_projections-accumulation_2": 1,
    "joint-recompute_selective": 2,  # its embeddings are tied, its accumulation is 2
    "joint-own_projections-accumulation_1": 3,
    "joint-recompute_full": 3,
}
for _name, _number in OURS.items():
    CASES[f"ours-{_name}"] = Case(partial(ours, _name, _number), NUM_RANKS)
_EACH_STAGE: list[tuple[Callable[[int, Place], dict[str, Any]], Sequence[int]]] = [
    (unused_in_a_step, (1, 2, 3)),
    (another_task_on_each_rank, (1, 2)),
    (another_order_on_each_rank, (1, 2, 3)),
    (vocabulary_grown_after_the_start, (2, 3)),
]
for _function, _stages in _EACH_STAGE:
    for _stage in _stages:
        CASES[f"{_function.__name__}-stage_{_stage}"] = Case(partial(_function, _stage), NUM_RANKS)


# ---- how they are run


def run(name: str, folder: Path) -> None:
    """Fork the ranks of a case and wait for them; what hangs is killed, and leaves no result."""
    ranks = [os.fork() or _be_rank(name, rank, folder) for rank in range(CASES[name].num_ranks)]
    deadline = time.monotonic() + HANG_SECONDS
    while ranks:
        ranks = [pid for pid in ranks if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _be_rank(name: str, rank: int, folder: Path) -> int:
    """One rank, from the process group to the end of the process."""
    errors = os.open(folder / f"{name}.{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    faulthandler.dump_traceback_later(HANG_SECONDS - 5, exit=True)
    num_ranks = CASES[name].num_ranks
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # nothing listens there: the store is a file
    store = dist.FileStore(str(folder / f"{name}.store"), num_ranks)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        from uvlm.engine import start

        start()
        result = CASES[name].function(Place(rank, num_ranks, folder))
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    os._exit(0)


def main(folder: Path, names: Sequence[str]) -> None:
    import deepspeed  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage whenever it starts: not what has been imported
    for name in names or CASES:
        started = time.monotonic()
        run(name, folder)
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
