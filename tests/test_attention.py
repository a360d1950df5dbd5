"""The door to attention kernels: each backend equals a masked softmax written out in float64, gradients included.

The cases and the yardstick serve two backends: tests/test_flash_attention.py holds flash-attn to them.

Legend: Q queries of a pack, K keys, N query heads, G key/value heads, H head dimension.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import pytest
import torch

from uvlm.attention import missing_backend, varlen_attention


class Segments(NamedTuple):
    """Queries and keys of each segment of a pack."""

    num_queries: tuple[int, ...]
    num_keys: tuple[int, ...]


PACKS = {
    "as many keys as queries": Segments((5, 17, 1), (5, 17, 1)),
    "more keys than queries": Segments((3, 6, 4), (3, 21, 5)),
    "one query": Segments((1, 1, 2), (1, 9, 12)),
    "empty segments": Segments((0, 0, 4, 0, 3), (0, 0, 4, 7, 8)),  # the last but one has keys that no query sees
    "empty segments last": Segments((3, 0, 0), (8, 7, 0)),
    "longer than a kernel's tile": Segments((70, 3), (150, 140)),
}
HEADS = [(4, 4), (4, 2), (4, 1)]  # query heads, key/value heads
HEAD_DIM = 32
Backend = Literal["auto", "flash", "cpu"]


def random_inputs(
    num_queries: int, num_keys: int, num_heads: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Queries, keys and values that want gradients; the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_queries, num_heads[0]), (num_keys, num_heads[1]), (num_keys, num_heads[1])]
    made = [torch.randn(*shape, HEAD_DIM, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def attend(
    q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor, segments: Segments, backend: Backend
) -> torch.Tensor:
    """`varlen_attention`, with the segments in the form it wants."""
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(q_QNH.device, torch.int32) for lengths in segments
    )
    max_q, max_k = max(segments.num_queries), max(segments.num_keys)
    return varlen_attention(q_QNH, k_KGH, v_KGH, cu_seqlens_q, cu_seqlens_k, max_q, max_k, backend)


def by_definition(
    q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor, allowed_QK: torch.Tensor
) -> torch.Tensor:
    """Softmax over the allowed keys, in float64 on the CPU."""
    group = q_QNH.shape[1] // k_KGH.shape[1]
    q, k, v = (x.cpu().double() for x in (q_QNH, k_KGH, v_KGH))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores_NQK = torch.einsum("qnh,knh->nqk", q, k) / HEAD_DIM**0.5
    return torch.einsum("nqk,knh->qnh", scores_NQK.masked_fill(~allowed_QK, -torch.inf).softmax(-1), v)


def allowed_keys(segments: Segments) -> torch.Tensor:
    """bool [Q, K]: a segment's last query sees all of its keys, each query before it one key less."""
    blocks = []
    for num_queries, num_keys in zip(*segments, strict=True):
        num_later_QK = torch.arange(num_queries - 1, -1, -1)[:, None]
        blocks.append(torch.arange(num_keys) < num_keys - num_later_QK)
    return torch.block_diag(*blocks).bool()


def with_gradients(output_QNH: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of a random weighing of it, in float64 on the CPU."""
    weight_QNH = torch.randn(output_QNH.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    gradients = torch.autograd.grad((output_QNH.cpu().double() * weight_QNH).sum(), inputs)
    return [x.detach().cpu().double() for x in (output_QNH, *gradients)]


def assert_near(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    """Each tensor by itself, norm-wise and relative."""
    for name, one, other in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        assert one.shape == other.shape
        error = ((one - other).norm() / other.norm()).item()
        assert error < tolerance, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_cpu_backend_equals_the_definition(
    segments: Segments, num_heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = random_inputs(sum(segments.num_queries), sum(segments.num_keys), num_heads, dtype)
    q_QNH, k_KGH, v_KGH = inputs
    got_QNH = attend(q_QNH, k_KGH, v_KGH, segments, "cpu")
    assert got_QNH.dtype == dtype
    want_QNH = by_definition(q_QNH, k_KGH, v_KGH, allowed_keys(segments))
    assert_near(with_gradients(got_QNH, inputs), with_gradients(want_QNH, inputs), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_sharp_attention_keeps_its_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Scores of some tens, of which few weights are left; bf16 rounds the scores."""
    segments = PACKS["longer than a kernel's tile"]
    inputs = [
        (x.detach() * scale).requires_grad_()
        for x, scale in zip(random_inputs(73, 290, (4, 2), dtype), (3, 3, 1), strict=True)
    ]
    q_QNH, k_KGH, v_KGH = inputs
    want_QNH = by_definition(q_QNH, k_KGH, v_KGH, allowed_keys(segments))
    got = with_gradients(attend(q_QNH, k_KGH, v_KGH, segments, "cpu"), inputs)
    assert_near(got, with_gradients(want_QNH, inputs), tolerance)


def test_text_around_a_context_image_sees_exactly_what_comes_before_it() -> None:
    """Why queries that skip an image are two segments: text of 4, an image of 6 that is keys only, text of 5."""
    inputs = random_inputs(9, 15, (4, 2), torch.float32)
    q_QNH, k_KGH, v_KGH = inputs
    position_Q = torch.tensor([*range(4), *range(10, 15)])
    want_QNH = by_definition(q_QNH, k_KGH, v_KGH, position_Q[:, None] >= torch.arange(15))
    keys_of_segments = torch.tensor([*range(4), *range(15)])
    k, v = k_KGH[keys_of_segments], v_KGH[keys_of_segments]
    got_QNH = attend(q_QNH, k, v, Segments((4, 5), (4, 15)), "cpu")
    assert_near(with_gradients(got_QNH, inputs), with_gradients(want_QNH, inputs), 1e-6)


@pytest.mark.parametrize("num_keys", [0, 3])
def test_no_query_is_no_output(num_keys: int) -> None:
    q_QNH, k_KGH, v_KGH = random_inputs(0, num_keys, (4, 2), torch.bfloat16)
    got_QNH = attend(q_QNH, k_KGH, v_KGH, Segments((0, 0), (0, num_keys)), "cpu")
    assert (got_QNH.shape, got_QNH.dtype) == ((0, 4, HEAD_DIM), torch.bfloat16)


def test_tensors_on_a_cpu_use_the_cpu_backend_unasked() -> None:
    segments = PACKS["more keys than queries"]
    inputs = random_inputs(sum(segments.num_queries), sum(segments.num_keys), (4, 2), torch.float32)
    q_QNH, k_KGH, v_KGH = inputs
    named = attend(q_QNH, k_KGH, v_KGH, segments, "cpu")
    assert torch.equal(attend(q_QNH, k_KGH, v_KGH, segments, "auto"), named)


def test_a_cpu_lacks_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_backend("fp32") is None
    assert missing_backend("bf16") is None


def test_a_gpu_lacks_flash_attn_or_a_kernel_for_fp32_and_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'uvlm[gpu]'" in (missing_backend("bf16") or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert missing_backend("bf16") is None
    assert "set dtype=bf16" in (missing_backend("fp32") or "")
