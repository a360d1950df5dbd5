"""UnifiedVLM: the packed forward pass over an ordinary Hugging Face causal language model.

The modules and weight names are those of `transformers` (Llama, Qwen2 and Qwen3 families), so a trained model is an
ordinary model of that library. Only the way through it is ours: one flat run of T tokens, attention inside documents,
and tokens that leave and rejoin the stream where the TokenPlan says so.

Every module is called by its own `forward`, in the same order in every micro-step: ZeRO-3 gathers weights in module
hooks. The head sees supervised positions only (zero rows are legal): where a third of the tokens is supervised, two
thirds of the logits are never computed.

Legend: T tokens in a pack, K kept in a span, D width, N query heads, G key/value heads, H head dimension,
S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from data_pipeline.packing import Pack
from uvlm.attention import varlen_attention
from uvlm.strict import Strict
from uvlm.token_plan import Span, TokenPlan


class ModelConfig(Strict):
    """A backbone built from its configuration. Names are the field's; `transformers` names stand in `hf_config`."""

    family: Literal["llama", "qwen2", "qwen3"] = "qwen3"
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the gated FFN")
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    max_position: int = Field(default=4096, description="longest document the exported model claims to handle")


def build_backbone(config: ModelConfig, vocab_size: int) -> PreTrainedModel:
    """A freshly initialised fp32 backbone, seeded by the caller through `torch.manual_seed`."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.num_heads={config.num_heads} does not divide over model.num_kv_heads={config.num_kv_heads} groups; "
            f"use num_kv_heads={config.num_heads}"
        )
    hf_config = AutoConfig.for_model(
        config.family,
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)


class UnifiedVLM(nn.Module):
    """Logits at the supervised positions of one pack."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        kinds = set(getattr(backbone.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"the backbone mixes attention kinds {sorted(kinds)}; only full attention is supported")
        self.backbone = backbone
        self.num_layers: int = backbone.config.num_hidden_layers

    def forward(self, pack: Pack, plan: TokenPlan) -> torch.Tensor:
        """Logits that predict `pack.labels[plan.supervised]`: [S, V] in the model's dtype.

        `pack` and `plan` lie on the model's device.
        """
        model = self.backbone.model
        hidden_TD = model.embed_tokens(pack.ids)
        cos_TH, sin_TH = (table[0] for table in model.rotary_emb(hidden_TD, pack.position_ids[None]))
        for span in plan.spans:
            if span.kept is None:
                hidden_TD = self._run(hidden_TD, cos_TH, sin_TH, span)
            else:
                kept_K = span.kept
                hidden_KD = self._run(hidden_TD[kept_K], cos_TH[kept_K], sin_TH[kept_K], span)
                hidden_TD = hidden_TD.index_copy(0, kept_K, hidden_KD)
        hidden_SD = model.norm(hidden_TD[plan.supervised])
        return self.backbone.lm_head(hidden_SD)

    def _run(self, hidden_KD: torch.Tensor, cos_KH: torch.Tensor, sin_KH: torch.Tensor, span: Span) -> torch.Tensor:
        for layer in self.backbone.model.layers[span.first : span.stop]:
            hidden_KD = _decoder_layer(layer, hidden_KD, cos_KH, sin_KH, span)
        return hidden_KD


def _decoder_layer(
    layer: Any, hidden_KD: torch.Tensor, cos_KH: torch.Tensor, sin_KH: torch.Tensor, span: Span
) -> torch.Tensor:
    """One pre-norm decoder layer of the three families: rotary grouped-query attention, then a gated FFN."""
    attention = layer.self_attn
    x_KD = layer.input_layernorm(hidden_KD)
    heads = (len(x_KD), -1, attention.head_dim)
    q_KNH = attention.q_proj(x_KD).view(heads)
    k_KGH = attention.k_proj(x_KD).view(heads)
    v_KGH = attention.v_proj(x_KD).view(heads)
    if hasattr(attention, "q_norm"):
        q_KNH, k_KGH = attention.q_norm(q_KNH), attention.k_norm(k_KGH)
    q_KNH, k_KGH = apply_rotary_pos_emb(q_KNH, k_KGH, cos_KH, sin_KH, unsqueeze_dim=1)
    mixed_KNH = varlen_attention(q_KNH, k_KGH, v_KGH, span.cu_seqlens, span.max_seqlen)
    hidden_KD = hidden_KD + attention.o_proj(mixed_KNH.flatten(1))
    return hidden_KD + layer.mlp(layer.post_attention_layernorm(hidden_KD))
