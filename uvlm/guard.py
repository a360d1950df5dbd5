"""The guard: every rank calls the same modules in the same order, and every trainable parameter gets a gradient.

DeepSpeed asks for both and checks neither. Under ZeRO-3 a parameter without a gradient is updated with an old one, and
ranks that call different modules crash, hang, or train with each other's weights for a step; under ZeRO-1 and 2, ranks
whose gradients arrive in different orders add them up in each other's place. Most of this is silent.

So the guard writes down each micro-step as a row of events: a module that owns parameters is called (also when a
recomputation calls it again), the gradient of a parameter has arrived. What is missing on this rank shows at once, in
`end`. Whether ranks differ shows in `compare`: one number a rank is reduced, and only where it differs are the events
themselves exchanged, so that the error can name module and ranks. Ranks that differ can also crash or wait for ever
before they get there; then the watchdog (watchdog.py) exchanges their traces through the store. Gloo can end a process
within a collective, without an exception; so in the first steps each event is also shown before it has consequences.

What it costs (run, benchmarks/guard.py, the demo's model: 47 calls and 47 gradients a micro-step): 0.9 us a call and
0.2 us a gradient, 0.02% of a step; with a comparison every 100 steps, 0.06%. Showing the trace after each event takes
4 ms a micro-step, in the first steps only.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_CURE = (
    "Call every module in every micro-step, on zero rows (x[:0]) if there is nothing to do, and let the loss depend on "
    "what it returns: loss + 0 * out.sum()"
)


class GuardError(ValueError):
    """Ranks call different modules, or a trainable parameter got no gradient. Training on would be silently wrong."""


class Guard:
    """Watches the micro-steps of one rank. In each: `begin`, forward, `backward`, the backward pass, `end`.

    Args:
        model: with its parameters frozen or not, as they stay. Hooks are added; `remove` takes them away.
        every, first: ranks are compared in the first steps of this start, then in each step that `every` divides.
    """

    def __init__(self, model: nn.Module, every: int, first: int = 3) -> None:
        assert every > 0, every
        self.every, self.first = every, first
        self._modules = [
            (name or "the model itself", module)
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        self._trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._first_gradient = len(self._modules)
        self._all_gradients = frozenset(range(self._first_gradient, self._first_gradient + len(self._trainable)))
        # What each event says; the events of a rank are indices into it, equal on all ranks that built the same model.
        self._words = [f"called {name}" for name, _ in self._modules]
        self._words += [f"received the gradient of {name}" for name, _ in self._trainable]
        self._words += ["began its backward pass", "ended the micro-step", "ended the step"]
        self._backward, self._end, self._close = range(len(self._words) - 3, len(self._words))
        self._open = False
        self._events: list[int] = []  # of this micro-step
        self._window: list[bytes] = []  # the micro-steps of this step that have ended
        self._num_steps = 0
        self._step_ended = False
        self._seconds = 0.0
        # In the first steps it is called after each event: the watchdog puts in how the trace is shown to other ranks.
        self.show: Callable[[], None] | None = None
        self._num_calls = self._num_gradients = 0
        self._open = True
        self.call_seconds, self.gradient_seconds = hook_seconds(self._noting(0))
        self._open = False
        self._hooks = [
            # Before DeepSpeed's own hook, which gathers the weights: if that fails or hangs, the call is written down.
            module.register_forward_pre_hook(self._noting(number), prepend=True)
            for number, (_, module) in enumerate(self._modules)
        ]
        self._hooks += [
            parameter.register_post_accumulate_grad_hook(self._noting(self._first_gradient + number))
            for number, (_, parameter) in enumerate(self._trainable)
        ]

    def _noting(self, event: int) -> Callable[..., None]:
        """A hook that writes down a number and keeps nothing of what it is called with."""

        def note(*_: Any) -> None:
            if self._open:
                self._events.append(event)
                if self.show is not None:
                    started = time.perf_counter()
                    self.show()
                    self._seconds += time.perf_counter() - started

        return note

    def begin(self) -> None:
        """A micro-step begins: call it before the forward pass. What was called since the last `end` does not count."""
        if self._step_ended:
            self._window, self._step_ended = [], False
        self._events.clear()
        self._open = True

    def backward(self) -> None:
        """The forward pass is over: call it before the backward pass."""
        self._events.append(self._backward)

    def end(self) -> None:
        """A micro-step ends: call it after the backward pass and before the engine's step. Never waits for a rank.

        Raises:
            GuardError: a trainable parameter got no gradient on this rank.
        """
        started = time.perf_counter()
        self._open = False
        missing = self._all_gradients.difference(self._events)
        if missing:
            raise GuardError(self._sentence_of(sorted(missing)))
        num_gradients = len(self._all_gradients)
        self._num_gradients += num_gradients
        self._num_calls += len(self._events) - num_gradients - 1  # `backward` is no hook
        self._events.append(self._end)
        self._window.append(array("I", self._events).tobytes())
        self._seconds += time.perf_counter() - started

    def _sentence_of(self, missing: list[int]) -> str:
        """Which parameters got no gradient, which module is the first one's, and why, as far as can be seen here."""
        name, parameter = self._trainable[missing[0] - self._first_gradient]
        owners = [
            number
            for number, (_, module) in enumerate(self._modules)
            if any(own is parameter for own in module.parameters(recurse=False))
        ]
        called = set(owners).intersection(self._events)
        reason = "was called, but the loss does not depend on what it returned" if called else "was not called"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return (
            f"rank {_rank()}: {name}{others} got no gradient in micro-step {len(self._window) + 1} of this step: "
            f"module {self._modules[min(called or owners)][0]} {reason}. ZeRO would update it with another gradient, "
            f"of an earlier step or of another parameter. {_CURE}"
        )

    def compare(self, step: int) -> None:
        """The micro-steps of an optimizer step have ended: compare them with those of all other ranks, if it is due.

        Every rank calls this in each step with the same `step`, after the last `end` and best before the update. A step
        in which it is due waits for the slowest rank, and for the device.

        Raises:
            GuardError, on every rank: ranks called different modules, or their gradients came in different orders.
        """
        started = time.perf_counter()
        self._step_ended = True
        self._num_steps += 1
        if self._num_steps >= self.first:
            self.show = None
        is_due = self._num_steps <= self.first or step % self.every == 0
        if is_due and dist.is_initialized() and dist.get_world_size() > 1:
            self._compare(step, b"".join([*self._window, array("I", [self._close]).tobytes()]))
        self._seconds += time.perf_counter() - started

    def _compare(self, step: int, events: bytes) -> None:
        names = "\n".join(self._words).encode()
        digest = int.from_bytes(blake2b(names + events, digest_size=7).digest())
        device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else None
        most = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        largest, smallest = most.tolist()
        if largest == -smallest:
            return
        all_events: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_events, events)
        sentence = self.difference({rank: array("I", of_rank) for rank, of_rank in enumerate(all_events)})
        sentence = sentence or "ranks built models whose modules have different names"
        raise GuardError(f"step {step}: {sentence}. {_CURE}, in the same order on every rank")

    def trace(self) -> dict[str, Any]:
        """What this rank has done in the current micro-step, as JSON can hold it; from any thread.

        {"micro_step": its number in the step, from 1, "events": what `difference` compares}.
        """
        return {"micro_step": len(self._window) + self._open, "events": list(self._events)}

    def difference(self, events: Mapping[int, Sequence[int]]) -> str | None:
        """The first event in which ranks differ, in words; None where none does.

        Args:
            events: by rank, of the same micro-step or steps. A rank that has not got so far yet has no say.
        """
        for place in range(max(map(len, events.values()), default=0)):
            here = {rank: events[rank][place] for rank in sorted(events) if len(events[rank]) > place}
            if len(set(here.values())) > 1:
                break
        else:
            return None
        usual = Counter(here.values()).most_common(1)[0][0]  # the lowest rank's, among equals
        odd = next(rank for rank in here if here[rank] != usual)
        other = next(rank for rank in here if here[rank] == usual)
        before = list(events[odd][:place])
        num_ended = before.count(self._end)
        inside = before[place - before[::-1].index(self._end) :] if num_ended else before
        num_calls = sum(event < self._first_gradient for event in inside)
        calls = f"after {num_calls} modules"
        if here[odd] < self._first_gradient:
            calls = f"as module number {num_calls + 1}"
        where = f" of micro-step {num_ended + 1}" if num_ended else ""
        return f"rank {odd} {self._words[here[odd]]} {calls}{where}, where rank {other} {self._words[usual]}"

    @property
    def seconds(self) -> float:
        """Time spent in the guard so far: measured in its methods, waits for other ranks included, and estimated for
        its hooks from their number and `hook_seconds`."""
        hooks = self._num_calls * self.call_seconds + self._num_gradients * self.gradient_seconds
        return self._seconds + hooks

    def remove(self) -> None:
        """Take the hooks away; the guard is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()


def hook_seconds(hook: Callable[..., None], rounds: int = 200) -> tuple[float, float]:
    """What a hook costs on this machine, in seconds: of a module's call, of a gradient's arrival.

    The fastest of some calls with it, less the fastest without. A module without any hook takes a shorter way through
    torch; what leaving that costs is in it. Takes 10 ms (run).
    """
    module, weight = nn.Identity(), torch.zeros((), requires_grad=True)

    def fastest(function: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(rounds):
            started = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - started)
        return best

    def call() -> None:
        module(weight)

    def backward() -> None:
        weight.clone().backward()

    with torch.enable_grad():
        plain_call, plain_backward = fastest(call), fastest(backward)
        module.register_forward_pre_hook(hook)
        weight.register_post_accumulate_grad_hook(hook)
        return max(0.0, fastest(call) - plain_call), max(0.0, fastest(backward) - plain_backward)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
