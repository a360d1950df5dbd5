"""The language-model head and its cross-entropy in one module call, a chunk of tokens at a time.

The logits of a whole pack would be the largest tensor of a step (2,048 tokens by 152,000 words in fp32: 1.2 GB), and
nobody reads them. So logits exist for a chunk of supervised tokens only, and their gradient is taken at once: the loss
is a weighted sum whose weights are known before the forward pass, hence so are the gradients of the head's input and
weight, up to one factor. Nothing is computed twice.

The loop lies inside one call of one module: calling the head once a chunk would call it a different number of times on
each rank, which ZeRO-3 does not survive. It is still the backbone's `lm_head`, under its own name.

Legend: S supervised tokens, C of them in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Logits that exist at a time: 64 MB in fp32 on a CPU, 512 MB on a GPU, where a chunk must be large for the weight's
# gradient (read and written once a chunk) not to cost more than the products.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


class Head(nn.Linear):
    """`lm_head` that can also return the loss."""

    @staticmethod
    def of(linear: nn.Linear) -> Head:
        """The same weight (the very parameter, so tied embeddings stay tied) in a Head."""
        assert linear.bias is None, "no supported family has a bias in its head"
        head = Head(1, 1, bias=False, device="meta")
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight = linear.weight
        return head

    def forward(
        self, hidden_SD: torch.Tensor, labels_S: torch.Tensor | None = None, weights_S: torch.Tensor | None = None
    ) -> Any:
        """Logits [S, V] without labels; with them the loss and each token's negative log-likelihood.

        Args:
            labels_S: int64. weights_S: fp32, what each token's loss is multiplied with.

        Returns:
            (loss, nll_S): the sum of weights_S * nll_S in nats, fp32, and nll_S, fp32, which has no graph. With S = 0
            the loss is zero and still has one.
        """
        if labels_S is None:
            return super().forward(hidden_SD)
        # Inside an autograd function this is always off, so it is asked here.
        needs_gradient = torch.is_grad_enabled()
        return _WeightedCrossEntropy.apply(hidden_SD, self.weight, labels_S, weights_S, needs_gradient)


class _WeightedCrossEntropy(torch.autograd.Function):
    """d nll / d logits = softmax(logits) - one_hot(label); the chain rule through logits = hidden @ weight.T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_S: torch.Tensor,
        weights_S: torch.Tensor,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = max(1, CHUNK_ELEMENTS[hidden_SD.device.type] // len(weight_VD))
        nll_S = torch.empty(len(hidden_SD), dtype=torch.float32, device=hidden_SD.device)
        gradient_SD = torch.empty_like(hidden_SD if needs_gradient else hidden_SD[:0])
        gradient_VD = None
        for start in range(0, len(hidden_SD), chunk):
            part = slice(start, start + chunk)
            logits_CV = (hidden_SD[part] @ weight_VD.T).float()
            logits_CV -= logits_CV.amax(dim=1, keepdim=True)
            labels_C1 = labels_S[part, None]
            label_logits_C1 = logits_CV.gather(1, labels_C1)
            sums_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
            nll_S[part] = (sums_C1.log() - label_logits_C1)[:, 0]
            if needs_gradient:
                weights_C1 = weights_S[part, None]
                gradient_CV = logits_CV.mul_(weights_C1 / sums_C1)
                gradient_CV.scatter_add_(1, labels_C1, -weights_C1)
                gradient_CV = gradient_CV.to(hidden_SD.dtype)
                gradient_SD[part] = gradient_CV @ weight_VD
                part_VD = gradient_CV.T @ hidden_SD[part]
                # Several chunks are summed in fp32; one needs no second buffer.
                gradient_VD = part_VD if gradient_VD is None else gradient_VD.float().add_(part_VD)
        if needs_gradient:
            gradient_VD = torch.zeros_like(weight_VD) if gradient_VD is None else gradient_VD.to(weight_VD.dtype)
            ctx.save_for_backward(gradient_SD, gradient_VD)
        ctx.mark_non_differentiable(nll_S)
        return (nll_S * weights_S).sum(), nll_S

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_SD, gradient_VD = ctx.saved_tensors
        return gradient_SD * factor, gradient_VD * factor, None, None, None
