"""TokenPlan: which tokens of one pack take part in which layers.

A token has a role in a layer, three bits: query, key/value, ffn. Two of the eight are needed by the policies of today:
DENSE (1, 1, 1), and BYPASS (0, 0, 0), where the state passes a layer unchanged. **Tokens are left out, layers never
are**: every rank calls every layer in every micro-step, which is what ZeRO-3 needs.

The plan is computed on the host from the pack, the policy and the pack's name, outside any checkpointed region, before
the forward pass. Neighbouring layers with equal roles share a span: states are gathered once at its entry and scattered
once at its exit. Tokens keep their original position ids; `cu_seqlens` is recomputed for those that are left. Equal
subsets of queries and keys in the original order need one causal call, which is exact.

Cost: a few numpy operations over T tokens a pack (about 0.1 ms at T = 1,024), no device synchronisation.

Legend: T tokens in a pack, K tokens kept in a span, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from data_pipeline.encode import IGNORED

if TYPE_CHECKING:
    from data_pipeline.packing import Pack
    from uvlm.policies import Policy


class Kept(NamedTuple):
    """What a policy says of layers first <= layer < stop: tokens marked in `keep` are DENSE, the others BYPASS."""

    first: int
    stop: int
    keep: np.ndarray  # bool [T]


@dataclass(frozen=True)
class Span:
    """A run of layers in which the same tokens take part.

    kept: int64 [K], ascending indices into the pack, or None where all T take part.
    cu_seqlens: int32 [N + 1], document bounds among the kept tokens; max_seqlen: the longest of them.
    """

    first: int
    stop: int
    kept: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def to(self, device: torch.device) -> Span:
        kept = None if self.kept is None else self.kept.to(device, non_blocking=True)
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=True)
        return replace(self, kept=kept, cu_seqlens=cu_seqlens)


@dataclass(frozen=True)
class TokenPlan:
    """Spans that cover all layers in order, and the share of token-layers that is computed.

    supervised: int64 [S], ascending positions with a label, which alone reach the head. Known on the host, so the
    device is never asked how many there are.
    """

    spans: tuple[Span, ...]
    supervised: torch.Tensor
    kept_share: float
    image_kept_share: float

    @staticmethod
    def of(pack: Pack, policy: Policy, num_layers: int, seed: int = 0) -> TokenPlan:
        """The plan of one pack that is still on the host. Pure: (seed, pack.name) seeds everything random about it."""
        generator = np.random.default_rng([seed, *pack.name])
        num_tokens = len(pack.ids)
        bounds = pack.cu_seqlens.numpy()
        dense = (None, pack.cu_seqlens, pack.max_seqlen)

        spans: list[Span] = []
        layer, num_dropped = 0, 0
        for first, stop, keep_T in sorted(policy.spans(pack, num_layers, generator), key=lambda kept: kept.first):
            assert layer <= first < stop <= num_layers, "spans of a policy overlap or leave the model"
            if keep_T.all():
                continue  # nothing to leave out: the layers stay dense, bit for bit
            if layer < first:
                spans.append(Span(layer, first, *dense))
            spans.append(_span(first, stop, keep_T, bounds))
            num_dropped += (stop - first) * int(num_tokens - keep_T.sum())
            layer = stop
        if layer < num_layers:
            spans.append(Span(layer, num_layers, *dense))

        num_image = int((pack.image_hw[:, 0] * pack.image_hw[:, 1]).sum())
        return TokenPlan(
            spans=tuple(spans),
            supervised=torch.nonzero(pack.labels != IGNORED).flatten(),
            kept_share=1 - num_dropped / (num_layers * num_tokens),
            image_kept_share=1 - num_dropped / (num_layers * num_image) if num_image else 1.0,
        )

    def to(self, device: torch.device) -> TokenPlan:
        spans = tuple(span.to(device) for span in self.spans)
        return replace(self, spans=spans, supervised=self.supervised.to(device, non_blocking=True))


def _span(first: int, stop: int, keep_T: np.ndarray, bounds: np.ndarray) -> Span:
    """A document keeps its place among the bounds even if nothing of it is left (a length of zero is legal)."""
    num_kept_before = np.concatenate([[0], np.cumsum(keep_T)])
    cu_seqlens = num_kept_before[bounds].astype(np.int32)
    return Span(
        first=first,
        stop=stop,
        kept=torch.from_numpy(np.flatnonzero(keep_T)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )
