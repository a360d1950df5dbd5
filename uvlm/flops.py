"""FLOPs of a token plan: exact, by layer, task and module, forward and backward.

Counted are matrix products, at two FLOPs a multiply-add: projections, attention over the (query, key) pairs that the
causal mask allows, the gated FFN, the head at supervised positions, and the scores of a choice. The backward pass of a
product is two products of the same size; a score has none. Recomputation is not counted: these are the model's FLOPs,
as in "model FLOPs utilisation". Norms, rotations and activations are left out, as is usual (PaLM, arXiv 2204.02311,
app. B).

Legend: L layers, K = len(TASKS) + 1 (the last entry is the unused tail of a pack).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from uvlm.token_plan import TokenPlan

MODULES = ("query", "key_value", "attention", "output", "ffn", "score", "head")


class Widths(NamedTuple):
    """Sizes that decide the FLOPs."""

    hidden: int
    query: int  # heads x head dimension
    key: int  # key/value heads x head dimension
    ffn: int
    vocab: int

    @staticmethod
    def of(hf_config: Any) -> Widths:
        """The sizes of a `transformers` config of a supported family."""
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        return Widths(
            hidden=hf_config.hidden_size,
            query=hf_config.num_attention_heads * head_dim,
            key=hf_config.num_key_value_heads * head_dim,
            ffn=hf_config.intermediate_size,
            vocab=hf_config.vocab_size,
        )


@dataclass(frozen=True)
class Flops:
    """forward, backward: int64 [L + 1, K, len(MODULES)]; the head stands behind the last layer."""

    forward: np.ndarray
    backward: np.ndarray

    @property
    def total(self) -> int:
        return int(self.forward.sum() + self.backward.sum())

    def by_layer(self) -> np.ndarray:
        """Forward and backward, int64 [L + 1]."""
        return (self.forward + self.backward).sum(axis=(1, 2))

    def by_task(self) -> np.ndarray:
        """Forward and backward, int64 [K]."""
        return (self.forward + self.backward).sum(axis=(0, 2))

    def by_module(self) -> dict[str, int]:
        """Forward and backward of each of MODULES."""
        return dict(zip(MODULES, (self.forward + self.backward).sum(axis=(0, 1)).tolist(), strict=True))


def dense_flops(plan: TokenPlan, widths: Widths) -> int:
    """FLOPs of the same pack, forward and backward, with every token in every role."""
    num_pairs = sum(length * (length + 1) // 2 for length in plan.document_lengths)
    projections = 2 * widths.hidden * (widths.query + widths.key) + 3 * widths.hidden * widths.ffn
    layer = plan.num_tokens * projections + 2 * num_pairs * widths.query
    head = int(plan.supervised_by_task.sum()) * widths.hidden * widths.vocab
    return 6 * (plan.num_layers * layer + head)


def flops(plan: TokenPlan, widths: Widths) -> Flops:
    """FLOPs of one pack's forward and backward pass."""
    work = plan.spans[0].work
    forward = np.zeros((plan.num_layers + 1, len(work.queries), len(MODULES)), dtype=np.int64)
    column = {name: i for i, name in enumerate(MODULES)}
    for span in plan.spans:
        layers, work = slice(span.first, span.stop), span.work
        forward[layers, :, column["query"]] = 2 * work.queries * widths.hidden * widths.query
        forward[layers, :, column["key_value"]] = 2 * 2 * work.keys * widths.hidden * widths.key
        forward[layers, :, column["attention"]] = 2 * 2 * work.pairs * widths.query
        forward[layers, :, column["output"]] = 2 * work.queries * widths.query * widths.hidden
        forward[layers, :, column["ffn"]] = 3 * 2 * work.ffn * widths.hidden * widths.ffn
    forward[-1, :, column["head"]] = 2 * plan.supervised_by_task * widths.hidden * widths.vocab
    backward = 2 * forward
    for choice in plan.choices:
        num_scoring, num_candidates = choice.is_scoring.shape[1], choice.is_candidate.shape[1]  # padding counts too
        projections = num_scoring * widths.hidden * widths.query + num_candidates * widths.hidden * widths.key
        each = 2 * (projections + num_scoring * num_candidates * widths.query)
        forward[choice.layer, :, column["score"]] = plan.images_by_task * each
    return Flops(forward, backward)
