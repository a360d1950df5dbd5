"""The door to attention kernels: each backend equals an explicit masked softmax."""

import pytest
import torch

from uvlm.attention import missing_backend, varlen_attention

LENGTHS = (5, 0, 17, 1)  # a document may be empty: all of its tokens were left out


def _inputs(num_heads: int, num_kv_heads: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [torch.randn(sum(LENGTHS), n, 32).to(device, dtype).requires_grad_() for n in heads]


def _by_definition(q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor) -> torch.Tensor:
    """A T x T mask in float64: same document, and not later."""
    group = q_TNH.shape[1] // k_TGH.shape[1]
    q, k, v = q_TNH.double(), k_TGH.double().repeat_interleave(group, 1), v_TGH.double().repeat_interleave(group, 1)
    document_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(q.device)
    position_T = torch.arange(len(q), device=q.device)
    allowed_TT = (document_T[:, None] == document_T) & (position_T[:, None] >= position_T)
    scores_NTT = torch.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
    weights_NTT = scores_NTT.masked_fill(~allowed_TT, -torch.inf).softmax(-1)
    return torch.einsum("nts,snh->tnh", weights_NTT, v)


def _assert_equal_to_definition(inputs: list[torch.Tensor], tolerance: float) -> None:
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=inputs[0].device)
    q_TNH, k_TGH, v_TGH = inputs
    got = varlen_attention(q_TNH, k_TGH, v_TGH, cu_seqlens, max(LENGTHS))
    assert got.dtype == inputs[0].dtype
    want = _by_definition(q_TNH, k_TGH, v_TGH)
    weight = torch.randn_like(want)
    got_gradients = torch.autograd.grad((got.double() * weight).sum(), inputs)
    want_gradients = torch.autograd.grad((want * weight).sum(), inputs)
    for one, other in zip([got, *got_gradients], [want, *want_gradients], strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < tolerance


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_cpu_backend_equals_the_definition(
    num_heads: int, num_kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    _assert_equal_to_definition(_inputs(num_heads, num_kv_heads, dtype, "cpu"), tolerance)


def test_nothing_kept_is_nothing_computed() -> None:
    empty = torch.zeros(0, 2, 32)
    assert varlen_attention(empty, empty, empty, torch.zeros(4, dtype=torch.int32), 0).shape == (0, 2, 32)


@pytest.mark.flash
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2)])
def test_flash_attn_on_a_gpu_equals_the_definition(num_heads: int, num_kv_heads: int) -> None:
    if not torch.cuda.is_available() or missing_backend("bf16"):
        pytest.skip("needs a CUDA device and the flash_attn package")
    _assert_equal_to_definition(_inputs(num_heads, num_kv_heads, torch.bfloat16, "cuda"), 1e-2)


def test_a_cpu_needs_no_other_backend() -> None:
    assert torch.cuda.is_available() or missing_backend("fp32") is None
