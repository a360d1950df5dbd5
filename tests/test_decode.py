"""Token by token with a cache, under any policy, is the packed pass over the whole document."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from data_pipeline.encode import Encoded, encode
from data_pipeline.packing import make_pack
from tests.helpers import tiny_model
from tests.test_schema import make_document
from tests.test_vocab import make_vocab
from uvlm.attention import cached_attention
from uvlm.backbone import Family
from uvlm.decode import Decoder, first_slots
from uvlm.model import UnifiedVLM
from uvlm.policies import ImagePolicy, Policy
from uvlm.roles import BYPASS, CONTEXT
from uvlm.token_plan import TokenPlan

VOCAB = make_vocab(num_codes=64)
NUM_SEQUENCES = 3
NUM_LAYERS = 4
CODES = np.zeros((3, 5), dtype=np.uint16)
HIMIX, HMGEN = {"name": "himix"}, {"name": "hmgen", "layers": [1, 2]}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, own projections": {"input_projections": "kv", "target_projections": "qkv"},
    "himix": {"input": HIMIX},
    "himix, own kv": {"input": HIMIX, "input_projections": "kv"},
    "hmgen": {"target": HMGEN},
    "hmgen, own qkv": {"target": HMGEN, "target_projections": "qkv"},
    "himix and hmgen": {"input": HIMIX, "target": HMGEN, "input_projections": "kv", "target_projections": "qkv"},
    "himix in some layers": {"name": "himix", "layers": [1, 3], "target_projections": "kv"},
    "freeze": {"name": "freeze", "first_layer": 2},
    "ffn_skip": {"name": "ffn_skip"},
    "pyramid by score": {"input": {"name": "pyramid", "layers": [1, 2], "keep": [0.5, 0.25]}},
    "pyramid, own qkv": {
        "input": {"name": "pyramid", "layers": [2], "keep": [0.4], "return_layer": 3},
        "input_projections": "qkv",
        "target": HMGEN,
    },
    "pyramid, uniform": {"input": {"name": "pyramid", "layers": [1, 2], "keep": [0.5, 0.25], "selection": "uniform"}},
    "pyramid, random": {"input": {"name": "pyramid", "layers": [1, 2], "keep": [0.5, 0.25], "selection": "random"}},
    "pyramid, scheduled": {"input": {"name": "pyramid", "layers": [1], "keep": [{"start": 0.2, "end": 0.7}]}},
    "route": {"name": "route", "first_layer": 1, "last_layer": 2},
    "himix with a full tail": {"input": HIMIX, "full_tail": 0.1},
}
# Slots as text, or None for an image, and whether they carry loss; the prompt is what comes before the first that does.
DOCUMENTS: dict[str, tuple[tuple[str | None, ...], tuple[bool, ...]]] = {
    "understand": ((None, "what color is it?", " a red circle"), (False, False, True)),
    "generate": (("a red circle", None), (False, True)),
    "interleave": (("see", None, "now in blue:", None), (False, False, False, True)),
    "interleave with text": ((None, "what?", " blue", None, " and done"), (False, False, True, True, True)),
}


def _model(family: Family, policy: Policy) -> UnifiedVLM:
    """Random weights everywhere, so that no bias, norm or projection of a kind could be left out unnoticed."""
    model = tiny_model(family, NUM_LAYERS, tie_embeddings=True, policy=policy, vocab_size=VOCAB.size)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.ndim == 1 else 0.0, std=0.2)
    return model.eval()


def _documents(name: str) -> list[Encoded]:
    """Documents that differ in every text token and every code, and in nothing else."""
    texts, losses = DOCUMENTS[name]
    codes = {f"{i}.npy": CODES for i, text in enumerate(texts) if text is None}
    encoded = encode(make_document("d", texts, loss=losses, task="interleave", codes=codes), VOCAB)
    assert isinstance(encoded, Encoded)
    random = np.random.default_rng(1)
    documents = []
    for _ in range(NUM_SEQUENCES):
        ids = encoded.ids.copy()
        for first, stop in ((0, VOCAB.num_text), (VOCAB.first_code, VOCAB.size)):
            is_within = (ids >= first) & (ids < stop)
            ids[is_within] = random.integers(first, stop, is_within.sum())
        documents.append(replace(encoded, ids=ids))
    return documents


def _teacher_forced(model: UnifiedVLM, policy: Policy, documents: list[Encoded]) -> torch.Tensor:
    """The same as `_decoded` from one pass over a pack of the whole documents."""
    pack = make_pack(documents, sum(map(len, documents)), VOCAB.pad, (0, 0))
    plan = TokenPlan.of(pack, policy.at_inference(), NUM_LAYERS, progress=1.0)
    with torch.inference_mode():
        return model.logits(pack, plan).unflatten(0, (NUM_SEQUENCES, -1))


def _assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """At each position, norm-wise."""
    assert got.shape == want.shape
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < 1e-5


def _decoded(model: UnifiedVLM, policy: Policy, documents: list[Encoded]) -> torch.Tensor:
    """Logits of every token from the first slot with loss to the end of the last one: [B, tokens, V]."""
    one = documents[0]
    prompts = [first_slots(document, one.slot_losses.index(True)) for document in documents]
    decoder = Decoder(model, policy, prompts)
    logits = [decoder.logits_BV]
    num_codes = CODES.size
    code_of = {start + i: (i, num_codes) for start in one.image_starts for i in range(num_codes)}
    for place in range(len(prompts[0]), len(one) - 2):
        ids_B = torch.tensor([document.ids[place] for document in documents])
        logits.append(decoder.step(ids_B, code_of.get(place)))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    "policy", [pytest.param(Policy.model_validate(tree), id=key) for key, tree in POLICIES.items()]
)
def test_prefill_and_steps_equal_the_packed_pass_over_the_whole_document(
    policy: Policy, name: str, family: Family
) -> None:
    policy.check(NUM_LAYERS)
    model, documents = _model(family, policy), _documents(name)
    _assert_close(_decoded(model, policy, documents), _teacher_forced(model, policy, documents))


def test_roles_may_differ_from_code_to_code() -> None:
    class EverySecond(ImagePolicy):
        def fill(self, roles_LM: np.ndarray, progress: float, generator: np.random.Generator) -> None:
            roles_LM[1, ::2], roles_LM[2, 1::2] = BYPASS, CONTEXT

    policy = Policy().model_copy(update={"target": EverySecond()})
    model, documents = _model("qwen3", Policy()), _documents("generate")
    _assert_close(_decoded(model, policy, documents), _teacher_forced(model, policy, documents))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_dense_equals_transformers_own_cache(family: Family) -> None:
    model, documents = _model(family, Policy()), _documents("interleave with text")
    got = _decoded(model, Policy(), documents)
    ids = torch.from_numpy(np.stack([document.ids for document in documents]))
    cache, pieces = DynamicCache(config=model.backbone.config), []
    num_prompt = ids.shape[1] - 1 - got.shape[1]
    with torch.inference_mode():
        for part in (ids[:, :num_prompt], *ids[:, num_prompt:-2].split(1, dim=1)):
            pieces.append(model.backbone(input_ids=part, past_key_values=cache, use_cache=True).logits[:, -1])
    want = torch.stack(pieces, dim=1)
    _assert_close(got, want)


@pytest.mark.parametrize("key", ["himix and hmgen", "pyramid by score"])
def test_a_sequence_does_not_depend_on_its_neighbours(key: str) -> None:
    policy = Policy.model_validate(POLICIES[key])
    model, documents = _model("qwen3", policy), _documents("interleave with text")
    together = _decoded(model, policy, documents)
    for among, document in zip(together, documents, strict=True):
        _assert_close(_decoded(model, policy, [document])[0], among)


def test_prompts_of_unlike_shape_do_not_decode_together() -> None:
    documents = [_documents(name)[0] for name in ("understand", "generate")]
    with pytest.raises(AssertionError, match="one length"):
        Decoder(_model("llama", Policy()), Policy(), documents)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_one_query_over_cached_keys_is_a_softmax_over_them(
    num_kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((3, 4, 8), *[(3, 9, num_kv_heads, 8)] * 2))
    got = cached_attention(q, k, v)
    assert torch.equal(got, cached_attention(q.float(), k.float(), v.float()).to(dtype)), "a CPU computes in fp32"
    k, v = (x.double().repeat_interleave(4 // num_kv_heads, dim=2) for x in (k, v))
    weights = (torch.einsum("bnh,bsnh->bns", q.double(), k) / 8**0.5).softmax(-1)
    want = torch.einsum("bns,bsnh->bnh", weights, v)
    assert (got.double() - want).norm() / want.norm() < tolerance
