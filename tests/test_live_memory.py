"""What lives: births and deaths of storages, by kind and by phase, real, fake and on the meta device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from uvlm.live_memory import ALL, OTHER, LiveMemory

KILO = 1000  # elements of a tensor below: 4,000 bytes


def test_a_phase_has_the_most_that_was_alive_at_a_moment_of_it() -> None:
    with LiveMemory() as live:
        with live.phase("first"):
            kept = torch.zeros(KILO)
            torch.zeros(2 * KILO)  # gone at once
        with live.phase("second"):
            kept = kept + 1  # for a moment both
        with live.phase("third"):
            torch.zeros(1)
    peaks = {name: peak[ALL] for name, peak in live.peaks().items()}
    assert peaks == {"first": 12_000, "second": 8_000, "third": 4_004}
    assert live.now() == {ALL: 4_000, OTHER: 4_000}


def test_views_are_no_new_memory_and_keep_it_alive() -> None:
    with LiveMemory() as live:
        view = torch.zeros(KILO)[10:20].view(2, 5).T
        assert live.now()[ALL] == 4_000
        del view
    assert live.now()[ALL] == 0


def test_what_a_graph_keeps_lives_until_the_backward_pass() -> None:
    weight = torch.ones(KILO, requires_grad=True)
    with LiveMemory() as live:
        live.claim("parameters", [weight])
        with live.phase("forward"):
            loss = (weight * 2).exp().sum()  # keeps the exponential
        assert live.now()[OTHER] == 4_000 + loss.nbytes
        with live.phase("backward"):
            loss.backward()
        live.claim("gradients", [weight.grad])
        del loss
    assert live.now() == {ALL: 8_000, "parameters": 4_000, "gradients": 4_000}


def test_a_claim_holds_from_birth_on_and_the_last_one_counts() -> None:
    with LiveMemory() as live:
        with live.phase("early"):
            tensor = torch.zeros(KILO)
        live.claim("a bucket", [tensor])
        live.claim("parameters", [tensor.view(10, -1)])
    assert live.peaks()["early"] == {ALL: 4_000, "parameters": 4_000}


def test_who_makes_a_tensor_may_say_its_kind() -> None:
    with LiveMemory(claims=lambda name, new: "sums" if "sum" in name else None) as live:
        total = torch.zeros(KILO).sum()
    assert live.now() == {ALL: total.nbytes, "sums": total.nbytes}


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_tensors_without_data_count_the_same(device: str) -> None:
    mode = FakeTensorMode() if device == "fake" else torch.device("meta")
    with mode, LiveMemory("cpu" if device == "fake" else "meta") as live:
        weight = torch.ones(KILO, requires_grad=True)
        (weight * 2).exp().sum().backward()
    with LiveMemory() as real:
        weight = torch.ones(KILO, requires_grad=True)
        (weight * 2).exp().sum().backward()
    assert live.peaks() == real.peaks()


def test_memory_of_another_device_does_not_count() -> None:
    with LiveMemory("meta") as live:
        torch.zeros(KILO)
    assert live.peaks() == {}
    assert live.now() == {ALL: 0}
