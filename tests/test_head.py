"""The head: loss, gradients and first choices are those of the logits over the whole vocabulary, whatever the chunk."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from uvlm import head as head_module
from uvlm.head import Head

NUM_TOKENS, WIDTH, NUM_WORDS = 37, 16, 53


def _inputs(num_tokens: int = NUM_TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, requires_grad=True)
    return hidden, torch.randint(0, NUM_WORDS, (num_tokens,)), torch.rand(num_tokens)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("num_rows", [1, 5, 37, 1000])
def test_loss_and_gradients_equal_autograds_for_every_size_of_a_chunk(
    num_rows: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", num_rows * NUM_WORDS)
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    head.z_loss = z_loss
    hidden, labels, weights = _inputs()
    logits = hidden @ head.weight.T
    want_nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    want = 3 * (weights * (want_nll + z_loss * logits.logsumexp(dim=1) ** 2)).sum()
    want_gradients = torch.autograd.grad(want, (hidden, head.weight))
    loss, nll, _ = head(hidden, labels, weights)
    assert not nll.requires_grad
    torch.testing.assert_close(nll, want_nll)
    torch.testing.assert_close(3 * loss, want)
    for got, expected in zip(torch.autograd.grad(3 * loss, (hidden, head.weight)), want_gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_z_loss_keeps_the_denominator_of_large_bf16_logits_small() -> None:
    """Logits that all grow by the same number cost no cross-entropy, and every step of the z-loss takes it back."""
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False)).bfloat16()
    hidden, labels, weights = _inputs()
    hidden = torch.nn.functional.pad(hidden.detach()[:, 1:], (1, 0), value=1.0).bfloat16()  # the first state is 1
    with torch.no_grad():
        head.weight[:, 0] += 30
    results = []
    for z_loss in (0.0, 0.01):
        head.z_loss = z_loss
        loss, nll, _ = head(hidden, labels, weights)
        (gradient,) = torch.autograd.grad(loss, head.weight)
        results.append((loss, nll, gradient[:, 0].float().sum()))
    (plain, plain_nll, plain_sum), (with_z, nll, gradient_sum) = results
    assert torch.equal(nll, plain_nll)
    lse = (hidden @ head.weight.T).float().logsumexp(dim=1)
    torch.testing.assert_close(with_z - plain, 0.01 * (weights * lse**2).sum())
    want = 0.02 * (weights * lse).sum()
    assert want > 10 * plain_sum.abs()
    torch.testing.assert_close(gradient_sum, want, rtol=0.02, atol=0)


@pytest.mark.parametrize("num_rows", [5, 1000])
def test_a_token_is_right_where_its_label_is_the_first_choice(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", num_rows * NUM_WORDS)
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    hidden, labels, weights = _inputs()
    first_choices = head(hidden).argmax(dim=1)
    labels[::3] = first_choices[::3]
    want = labels == first_choices
    assert 0 < want.sum() < NUM_TOKENS
    *_, right = head(hidden, labels, weights)
    assert torch.equal(right, want)
    assert not right.requires_grad


def test_of_equal_logits_only_one_is_the_first_choice() -> None:
    """In bf16 they are common: a model that says the same about every word must not be right about every word."""
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    hidden, labels, weights = _inputs()
    torch.nn.init.zeros_(head.weight)
    *_, right = head(hidden, labels, weights)
    assert torch.equal(right, labels == head(hidden).argmax(dim=1))


def test_logits_never_exist_for_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 4 * NUM_WORDS)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            tensors = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
            matrices = [each for each in tensors if each.ndim == 2 and each.shape[1] == NUM_WORDS]
            rows = [len(each) for each in matrices if len(each) != WIDTH]  # that is the weight, transposed
            largest = max([largest, *rows])
            return result

    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    hidden, labels, weights = _inputs()
    with Watch():
        head(hidden, labels, weights)[0].backward()
    assert largest == 4


def test_bf16_gradients_of_many_chunks_are_as_good_as_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False)).bfloat16()
    hidden, labels, weights = _inputs(2000)
    (exact,) = torch.autograd.grad(
        (torch.nn.functional.cross_entropy(hidden @ head.weight.float().T, labels, reduction="none") * weights).sum(),
        head.weight,
    )
    errors = []
    for num_rows in (2000, 10):
        monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", num_rows * NUM_WORDS)
        (gradient,) = torch.autograd.grad(head(hidden.bfloat16(), labels, weights)[0], head.weight)
        errors.append(((gradient - exact).float().norm() / exact.float().norm()).item())
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_no_supervised_token_gives_zero_loss_and_zero_gradients() -> None:
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    hidden, labels, weights = _inputs(0)
    loss, nll, right = head(hidden, labels, weights)
    loss.backward()
    assert (loss.item(), nll.shape, right.shape) == (0.0, (0,), (0,))
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_nothing_is_computed_for_a_backward_pass_that_never_comes() -> None:
    head = Head.of(torch.nn.Linear(WIDTH, NUM_WORDS, bias=False))
    hidden, labels, weights = _inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, nll, _ = head(hidden, labels, weights)
    torch.testing.assert_close(loss, (nll * weights).sum())
    assert counter.get_total_flops() == 2 * NUM_TOKENS * WIDTH * NUM_WORDS, "the logits alone"
