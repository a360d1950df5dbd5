"""Small packs and models for tests; no data on disk."""

from __future__ import annotations

import numpy as np
import torch

from data_pipeline.encode import IMAGE, INSTRUCTION, OUTPUT, Encoded
from data_pipeline.packing import Pack, make_pack
from data_pipeline.schema import TASKS
from uvlm.backbone import Family, ModelConfig, build_backbone
from uvlm.model import Recompute, UnifiedVLM
from uvlm.policies import Policy

VOCAB_SIZE = 97


def document(task: str, num_before: int, num_codes: int, num_after: int, seed: int = 0) -> Encoded:
    """A document of random ids: some text, an image of `num_codes` codes in one row (none for 0), some text.

    The image is a target in task "generate" and an input elsewhere; the other part carries the loss.
    """
    length = num_before + num_codes + num_after
    ids = np.random.default_rng([seed, length]).integers(0, VOCAB_SIZE, length)
    is_target = task == "generate"
    num_images = 1 if num_codes else 0
    return Encoded(
        ids=ids,
        slot_lengths=[num_before, num_codes, num_after],
        slot_segments=[INSTRUCTION, IMAGE, INSTRUCTION if is_target else OUTPUT],
        slot_losses=[False, is_target, not is_target],
        task=TASKS.index(task),
        source="test",
        doc_id=f"{task}-{seed}",
        image_starts=[num_before] * num_images,
        image_shapes=[(1, num_codes)] * num_images,
        image_targets=[is_target] * num_images,
    )


def mixed_pack(num_tokens: int = 128, name: tuple[int, int] = (0, 0)) -> Pack:
    """An understanding, a generating and a text document, and an unused tail."""
    documents = [
        document("understand", 3, 16, 9, seed=1),
        document("generate", 5, 25, 1, seed=2),
        document("text", 4, 0, 20, seed=3),
    ]
    return make_pack(documents, num_tokens, 0, name)


def tiny_model(
    family: Family = "qwen3",
    num_layers: int = 4,
    tie_embeddings: bool = False,
    policy: Policy | None = None,
    recompute: Recompute = "none",
    vocab_size: int = VOCAB_SIZE,
) -> UnifiedVLM:
    """A few thousand weights, the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig(
        family=family,
        hidden_size=32,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=tie_embeddings,
    )
    return UnifiedVLM(build_backbone(config, vocab_size), policy, recompute)
