"""Roles applied by definition: slow, in float64, document by document, with a dense mask in every layer.

What uvlm/model.py computes with packs, spans, segments and kernels is written here as the definition reads. Key j is
visible to query i iff j <= i and j has the key role in this layer; a token that is no query keeps its state; one
without the ffn role adds attention only. Only the weights come from the model. What the two share is `policy.fill`,
which says which tokens have which roles (test_policies.py holds it against each method's definition), and the
generator that it draws from.
Cost (run): 60 ms for a pack of 171 tokens and five tiny layers, forward and backward; the packed path takes 15 ms.

Legend: L layers, n tokens of a document, D width, N query heads, G key/value heads, H head dimension, S supervised
tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data_pipeline.encode import IGNORED, IMAGE
from data_pipeline.packing import Pack
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy, Pyramid
from uvlm.policies.ratio import ratio_at
from uvlm.roles import BYPASS, CONTEXT, DENSE, NO_FFN

NUM_SCORING = 8


class Image(NamedTuple):
    """Codes start <= t < stop of a document."""

    start: int
    stop: int
    kind: str  # "input" or "target"


class Document(NamedTuple):
    """One document of a pack, the unused tail included."""

    start: int  # in the pack
    ids: torch.Tensor  # [n]
    labels: torch.Tensor  # [n]
    is_text: np.ndarray  # [n], False for image codes and their markers
    images: list[Image]
    roles: np.ndarray  # [L, n]; a choice by score changes it while the layers run


class Reference(NamedTuple):
    """logits: [S, V]; loss: the weighted sum; gradients: by parameter name; all float64.

    gap: the least distance, over all choices, of the scores of the last token that stayed and of the first that left.
    Where it is tiny, fp32 may choose otherwise, and both are right.
    """

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    gap: float


def reference(
    model: UnifiedVLM, pack: Pack, policy: Policy, weights_S: torch.Tensor, seed: int = 0, progress: float = 0.0
) -> Reference:
    """Logits at the supervised positions, the loss sum(weights_S * nll_S) and all its gradients."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    policy, progress = policy.at(progress)
    logits, labels, gaps = [], [], [math.inf]
    for document in _documents(pack, policy, model.num_layers, seed, progress):
        hidden_nD, gap = _run(model, document, policy.input, progress)
        is_supervised = document.labels != IGNORED
        logits.append(hidden_nD[is_supervised] @ model.backbone.lm_head.weight.T)
        labels.append(document.labels[is_supervised])
        gaps.append(gap)
    logits_SV, labels_S = torch.cat(logits), torch.cat(labels)
    nll_S = logits_SV.logsumexp(1) - logits_SV[torch.arange(len(labels_S)), labels_S]
    loss = (nll_S * weights_S.double()).sum()
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return Reference(logits_SV.detach(), loss.detach(), gradients, min(gaps))


