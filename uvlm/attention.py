"""The one door to attention kernels: causal attention over documents packed end to end.

No backend behind `varlen_attention` ever builds a T x T mask. On CUDA it is
flash-attn's varlen kernel. On a CPU it is PyTorch's own flash kernel through `scaled_dot_product_attention`, called
once per document: work grows with the sum of squared document lengths, not with the square of the pack.

Legend: T query or key tokens of a pack, N query heads, G key/value heads (G divides N), H head dimension.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it


def varlen_attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
) -> torch.Tensor:
    """Causal self-attention inside each document.

    Args:
        q_TNH, k_TGH, v_TGH: bf16, fp16 or (CPU only) fp32, all on one device.
        cu_seqlens: int32 [documents + 1] on that device; documents may be empty.
        max_seqlen: length of the longest document, a Python int: nothing here waits for the device.

    Returns:
        [T, N, H] in q's dtype.
    """
    if q_TNH.is_cuda:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q_TNH, k_TGH, v_TGH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
    return _per_document(q_TNH, k_TGH, v_TGH, cu_seqlens)


def missing_backend(dtype: str) -> str | None:
    """A sentence with the remedy where this machine's attention cannot run in `dtype` ("bf16" or "fp32")."""
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "attention on a GPU needs flash-attn, which is not installed; install it: pip install 'uvlm[gpu]'"
    return None if dtype == "bf16" else f"flash-attn has no kernel for dtype={dtype}; set dtype=bf16"


def _per_document(
    q_TNH: torch.Tensor, k_TGH: torch.Tensor, v_TGH: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    dtype = q_TNH.dtype
    # In bf16 the CPU kernel's backward pass takes two to three times as long as in fp32 (run: 190 tokens, 4 heads).
    q_TNH, k_TGH, v_TGH = q_TNH.float(), k_TGH.float(), v_TGH.float()
    if not lengths:
        return q_TNH
    outputs = [
        F.scaled_dot_product_attention(
            q[None].transpose(1, 2), k[None].transpose(1, 2), v[None].transpose(1, 2), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for q, k, v in zip(q_TNH.split(lengths), k_TGH.split(lengths), v_TGH.split(lengths), strict=True)
    ]
    return torch.cat(outputs).to(dtype)
