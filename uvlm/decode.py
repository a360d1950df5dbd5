"""Decoding with a cache: sequences that grow by one token at a time, in the roles they were trained with.

The prompts are one pack, and go through the packed layers of training; what each layer computed as keys and values is
kept. Then a token at a time is appended. The policy gives its role in each layer: where it bypasses a layer, that
layer's cache does not grow; where it is context, only its keys and values are made. So the layers' caches differ in
length, and a method that leaves tokens out in the finished model saves here too.

The logits equal those of a packed pass over the whole document, under every policy (test_decode.py). Keys may stand in
any order, as each is rotated by its own position and a new token sees all of them.

Cost (run): 8 images of 64 codes from 4 layers of width 256 take 0.17 s of one core, dense, the same as `transformers`
with its own cache, and 0.94 of its time with 256 codes; with one of the 4 layers skipped (hmgen) 0.72 of dense.

Legend: B sequences, R rows in a span, S cached keys, D width, N query heads, G key/value heads, H head dimension,
L layers, V vocabulary, M codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data_pipeline.encode import Encoded
from data_pipeline.packing import make_pack
from uvlm.attention import cached_attention
from uvlm.model import KeyValues, UnifiedVLM, rotate
from uvlm.policies import Policy
from uvlm.roles import BYPASS, DENSE, FFN, QUERY
from uvlm.token_plan import TokenPlan


class Decoder:
    """B sequences that grow together. `logits_BV` predicts the next token of each, in the model's dtype.

    Args:
        policy: of training; what holds is the policy that the finished model has at inference.
        prompts: documents without their ends (`first_slots`), of one length and with images of one kind and size at one
            place. An image whose slot carries loss is a target, as in training.
    """

    @torch.inference_mode()
    def __init__(self, model: UnifiedVLM, policy: Policy, prompts: Sequence[Encoded]) -> None:
        shapes = [(len(each), each.image_starts, each.image_shapes, each.image_targets) for each in prompts]
        assert shapes.count(shapes[0]) == len(prompts), "prompts that decode together have one length and like images"
        self._model = model
        self._policy = policy.at_inference()
        self._tables: dict[int, np.ndarray] = {}
        device = model.backbone.device
        self._length = torch.tensor([len(prompts[0])], device=device)

        pack = make_pack(prompts, sum(map(len, prompts)), pad_id=0, name=(0, 0))
        plan = TokenPlan.of(pack, self._policy, model.num_layers, progress=1.0)
        plan = replace(plan, supervised=pack.cu_seqlens[1:].long() - 1)
        by_layer: KeyValues = []
        hidden_BD = model.hidden(pack.to(device), plan.to(device), by_layer)
        self.logits_BV: torch.Tensor = model.backbone.lm_head(hidden_BD)
        queries = [span.num_queries for span in plan.spans for _ in range(span.first, span.stop)]
        self._cache = [
            _Cache(_by_sequence(torch.stack(keys_and_values), num_queries, len(prompts)))
            for keys_and_values, num_queries in zip(by_layer, queries, strict=True)
        ]

    @torch.inference_mode()
    def step(self, ids_B: torch.Tensor, code: tuple[int, int] | None = None) -> torch.Tensor:
        """Append one token to each sequence.

        Args:
            ids_B: int64.
            code: (number, of how many) where the tokens are codes of an image that is being drawn; None for text and
                markers.

        Returns:
            `logits_BV`, now of the token after.
        """
        inner = self._model.backbone.model
        hidden_BD = inner.embed_tokens(ids_B)
        rotation_1H = tuple(table[0] for table in inner.rotary_emb(hidden_BD, self._length[None]))
        for number, role in enumerate(self._roles(code)):
            if role > BYPASS:
                hidden_BD = self._layer(number, hidden_BD, rotation_1H, role, "text" if code is None else "target")
        self._length += 1
        self.logits_BV = self._model.backbone.lm_head(inner.norm(hidden_BD))
        return self.logits_BV

    def _layer(
        self, number: int, hidden_BD: torch.Tensor, rotation_1H: tuple[torch.Tensor, ...], role: int, kind: str
    ) -> torch.Tensor:
        model, layer = self._model, self._model.backbone.model.layers[number]
        x_BD = layer.input_layernorm(hidden_BD)
        k_BGH = rotate(model.project(number, "k", x_BD, kind), *rotation_1H)
        self._cache[number].append(k_BGH, model.project(number, "v", x_BD, kind))
        if role < QUERY:
            return hidden_BD
        q_BNH = rotate(model.project(number, "q", x_BD, kind), *rotation_1H)
        mixed_BNH = cached_attention(q_BNH, *self._cache[number].filled)
        hidden_BD = hidden_BD + layer.self_attn.o_proj(mixed_BNH.flatten(1))
        if role < FFN:
            return hidden_BD
        return model.feed_forward(number, hidden_BD)

    def _roles(self, code: tuple[int, int] | None) -> list[int]:
        """The role in each layer."""
        if code is None:
            return [DENSE] * self._model.num_layers
        number, num_codes = code
        if num_codes not in self._tables:
            random = np.random.default_rng(0)
            self._tables[num_codes] = self._policy.target.table(self._model.num_layers, num_codes, 1.0, random)
        return self._tables[num_codes][:, number].tolist()


def first_slots(document: Encoded, num_slots: int) -> Encoded:
    """The document up to a slot, as a prompt: num_slots=-1 is all but its end."""
    lengths = document.slot_lengths[:num_slots]
    num_images = sum(start < sum(lengths) for start in document.image_starts)
    return replace(
        document,
        ids=document.ids[: sum(lengths)],
        slot_lengths=lengths,
        slot_segments=document.slot_segments[:num_slots],
        slot_losses=document.slot_losses[:num_slots],
        image_starts=document.image_starts[:num_images],
        image_shapes=document.image_shapes[:num_images],
        image_targets=document.image_targets[:num_images],
    )


class _Cache:
    """Keys and values of one layer. Room doubles when it is full: a token costs no copy of all before it."""

    def __init__(self, room_2BSGH: torch.Tensor) -> None:
        self._room_2BSGH = room_2BSGH
        self._length = room_2BSGH.shape[2]

    def append(self, k_BGH: torch.Tensor, v_BGH: torch.Tensor) -> None:
        if self._length == self._room_2BSGH.shape[2]:
            self._room_2BSGH = torch.cat([self._room_2BSGH, torch.empty_like(self._room_2BSGH)], dim=2)
        self._room_2BSGH[0, :, self._length] = k_BGH
        self._room_2BSGH[1, :, self._length] = v_BGH
        self._length += 1

    @property
    def filled(self) -> torch.Tensor:
        """[2, B, S, G, H]"""
        return self._room_2BSGH[:, :, : self._length]


def _by_sequence(x_2RGH: torch.Tensor, num_queries: int, num_sequences: int) -> torch.Tensor:
    """[2, B, R / B, G, H] of a span's rows: the queries of all sequences one after the other, then what is key only."""
    parts = (x_2RGH[:, :num_queries], x_2RGH[:, num_queries:])
    return torch.cat([part.unflatten(1, (num_sequences, -1)) for part in parts], dim=2)
