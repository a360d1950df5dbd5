"""The real flash-attn package behind the door to attention kernels, held to the cases of tests/test_attention.py.

On a CUDA machine with flash-attn this tests its kernels on the device. Elsewhere `make test-flash` runs flash-attn's
Triton backend on the CPU under Triton's interpreter. That proves that `uvlm.attention` calls the package rightly (the
order and meaning of arguments, shapes, autograd) and that the package means by them what we do (the causal mask at the
bottom right, key/value heads shared by groups of query heads). It proves nothing about the CUDA kernels.

Cost: 22 s for 30 cases on one core, after a set-up of 15 s and the downloads (run). Under the interpreter bf16 gives
garbage (NumPy has no such type), so fp32 and fp16 stand in for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tests.test_attention import (
    HEADS,
    PACKS,
    Segments,
    allowed_keys,
    assert_near,
    attend,
    by_definition,
    random_inputs,
    with_gradients,
)
from uvlm.attention import missing_backend

ON_GPU = torch.cuda.is_available()
DTYPES = [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)] if ON_GPU else [(torch.float32, 1e-6), (torch.float16, 2e-3)]
# For a segment without keys the Triton backend writes zeros beyond its end, as many as the longest segment has queries:
# overwritten at once where the longest follows, over foreign memory where nothing does. The CUDA kernels write nothing.
RUNNABLE = [name for name in PACKS if ON_GPU or name != "empty segments last"]

pytestmark = [
    pytest.mark.flash,
    # The interpreter computes entries that are masked out afterwards.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]


@pytest.fixture(scope="module", autouse=True)
def flash_attn(triton_kernels: bool) -> Iterator[None]:
    """A flash-attn that runs on this machine: on its GPU, or as `make test-flash` sets up, interpreted."""
    if triton_kernels:
        if missing := missing_backend("bf16"):
            pytest.fail(missing)
        yield
        return
    import flash_attn.flash_attn_interface as interface

    for operator in (interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward):
        operator.register_kernel("cpu")(operator._init_fn)  # flash-attn registers its function for CUDA alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        yield


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("segments", [PACKS[name] for name in RUNNABLE], ids=RUNNABLE)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_flash_attn_equals_the_definition_and_the_cpu_backend(
    segments: Segments, num_heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    device = "cuda" if ON_GPU else "cpu"
    inputs = random_inputs(sum(segments.num_queries), sum(segments.num_keys), num_heads, dtype, device)
    q_QNH, k_KGH, v_KGH = inputs
    got_QNH = attend(q_QNH, k_KGH, v_KGH, segments, "flash")
    assert (got_QNH.dtype, got_QNH.device) == (dtype, q_QNH.device)
    got = with_gradients(got_QNH, inputs)
    assert_near(got, with_gradients(by_definition(q_QNH, k_KGH, v_KGH, allowed_keys(segments)), inputs), tolerance)
    q, k, v = (x.cpu() for x in inputs)
    assert_near(got, with_gradients(attend(q, k, v, segments, "cpu"), inputs), tolerance)
