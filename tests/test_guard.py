"""The guard names the parameter without a gradient and the first module that ranks call differently, and is silent
about our own model. On real DeepSpeed ranks: test_zero3_traps.py."""

from __future__ import annotations

import multiprocessing
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zero3_worker import CASES, STEPS, batch, build
from uvlm.guard import Guard, GuardError, hook_seconds


class Two(nn.Module):
    """first -> a and b, as far as they are asked for -> last. `recompute` calls a again in the backward pass."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.recompute = recompute

    def forward(self, route: str = "ab", unused: str = "") -> torch.Tensor:
        x = self.first(torch.ones(2, 4))
        for name in route:
            module = getattr(self, name)
            x = checkpoint(module, x, use_reentrant=False) if self.recompute else module(x)
        for name in unused:
            getattr(self, name)(x)
        return self.last(x).sum()


def micro_step(guard: Guard, model: nn.Module, *arguments: Any) -> list[int]:
    """What happened in one micro-step. GuardError where the guard has something to say."""
    guard.begin()
    loss = model(*arguments)
    guard.backward()
    loss.backward()
    guard.end()
    return guard.trace()["events"]


def test_a_parameter_without_a_gradient_is_named_with_its_module_rank_and_remedy() -> None:
    model = Two()
    guard = Guard(model, every=1)
    with pytest.raises(GuardError, match=r"rank 0: b.weight and 1 more got no gradient in micro-step 1") as raised:
        micro_step(guard, model, "a")
    assert "module b was not called" in str(raised.value)
    assert "on zero rows (x[:0])" in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_a_module_whose_output_the_loss_does_not_use_is_told_from_one_that_was_not_called() -> None:
    model = Two()
    with pytest.raises(GuardError, match="module b was called, but the loss does not depend on what it returned"):
        micro_step(Guard(model, every=1), model, "a", "b")


def test_a_gradient_of_one_micro_step_does_not_count_for_the_next() -> None:
    model = Two()
    guard = Guard(model, every=1)
    micro_step(guard, model, "ab")
    with pytest.raises(GuardError, match=r"b.weight and 1 more got no gradient in micro-step 2"):
        micro_step(guard, model, "a")


def test_a_module_called_on_zero_rows_has_done_its_part() -> None:
    class Empty(Two):
        def forward(self, route: str = "ab", unused: str = "") -> torch.Tensor:
            return super().forward("a") + self.b(torch.ones(0, 4)).sum()

    model = Empty()
    micro_step(Guard(model, every=1), model)


def test_a_frozen_parameter_needs_no_gradient_but_its_module_is_still_compared() -> None:
    model = Two()
    model.b.requires_grad_(False)
    guard = Guard(model, every=1)
    with_b, without_b = micro_step(guard, model, "ab"), micro_step(guard, model, "a")
    sentence = guard.difference({0: with_b, 1: without_b})
    assert sentence == "rank 1 called last as module number 3, where rank 0 called b"


def test_tied_weights_need_one_gradient() -> None:
    model = Two()
    model.b.weight = model.a.weight
    events = micro_step(Guard(model, every=1), model)
    assert len(events) == len(set(events))


def test_what_a_recomputation_calls_again_is_written_down() -> None:
    plain, recomputed = Two(), Two(recompute=True)
    first, second = (micro_step(Guard(model, every=1), model) for model in (plain, recomputed))
    assert len(second) == len(first) + 2


def test_what_happens_between_micro_steps_does_not_count() -> None:
    model = Two()
    guard = Guard(model, every=1)
    first = micro_step(guard, model)
    model("a").backward()  # such as a validation
    assert guard.trace()["events"] == first
    assert micro_step(guard, model) == first


def test_micro_steps_are_numbered_within_their_step() -> None:
    model = Two()
    guard = Guard(model, every=1)
    numbers = []
    for step in range(2):
        for _ in range(2):
            micro_step(guard, model)
            numbers.append(guard.trace()["micro_step"])
        guard.compare(step)
        numbers.append(guard.trace()["micro_step"])  # of the update that follows
    assert numbers == [1, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("name", CASES)
def test_our_model_does_the_same_whatever_it_is_given(name: str) -> None:
    """Calls, recomputed calls and the order of gradients, for packs of any task: what keeps ZeRO from harm."""
    case = CASES[name]
    model = build(case)
    guard = Guard(model, every=1)
    for step, micro_steps in enumerate(STEPS[case.accumulation]):
        events = {}
        for number, tasks in enumerate(micro_steps):
            for rank in range(len(tasks)):
                model.zero_grad(set_to_none=True)
                guard.begin()
                loss, *_ = model(*batch(case, step, number, rank))
                guard.backward()
                loss.backward()
                guard.end()
                events[10 * number + rank] = guard.trace()["events"]
        assert guard.difference(events) is None


def test_the_first_difference_is_found_for_calls_gradients_and_ends() -> None:
    model = Two()
    guard = Guard(model, every=1)
    events = micro_step(guard, model)
    called_a, called_b = events[1:3]
    swapped = [*events[:1], called_b, called_a, *events[3:]]
    assert guard.difference({0: events, 1: list(events)}) is None
    assert guard.difference({0: events, 1: swapped}) == "rank 1 called b as module number 2, where rank 0 called a"
    # A rank that has not come so far yet says nothing; the odd one out is named, not the lowest.
    assert guard.difference({0: events, 1: events[:2]}) is None
    assert guard.difference({0: swapped, 1: events, 2: events}) == (
        "rank 0 called b as module number 2, where rank 1 called a"
    )
    other_order = [*events[:5], events[6], events[5], *events[7:]]
    sentence = guard.difference({0: events, 1: other_order})
    assert sentence is not None
    assert sentence.startswith("rank 1 received the gradient of last.weight after 4 modules, where rank 0 received")
    second = guard.difference({0: [*events, *events], 1: [*events, *swapped]})
    assert second == "rank 1 called b as module number 2 of micro-step 2, where rank 0 called a"


def test_activations_and_gradients_are_not_kept_alive() -> None:
    model = Two()
    guard = Guard(model, every=1)
    seen: list[weakref.ref[torch.Tensor]] = []
    model.last.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    micro_step(guard, model)
    (activation,) = seen
    assert activation() is None
    gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert [gradient() for gradient in gradients] == [None] * len(gradients)


def test_a_removed_guard_sees_nothing() -> None:
    model = Two()
    guard = Guard(model, every=1)
    guard.remove()
    guard.begin()
    model().backward()
    assert guard.trace()["events"] == []


def test_the_time_spent_counts_every_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvlm.guard.hook_seconds", lambda _: (100.0, 1.0))
    model = Two()
    guard = Guard(model, every=1)
    assert guard.seconds == 0
    micro_step(guard, model)
    num_calls, num_gradients = 4, 8
    assert 100 * num_calls + num_gradients < guard.seconds < 100 * (num_calls + 1)


def test_what_hooks_cost_is_measured() -> None:
    call, gradient = hook_seconds(lambda *_: None, rounds=20)
    assert 0 <= call < 1
    assert 0 <= gradient < 1


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """By rank, what `compare` raised in each step of `_be_rank`."""
    context = multiprocessing.get_context("spawn")
    path = tmp_path_factory.mktemp("guard") / "store"
    with context.Pool(2) as pool:
        return pool.starmap(_be_rank, [(rank, str(path)) for rank in range(2)], chunksize=1)


def _be_rank(rank: int, path: str) -> list[str]:
    """Steps 0 and 5 differ in nothing, all others on rank 1; due are 0, 1 and what 4 divides."""
    store = dist.FileStore(str(Path(path)), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = Two()
    guard = Guard(model, every=4, first=2)
    said = []
    for step in range(6):
        for number in range(2):
            micro_step(guard, model, "ba" if rank == number == 1 and step not in (0, 5) else "ab")
        try:
            guard.compare(step)
            said.append("")
        except GuardError as error:
            said.append(str(error))
    dist.barrier()
    dist.destroy_process_group()
    return said


def test_ranks_are_compared_in_the_first_steps_and_then_every_so_many(said: list[list[str]]) -> None:
    for of_rank in said:
        assert [bool(sentence) for sentence in of_rank] == [False, True, False, False, True, False]


def test_every_rank_raises_the_same_sentence_with_step_micro_step_modules_and_ranks(said: list[list[str]]) -> None:
    assert said[0] == said[1]
    expected = "step 1: rank 1 called b as module number 2 of micro-step 2, where rank 0 called a. Call every module"
    assert said[0][1].startswith(expected)
