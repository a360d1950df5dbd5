"""The language-model head and its cross-entropy in one module call, a chunk of tokens at a time.

The logits of a whole pack would be the largest tensor of a step (2,048 tokens by 152,000 words in fp32: 1.2 GB), and
nobody reads them. So logits exist for a chunk of supervised tokens only, and their gradient is taken at once: the loss
is a weighted sum whose weights are known before the forward pass, hence so are the gradients of the head's input and
weight, up to one factor. Nothing is computed twice. Whether a label is the model's first choice comes out of the search
for the maximum that the softmax needs.

The loop lies inside one call of one module: calling the head once a chunk would call it a different number of times on
each rank, which ZeRO-3 does not survive. It is still the backbone's `lm_head`, under its own name.

Legend: S supervised tokens, C of them in a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

# Logits that exist at a time: 64 MB in fp32 on a CPU, 512 MB on a GPU, where a chunk must be large for the weight's
# gradient (read and written once a chunk) not to cost more than the products. The meta device plans for a GPU.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27, "meta": 2**27}


class Head(nn.Linear):
    """`lm_head` that can also return the loss.

    Attributes:
        z_loss: what the squared log of the softmax's denominator is added to a token's loss with (PaLM, arXiv
            2204.02311, takes 1e-4); 0 for none.
    """

    z_loss: float = 0.0

    @staticmethod
    def of(linear: nn.Linear) -> Head:
        """The same module (tied embeddings stay tied, and a weight that is spread over ranks stays so) as a Head."""
        assert linear.bias is None, "no supported family has a bias in its head"
        linear.__class__ = Head
        return cast("Head", linear)

    def forward(
        self, hidden_SD: torch.Tensor, labels_S: torch.Tensor | None = None, weights_S: torch.Tensor | None = None
    ) -> Any:
        """Logits [S, V] without labels; with them the loss, and for each token what it cost and whether it was right.

        Args:
            labels_S: int64. weights_S: fp32, what each token's loss is multiplied with.

        Returns:
            (loss, nll_S, right_S): the sum of weights_S * (nll_S + z_loss * lse_S ** 2) in nats, fp32, where lse is the
            log of the softmax's denominator; nll_S, the plain negative log-likelihoods, fp32, which have no graph; and
            right_S, bool, whether the label is the first of the largest logits. With S = 0 the loss is zero and still
            has a graph.
        """
        if labels_S is None:
            return super().forward(hidden_SD)
        # Inside an autograd function this is always off, so it is asked here.
        needs_gradient = torch.is_grad_enabled()
        return _WeightedCrossEntropy.apply(hidden_SD, self.weight, labels_S, weights_S, self.z_loss, needs_gradient)


class _WeightedCrossEntropy(torch.autograd.Function):
    """d nll / d logits = softmax(logits) - one_hot(label), d lse^2 / d logits = 2 lse softmax(logits); then the chain
    rule through logits = hidden @ weight.T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_S: torch.Tensor,
        weights_S: torch.Tensor,
        z_loss: float,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chunk = max(1, CHUNK_ELEMENTS[hidden_SD.device.type] // len(weight_VD))
        nll_S, lse_S = torch.empty(2, len(hidden_SD), dtype=torch.float32, device=hidden_SD.device)
        right_S = torch.empty(len(hidden_SD), dtype=torch.bool, device=hidden_SD.device)
        gradient_SD = torch.empty_like(hidden_SD if needs_gradient else hidden_SD[:0])
        gradient_VD = None
        for start in range(0, len(hidden_SD), chunk):
            part = slice(start, start + chunk)
            logits_CV = (hidden_SD[part] @ weight_VD.T).float()
            labels_C1 = labels_S[part, None]
            largest_C1, choices_C1 = logits_CV.max(dim=1, keepdim=True)
            right_S[part] = (choices_C1 == labels_C1)[:, 0]
            logits_CV -= largest_C1
            label_logits_C1 = logits_CV.gather(1, labels_C1)
            sums_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
            logs_C1 = sums_C1.log()
            nll_S[part] = (logs_C1 - label_logits_C1)[:, 0]
            lse_C1 = logs_C1 + largest_C1
            lse_S[part] = lse_C1[:, 0]
            if needs_gradient:
                weights_C1 = weights_S[part, None]
                gradient_CV = logits_CV.mul_(weights_C1 * (1 + 2 * z_loss * lse_C1) / sums_C1)
                gradient_CV.scatter_add_(1, labels_C1, -weights_C1)
                gradient_CV = gradient_CV.to(hidden_SD.dtype)
                gradient_SD[part] = gradient_CV @ weight_VD
                part_VD = gradient_CV.T @ hidden_SD[part]
                # Several chunks are summed in fp32; one needs no second buffer.
                gradient_VD = part_VD if gradient_VD is None else gradient_VD.float().add_(part_VD)
        if needs_gradient:
            gradient_VD = torch.zeros_like(weight_VD) if gradient_VD is None else gradient_VD.to(weight_VD.dtype)
            ctx.save_for_backward(gradient_SD, gradient_VD)
        ctx.mark_non_differentiable(nll_S, right_S)
        return (weights_S * (nll_S + z_loss * lse_S.square())).sum(), nll_S, right_S

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_SD, gradient_VD = ctx.saved_tensors
        return gradient_SD * factor, gradient_VD * factor, None, None, None, None