def _documents(pack: Pack, policy: Policy, num_layers: int, seed: int, progress: float) -> list[Document]:
    bounds = pack.cu_seqlens.tolist()
    documents = [
        Document(
            start=start,
            ids=pack.ids[start:stop],
            labels=pack.labels[start:stop],
            is_text=pack.segment[start:stop].numpy() != IMAGE,
            images=[],
            roles=np.full((num_layers, stop - start), DENSE, dtype=np.uint8),
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    generator = np.random.default_rng([seed, *pack.name])
    shapes = zip(pack.image_start.tolist(), pack.image_hw.tolist(), pack.image_is_target.tolist(), strict=True)
    for start, (height, width), is_target in shapes:
        document = next(document for document in reversed(documents) if document.start <= start)
        first = start - document.start
        image = Image(first, first + height * width, "target" if is_target else "input")
        document.images.append(image)
        image_policy = policy.target if is_target else policy.input
        image_policy.fill(document.roles[:, image.start : image.stop], progress, generator)
    return documents


def _run(model: UnifiedVLM, document: Document, input_policy: Any, progress: float) -> tuple[torch.Tensor, float]:
    """Normalised states [n, D] of one document alone, and the smallest gap of its choices."""
    inner = model.backbone.model
    hidden_nD = inner.embed_tokens.weight[document.ids]
    gap = math.inf
    for number in range(model.num_layers):
        if isinstance(input_policy, Pyramid) and input_policy.selection == "score":
            for image in document.images:
                if image.kind == "input":
                    gap = min(gap, _choose(model, number, document, image, hidden_nD, input_policy, progress))
        hidden_nD = _layer(model, number, hidden_nD, document)
    return _rms_norm(inner.norm, hidden_nD), gap


def _layer(model: UnifiedVLM, number: int, hidden_nD: torch.Tensor, document: Document) -> torch.Tensor:
    layer = model.backbone.model.layers[number]
    role_n = torch.from_numpy(document.roles[number].astype(np.int64))
    q_nNH, k_nGH, v_nGH = _heads(model, number, hidden_nD, document)
    num_groups = q_nNH.shape[1] // k_nGH.shape[1]
    k_nNH, v_nNH = k_nGH.repeat_interleave(num_groups, 1), v_nGH.repeat_interleave(num_groups, 1)
    scores_Nij = torch.einsum("inh,jnh->nij", q_nNH, k_nNH) / math.sqrt(q_nNH.shape[2])
    tokens = torch.arange(len(role_n))
    is_visible_ij = (tokens[None] <= tokens[:, None]) & (role_n >= CONTEXT)[None]
    # A token that is no query may see nothing at all; its row is thrown away below, so it may see itself here.
    is_visible_ij |= torch.eye(len(role_n), dtype=torch.bool) & (role_n < NO_FFN)[:, None]
    weights_Nij = scores_Nij.masked_fill(~is_visible_ij, -math.inf).softmax(2)
    mixed_nNH = torch.einsum("nij,jnh->inh", weights_Nij, v_nNH)
    updated_nD = hidden_nD + mixed_nNH.flatten(1) @ layer.self_attn.o_proj.weight.T
    x_nD = _rms_norm(layer.post_attention_layernorm, updated_nD)
    gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    ffn_nD = (nn.functional.silu(x_nD @ gate.T) * (x_nD @ up.T)) @ down.T
    updated_nD = torch.where((role_n >= DENSE)[:, None], updated_nD + ffn_nD, updated_nD)
    return torch.where((role_n >= NO_FFN)[:, None], updated_nD, hidden_nD)


def _heads(
    model: UnifiedVLM, number: int, hidden_nD: torch.Tensor, document: Document
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys, normed and rotated by the original positions, and values of all tokens of a document."""
    attention = model.backbone.model.layers[number].self_attn
    x_nD = _rms_norm(model.backbone.model.layers[number].input_layernorm, hidden_nD)
    own: Any = model.image_projections[number]
    heads = {}
    for letter in "qkv":
        shared = getattr(attention, f"{letter}_proj")
        out_nD = _linear(shared, x_nD)
        for image in document.images:
            if f"{image.kind}_{letter}" in own:
                rows = torch.zeros(len(x_nD), 1, dtype=torch.bool)
                rows[image.start : image.stop] = True
                out_nD = torch.where(rows, _linear(own[f"{image.kind}_{letter}"], x_nD), out_nD)
        heads[letter] = out_nD.unflatten(1, (-1, attention.head_dim))
        if letter != "v":
            norm = getattr(attention, f"{letter}_norm", None)
            normed = heads[letter] if norm is None else _rms_norm(norm, heads[letter])
            heads[letter] = _rotated(normed, model.backbone.config.rope_parameters["rope_theta"])
    return heads["q"], heads["k"], heads["v"]


def _choose(
    model: UnifiedVLM,
    number: int,
    document: Document,
    image: Image,
    hidden_nD: torch.Tensor,
    policy: Pyramid,
    progress: float,
) -> float:
    """Write into the document's roles which codes of an image stay from this layer on, if it begins a stage.

    The score of a code is the softmax over the codes that are left, averaged over heads and the last few text tokens up
    to the first supervised position. Returns the gap between the last that stays and the first that leaves.
    """
    num_layers, num_codes = model.num_layers, image.stop - image.start
    num_stages = len(policy.keep)
    quarters = [(stage + 1) * num_layers // (num_stages + 1) for stage in range(num_stages)]
    layers = quarters if policy.layers is None else policy.layers
    if number not in layers:
        return math.inf
    # Those left are those of the layer before: this layer's own row of the table holds stand-ins so far.
    left = np.arange(image.start, image.stop)
    if number > 0:
        left = left[document.roles[number - 1, image.start : image.stop] > BYPASS]
    num_kept = round(ratio_at(policy.keep[layers.index(number)], progress) * num_codes)
    is_supervised = document.labels.numpy() != IGNORED
    end = int(np.argmax(is_supervised)) + 1 if is_supervised.any() else len(is_supervised)
    scoring = np.flatnonzero(document.is_text[:end])[-NUM_SCORING:]
    with torch.no_grad():
        q_nNH, k_nGH, _ = _heads(model, number, hidden_nD, document)
        q_wNH, k_cGH = q_nNH[scoring], k_nGH[left]
        k_cNH = k_cGH.repeat_interleave(q_wNH.shape[1] // k_cGH.shape[1], 1)
        weights_Nwc = (torch.einsum("wnh,cnh->nwc", q_wNH, k_cNH) / math.sqrt(q_wNH.shape[2])).softmax(2)
        scores_c = weights_Nwc.mean(dim=(0, 1)).numpy()
    best_first = np.argsort(-scores_c)
    stop = num_layers if policy.return_layer is None else policy.return_layer
    document.roles[number:stop, image.start : image.stop] = BYPASS
    document.roles[number:stop, left[best_first[:num_kept]]] = DENSE
    if not 0 < num_kept < len(left):
        return math.inf
    return float(scores_c[best_first[num_kept - 1]] - scores_c[best_first[num_kept]])


def _linear(module: Any, x_nD: torch.Tensor) -> torch.Tensor:
    out_nD = x_nD @ module.weight.T
    return out_nD if module.bias is None else out_nD + module.bias


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def _rotated(x_nNH: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864): the pair (i, i + H/2) turned by position * theta^(-2i/H)."""
    half = x_nNH.shape[2] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_n1h = (torch.arange(len(x_nNH), dtype=torch.float64)[:, None] * frequency)[:, None]
    first, second = x_nNH[..., :half], x_nNH[..., half:]
    cos, sin = angle_n1h.cos(), angle_n1h.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=2)
