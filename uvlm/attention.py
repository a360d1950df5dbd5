"""The one door to attention kernels: causal attention over segments packed end to end.

A segment is a run of queries and the keys it may see. Where every token of a document takes part, a document is one
segment with as many keys as queries. Where some tokens are keys only (an image that is context), each run of queries
between them is a segment of its own, and its keys are all of the document's keys up to its end. In both cases the
causal mask is aligned at the bottom right: a segment's last query sees all of its keys. One call with the queries of a
whole document and more keys than queries would be wrong: text before an image would see text after it.

No backend ever builds a T x T mask. On CUDA it is flash-attn's varlen kernel, one call a layer. On a CPU it is
PyTorch's own flash kernel in fp32, one call a segment, with a mask of that segment's queries by its keys only where the
two differ, and block products in bf16, where that kernel is slow: work grows with the sum over segments, not with the
square of the pack.

Legend: Q queries of a pack, K keys, N query heads, G key/value heads (G divides N), H head dimension, S segments.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it


def varlen_attention(
    q_QNH: torch.Tensor,
    k_KGH: torch.Tensor,
    v_KGH: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: Literal["auto", "flash", "cpu"] = "auto",
) -> torch.Tensor:
    """Causal attention of each segment's queries over its keys, aligned at the bottom right.

    Args:
        q_QNH, k_KGH, v_KGH: bf16, fp16 or (CPU only) fp32, all on one device.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1] on that device. A segment has at least as many keys as queries, and
            may be empty.
        max_seqlen_q, max_seqlen_k: of the longest segment, Python ints: nothing here waits for the device.
        backend: "auto" is flash-attn for CUDA tensors, else PyTorch's CPU kernel. Tests name one.

    Returns:
        [Q, N, H] in q's dtype.
    """
    if backend == "flash" or (backend == "auto" and q_QNH.is_cuda):
        from flash_attn import flash_attn_varlen_func

        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(q_QNH, k_KGH, v_KGH, *lengths, causal=True)
    if q_QNH.is_meta:
        return _Shapes.apply(q_QNH, k_KGH, v_KGH)
    return _on_cpu(q_QNH, k_KGH, v_KGH, _lengths(cu_seqlens_q), _lengths(cu_seqlens_k))


def _lengths(cu_seqlens: torch.Tensor) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens.tolist())]


def cached_attention(q_BNH: torch.Tensor, k_BSGH: torch.Tensor, v_BSGH: torch.Tensor) -> torch.Tensor:
    """Attention of one query a sequence (B of them) over all of its S cached keys: [B, N, H] in q's dtype.

    Query heads that share a key head stand side by side as queries of that head: nothing is repeated.
    """
    dtype = torch.float32 if q_BNH.device.type == "cpu" else q_BNH.dtype
    q_BGnH = q_BNH.unflatten(1, (k_BSGH.shape[2], -1))
    q, k, v = (x.to(dtype) for x in (q_BGnH, k_BSGH.transpose(1, 2), v_BSGH.transpose(1, 2)))
    return F.scaled_dot_product_attention(q, k, v).flatten(1, 2).to(q_BNH.dtype)


def missing_backend(dtype: str, on_gpus: bool | None = None) -> str | None:
    """A sentence with the remedy where what is installed cannot do attention in `dtype` ("bf16", "fp16" or "fp32").

    Args:
        on_gpus: whether it will run on GPUs; as this machine has them, unless given.
    """
    if not (torch.cuda.is_available() if on_gpus is None else on_gpus):
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "attention on a GPU needs flash-attn, which is not installed; install it: pip install 'uvlm[gpu]'"
    return None if dtype in ("bf16", "fp16") else f"flash-attn has no kernel for dtype={dtype}; set dtype=bf16"


def _on_cpu(
    q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor, num_queries: list[int], num_keys: list[int]
) -> torch.Tensor:
    if q_QNH.dtype == torch.bfloat16:
        return _BlockProducts.apply(q_QNH, k_KGH, v_KGH, num_queries, num_keys)
    segments = zip(q_QNH.split(num_queries), k_KGH.split(num_keys), v_KGH.split(num_keys), strict=True)
    return torch.cat([_segment(q, k, v) for q, k, v in segments])


def _segment(q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor) -> torch.Tensor:
    """One segment: its last query sees all of its keys."""
    num_queries, num_keys = len(q_QNH), len(k_KGH)
    mask_QK = None
    if num_queries not in (1, num_keys):  # PyTorch aligns `is_causal` at the top left
        mask_QK = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    q, k, v = (x[None].transpose(1, 2) for x in (q_QNH, k_KGH, v_KGH))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask_QK,
        is_causal=num_queries == num_keys,
        enable_gqa=True,
    )[0].transpose(0, 1)


class _Shapes(torch.autograd.Function):
    """On the meta device, where memory is planned: what flash-attn keeps and makes, without data.

    It keeps queries, keys, values, output and the log of each softmax's denominator in fp32, and sums the gradient of
    the queries in fp32 (flash_attn_varlen_func 2.8, its forward and backward).
    """

    @staticmethod
    def forward(ctx: Any, q_QNH: torch.Tensor, k_KGH: torch.Tensor, v_KGH: torch.Tensor) -> torch.Tensor:
        mixed_QNH = torch.empty_like(q_QNH)
        ctx.save_for_backward(q_QNH, k_KGH, v_KGH, mixed_QNH, q_QNH.new_empty(q_QNH.shape[:2], dtype=torch.float32))
        return mixed_QNH

    @staticmethod
    def backward(ctx: Any, gradient_QNH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q_QNH, k_KGH, v_KGH, *_ = ctx.saved_tensors
        _sum_QNH = torch.empty_like(q_QNH, dtype=torch.float32)
        return torch.empty_like(q_QNH), torch.empty_like(k_KGH), torch.empty_like(v_KGH)


class _BlockProducts(torch.autograd.Function):
    """A pack's attention in bf16 by plain matrix products, BLOCK queries of a segment at a time.

    A CPU that trains in bf16 multiplies matrices in it several times as fast as in fp32, which PyTorch's flash kernel
    makes little of. Keys behind a block's last query are never touched. The weights, a block's queries by the keys they
    see, are computed again in the backward pass instead of being kept. Forward and backward, 8 heads of 64 over 4, one
    core (run): 304 tokens 7.7 ms by flash in fp32 and 3.3 ms so, 1,024 tokens 62 and 27 ms. The price: scores are
    rounded to bf16, as in plain attention of that type; relative error 0.3%, 1.2%, 2.2% for queries and keys of
    standard deviation 1, 3, 6, where fused kernels have 0.2%.

    Legend: B queries of a block, r = N / G.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_QNH: torch.Tensor,
        k_KGH: torch.Tensor,
        v_KGH: torch.Tensor,
        num_queries: list[int],
        num_keys: list[int],
    ) -> torch.Tensor:
        q_QNH = q_QNH * q_QNH.shape[-1] ** -0.5
        k_GKH, v_GKH = k_KGH.transpose(0, 1).contiguous(), v_KGH.transpose(0, 1).contiguous()
        ctx.save_for_backward(q_QNH, k_GKH, v_GKH)
        ctx.blocks = _blocks(num_queries, num_keys)
        mixed_QNH = torch.empty_like(q_QNH)
        for queries, keys in ctx.blocks:
            mixed_BNH = mixed_QNH[queries]
            weights = _weights(_grouped(q_QNH[queries], len(k_GKH)), k_GKH[:, keys], len(mixed_BNH))
            mixed_BNH[:] = _ungrouped(torch.bmm(weights, v_GKH[:, keys]), mixed_BNH)
        return mixed_QNH

    @staticmethod
    def backward(ctx: Any, gradient_QNH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_QNH, k_GKH, v_GKH = ctx.saved_tensors
        dq_QNH = torch.empty_like(q_QNH)
        dk_GKH, dv_GKH = (torch.zeros(k_GKH.shape, dtype=torch.float32) for _ in range(2))  # sums over blocks
        for queries, keys in ctx.blocks:
            q, gradient = (_grouped(x[queries], len(k_GKH)) for x in (q_QNH, gradient_QNH))
            k, v = k_GKH[:, keys], v_GKH[:, keys]
            weights = _weights(q, k, queries.stop - queries.start)
            d_weights = torch.bmm(gradient, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq_QNH[queries] = _ungrouped(torch.bmm(d_scores, k), q_QNH[queries])
            dk_GKH[:, keys] += torch.bmm(d_scores.transpose(1, 2), q)
            dv_GKH[:, keys] += torch.bmm(weights.transpose(1, 2), gradient)
        dk_KGH, dv_KGH = (x.transpose(0, 1).to(q_QNH.dtype) for x in (dk_GKH, dv_GKH))
        return dq_QNH * q_QNH.shape[-1] ** -0.5, dk_KGH, dv_KGH, None, None


BLOCK = 64


def _blocks(num_queries: list[int], num_keys: list[int]) -> list[tuple[slice, slice]]:
    """(queries, keys up to the last of them) of each block of each segment."""
    blocks = []
    first_query, first_key = 0, 0
    for all_queries, all_keys in zip(num_queries, num_keys, strict=True):
        for start in range(0, all_queries, BLOCK):
            stop = min(start + BLOCK, all_queries)
            last_key = first_key + all_keys - all_queries + stop
            blocks.append((slice(first_query + start, first_query + stop), slice(first_key, last_key)))
        first_query, first_key = first_query + all_queries, first_key + all_keys
    return blocks


def _grouped(x_BNH: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[G, r B, H]: the heads that share keys side by side."""
    return x_BNH.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(x: torch.Tensor, like_BNH: torch.Tensor) -> torch.Tensor:
    """The way back, to the shape of `like_BNH`."""
    return x.unflatten(1, (-1, len(like_BNH))).permute(2, 0, 1, 3).reshape(like_BNH.shape)


def _weights(q: torch.Tensor, k_GKH: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Softmax of a block's scores, [G, r B, K]; its last query sees all keys."""
    scores = torch.bmm(q, k_GKH.transpose(1, 2))
    causal = scores.unflatten(1, (-1, num_queries))[..., -num_queries:]  # a view of the last keys, the block's own
    causal.masked_fill_(torch.ones(num_queries, num_queries, dtype=torch.bool).triu_(1), -torch.inf)
    return scores.softmax(-1)
