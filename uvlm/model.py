"""UnifiedVLM: the packed forward pass over an ordinary Hugging Face causal language model.

The modules and weight names are those of `transformers` (Llama, Qwen2 and Qwen3 families), so a trained model is an
ordinary model of that library. Only the way through it is ours: one flat run of T tokens, attention inside documents,
and tokens that leave and rejoin the stream where the TokenPlan says so.

Every module is called by its own `forward`, in the same order in every micro-step, with zero rows if there is nothing
to do: ZeRO-3 gathers weights in module hooks, and a weight without a gradient would be updated with an old one.
Projections that one kind of image has for itself are modules beside the backbone, and obey the same rule.

Legend: T tokens in a pack, R rows in a span, Q of them queries, D width, N query heads, G key/value heads, H head
dimension, S supervised tokens, V vocabulary, m images, C candidates and W scoring tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import checkpoint
from transformers import PreTrainedModel

from data_pipeline.packing import Pack
from uvlm.attention import varlen_attention
from uvlm.choice import Choice
from uvlm.head import Head
from uvlm.policies import Policy
from uvlm.token_plan import Parts, Span, TokenPlan

Recompute = Literal["none", "selective", "full"]
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


class UnifiedVLM(nn.Module):
    """Loss, or logits, at the supervised positions of one pack.

    Args:
        backbone: its `lm_head` is replaced by a Head of the same weight.
        policy: decides which projections each kind of image has for itself; what is left out comes with each plan.
        recompute: what the backward pass computes again instead of keeping it: "selective" the inside of each FFN,
            whose activations are the widest, "full" each layer.
    """

    def __init__(self, backbone: PreTrainedModel, policy: Policy | None = None, recompute: Recompute = "none") -> None:
        super().__init__()
        kinds = set(getattr(backbone.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"the backbone mixes attention kinds {sorted(kinds)}; only full attention is supported")
        if dropout := getattr(backbone.config, "attention_dropout", 0.0):
            raise ValueError(f"the backbone has attention_dropout={dropout}; set it to 0.0 in its config.json")
        backbone.lm_head = Head.of(backbone.lm_head)
        self.backbone = backbone
        self.num_layers: int = backbone.config.num_hidden_layers
        self.recompute = recompute
        self.image_projections = _image_projections(backbone.model.layers, policy or Policy())

    def forward(
        self, pack: Pack, plan: TokenPlan, weights_S: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weighted loss of a pack.

        Args:
            pack, plan: on the model's device.
            weights_S: fp32, what the loss of each supervised token (`plan.supervised`) is multiplied with.

        Returns:
            (loss, nll_S, right_S), see `Head.forward`: the sum of weights_S * nll_S in nats, fp32, with the head's
            z-loss; nll_S, fp32, without a graph; and whether each label is the model's first choice, bool.
        """
        return self.backbone.lm_head(self.hidden(pack, plan), pack.labels[plan.supervised], weights_S)

    def logits(self, pack: Pack, plan: TokenPlan) -> torch.Tensor:
        """Logits that predict `pack.labels[plan.supervised]`: [S, V] in the model's dtype, all at once."""
        return self.backbone.lm_head(self.hidden(pack, plan))

    def hidden(self, pack: Pack, plan: TokenPlan, cache: KeyValues | None = None) -> torch.Tensor:
        """Normalised states at the supervised positions, [S, D].

        Args:
            cache: a list to which each layer adds the (keys, values) of its span's rows, [R, G, H] each.
        """
        model = self.backbone.model
        hidden_TD = model.embed_tokens(pack.ids)
        rotation_TH = tuple(table[0] for table in model.rotary_emb(hidden_TD, pack.position_ids[None]))
        choices = {choice.layer: choice for choice in plan.choices}
        chosen_mC: torch.Tensor | None = None  # rows that the choice in force has left
        picked: torch.Tensor | None = None
        for span in plan.spans:
            if choice := choices.get(span.first):
                chosen_mC = self._choose(choice, chosen_mC, hidden_TD, rotation_TH)
                picked = chosen_mC.flatten()[choice.picked]
            hidden_TD = self._run(hidden_TD, rotation_TH, span, picked, cache)
        if not len(plan.supervised):  # a kernel with one program a row may refuse to run none
            return model.norm(hidden_TD[:1])[:0]
        return model.norm(_Gather.apply(hidden_TD, plan.supervised))

    def _run(
        self,
        hidden_TD: torch.Tensor,
        rotation_TH: tuple[torch.Tensor, ...],
        span: Span,
        picked: torch.Tensor | None,
        cache: KeyValues | None,
    ) -> torch.Tensor:
        """All layers of a span: gather, layers, scatter."""
        rows = span.rows
        if rows is None:
            return self._layers(hidden_TD, rotation_TH, span, cache)
        if span.holes is not None:
            assert picked is not None
            rows = rows.index_copy(0, span.holes, picked)
        rotation_RH = tuple(table.index_select(0, rows) for table in rotation_TH)
        hidden_RD = self._layers(_Gather.apply(hidden_TD, rows), rotation_RH, span, cache)
        num_queries = span.num_queries  # the rest are keys only, and have not changed
        return hidden_TD.index_copy(0, rows[:num_queries], hidden_RD[:num_queries])

    def _layers(
        self, hidden_RD: torch.Tensor, rotation_RH: tuple[torch.Tensor, ...], span: Span, cache: KeyValues | None
    ) -> torch.Tensor:
        for number in range(span.first, span.stop):
            hidden_RD = self._call(self._layer, "full", number, hidden_RD, rotation_RH, span, cache)
        return hidden_RD

    def _call(self, function: Callable[..., torch.Tensor], recompute: Recompute, *arguments: Any) -> torch.Tensor:
        """The function's value; what it computes on the way is not kept where the model recomputes in this way."""
        if self.recompute != recompute or not torch.is_grad_enabled():
            return function(*arguments)
        # The plan was made outside, so the second time sees the very same tokens.
        return checkpoint.checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _layer(
        self,
        number: int,
        hidden_RD: torch.Tensor,
        rotation_RH: tuple[torch.Tensor, ...],
        span: Span,
        cache: KeyValues | None,
    ) -> torch.Tensor:
        """One pre-norm decoder layer: rotary grouped-query attention, then a gated FFN."""
        layer = self.backbone.model.layers[number]
        q_QNH, k_RGH, v_RGH = self._project(number, layer.input_layernorm(hidden_RD), rotation_RH, span)
        if cache is not None:
            cache.append((k_RGH, v_RGH))
        if span.keys is not None:
            k_RGH, v_RGH = k_RGH.index_select(0, span.keys), v_RGH.index_select(0, span.keys)
        lengths = (span.cu_seqlens_q, span.cu_seqlens_k, span.max_seqlen_q, span.max_seqlen_k)
        mixed_QNH = varlen_attention(q_QNH, k_RGH, v_RGH, *lengths)
        hidden_QD = hidden_RD[: span.num_queries] + layer.self_attn.o_proj(mixed_QNH.flatten(1))
        if span.ffn is None:
            hidden_QD = self._call(self.feed_forward, "selective", number, hidden_QD)
        else:
            active_D = self._call(self.feed_forward, "selective", number, _Gather.apply(hidden_QD, span.ffn))
            hidden_QD = _Scatter.apply(hidden_QD, span.ffn, active_D)
        if span.num_queries == span.num_rows:
            return hidden_QD
        return torch.cat([hidden_QD, hidden_RD[span.num_queries :]])

    def feed_forward(self, number: int, hidden_D: torch.Tensor) -> torch.Tensor:
        """A layer's FFN with its norm, added to the states."""
        layer = self.backbone.model.layers[number]
        return hidden_D + layer.mlp(layer.post_attention_layernorm(hidden_D))

    def _project(
        self, number: int, x_RD: torch.Tensor, rotation_RH: tuple[torch.Tensor, ...], span: Span
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [Q, N, H] and keys [R, G, H], and values [R, G, H]."""
        project = partial(self._project_one, number)
        q_QNH = project("q", x_RD[: span.num_queries], span.query_parts)
        k_RGH = project("k", x_RD, span.key_parts)
        v_RGH = project("v", x_RD, span.key_parts)
        return rotate(q_QNH, *(table[: span.num_queries] for table in rotation_RH)), rotate(k_RGH, *rotation_RH), v_RGH

    def _project_one(self, number: int, name: str, x_RD: torch.Tensor, parts: Parts | None) -> torch.Tensor:
        """One projection into heads: by the layer's own module, or by kind where kinds have theirs."""
        if parts is None or not self.image_projections[number]:
            return self.project(number, name, x_RD)
        modules = [self._module(number, name, kind) for kind in ("text", *parts.kinds)]
        pieces = _Gather.apply(x_RD, parts.rows).split(parts.sizes)
        joined = torch.cat([module(piece) for module, piece in zip(modules, pieces, strict=True)])
        return self._heads(number, name, _Gather.apply(joined, parts.back))

    def project(self, number: int, name: str, x_RD: torch.Tensor, kind: str = "text") -> torch.Tensor:
        """Queries "q", keys "k" or values "v" of a layer for tokens of one kind, before rotation: [R, N or G, H]."""
        return self._heads(number, name, self._module(number, name, kind)(x_RD))

    def _module(self, number: int, name: str, kind: str = "text") -> nn.Module:
        """The projection "q", "k" or "v" that tokens of a kind go through in a layer."""
        own: Any = self.image_projections[number]
        key = f"{kind}_{name}"
        return own[key] if key in own else getattr(self.backbone.model.layers[number].self_attn, f"{name}_proj")

    def _heads(self, number: int, name: str, x_RD: torch.Tensor) -> torch.Tensor:
        """Cut into heads, and normed where the family does that to queries and keys."""
        attention = self.backbone.model.layers[number].self_attn
        x_RNH = x_RD.view(len(x_RD), -1, attention.head_dim)
        norm = getattr(attention, f"{name}_norm", None)
        return norm(x_RNH) if norm is not None else x_RNH

    @torch.no_grad()
    def _choose(
        self,
        choice: Choice,
        candidates: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        rotation_TH: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Rows of the image tokens that stay, int64 [m, most]: those to which the scoring tokens attend most.

        The score is the softmax over the image's candidates, averaged over heads and scoring tokens, with the queries
        and keys of the layer at whose entry the choice is made.
        """
        candidates = candidates if choice.candidates is None else choice.candidates
        assert candidates is not None
        norm = self.backbone.model.layers[choice.layer].input_layernorm

        def heads(name: str, kind: str, rows: torch.Tensor) -> torch.Tensor:
            x_RNH = self.project(choice.layer, name, norm(hidden_TD[rows.flatten()]), kind)
            rotation_RH = (table[rows.flatten()] for table in rotation_TH)
            return rotate(x_RNH, *rotation_RH).unflatten(0, rows.shape).float()

        q_mWNH, k_mCGH = heads("q", "text", choice.scoring), heads("k", "input", candidates)
        q_mWGNH = q_mWNH.unflatten(2, (k_mCGH.shape[2], -1))
        scores_mWGNC = torch.einsum("mwgnh,mcgh->mwgnc", q_mWGNH, k_mCGH) * k_mCGH.shape[-1] ** -0.5
        scores_mWGNC = scores_mWGNC.masked_fill(~choice.is_candidate[:, None, None, None], -torch.inf)
        weights_mWC = scores_mWGNC.softmax(-1).mean(dim=(2, 3))
        return choice.best(candidates, (weights_mWC * choice.is_scoring[:, :, None]).sum(dim=1))


def rotate(x_RNH: torch.Tensor, cos_RH: torch.Tensor, sin_RH: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) with each row's own angles.

    cos_RH, sin_RH: as `transformers` makes them, each angle twice.
    """
    return _Rotate.apply(x_RNH, cos_RH[:, None], sin_RH[:, None])


class _Rotate(torch.autograd.Function):
    """Pairs (x[i], x[i + H/2]) turned by an angle; the gradient is turned back. Three passes over memory, not ten."""

    @staticmethod
    def forward(ctx: Any, x_RNH: torch.Tensor, cos_R1H: torch.Tensor, sin_R1H: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_R1H, sin_R1H)
        return _turned(x_RNH, cos_R1H, sin_R1H, 1)

    @staticmethod
    def backward(ctx: Any, gradient_RNH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos_R1H, sin_R1H = ctx.saved_tensors
        return _turned(gradient_RNH, cos_R1H, sin_R1H, -1), None, None


def _turned(x_RNH: torch.Tensor, cos_R1H: torch.Tensor, sin_R1H: torch.Tensor, sign: int) -> torch.Tensor:
    half = x_RNH.shape[-1] // 2
    turned_RNH = x_RNH * cos_R1H
    turned_RNH[..., :half].addcmul_(x_RNH[..., half:], sin_R1H[..., half:], value=-sign)
    turned_RNH[..., half:].addcmul_(x_RNH[..., :half], sin_R1H[..., :half], value=sign)
    return turned_RNH


class _Gather(torch.autograd.Function):
    """x[rows] of rows that are all different: its gradient is written, not accumulated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_copy_(0, rows, gradient), None


class _Scatter(torch.autograd.Function):
    """x with rows replaced by `new`; it saves no tensor.

    A recomputation ends where the last saved tensor of the region is made again, and ZeRO-3's hooks see whether that is
    inside the last module or behind it. Where one rank scatters and another does not, it must be the same: otherwise
    one gathers a weight that the other still has, and both hang (run).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        ctx.rows = rows
        return x.index_copy(0, rows, new)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return gradient.index_fill(0, ctx.rows, 0), None, gradient.index_select(0, ctx.rows)


def _image_projections(layers: nn.ModuleList, policy: Policy) -> nn.ModuleList:
    """By layer, the projections that kinds of images have for themselves; they start as copies of the shared ones."""
    return nn.ModuleList(
        nn.ModuleDict({name: _like(getattr(layer.self_attn, f"{name[-1]}_proj")) for name in names})
        for layer, names in zip(layers, policy.own_projections(len(layers)), strict=True)
    )


def _like(shared: nn.Linear) -> nn.Linear:
    """A new module with the same values. Of one whose weights are spread over ranks there are none to copy yet."""
    weight, bias = shared.weight, shared.bias is not None
    own = nn.Linear(shared.in_features, shared.out_features, bias, device=weight.device, dtype=weight.dtype)
    own.load_state_dict(shared.state_dict())
    return own
