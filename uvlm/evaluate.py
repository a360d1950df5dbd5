"""Measure a trained model: exact-match answers on held-out documents.

A document's answer counts as right if the most likely token is the true one at every supervised position, its end
included. Given the same prompt, greedy decoding then produces exactly that answer, so one packed forward pass over all
documents measures what token-by-token decoding would, at about 50 times its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipeline.encode import Encoded, encode
from data_pipeline.packing import BestFit, Pack, make_pack
from data_pipeline.schema import Document
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab
from uvlm.metrics import update_summary
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.run_folder import load_model, read_config
from uvlm.token_plan import TokenPlan


def evaluate(run: Path, shards: Path, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Answer accuracy of a run's trained model on a folder of tokenized shards; it also goes to RUN/metrics.json.

    Args:
        progress: called with (what, documents done, documents in all).

    Raises:
        ValueError: no trained model, or shards that another tokenizer made; it says what to do.
    """
    config = read_config(run)
    vocab = Vocab.load(config.data.tokenizer)
    split = Split.open(shards, image_tokenizer=vocab.image_tokenizer, images=False)
    model = load_model(run, vocab)
    num_right, num_asked, num_read = 0, 0, 0
    for pack in _packs(split, vocab, config.data.pack_tokens):
        right = documents_right(model, pack, config.policy.at_inference())
        num_right += sum(right)
        num_asked += len(right)
        num_read += sum(1 for name in pack.doc_id if name)
        if progress:
            progress("answering", num_read, len(split))
    if not num_asked:
        raise ValueError(f"{shards} holds no document with supervised text; give a split of the understand task")
    num_unreadable = len(split) - num_read  # not answered, so wrong
    num_asked += num_unreadable
    result = {
        "vqa_accuracy": num_right / num_asked,
        "vqa_questions": num_asked,
        "vqa_unreadable": num_unreadable,
        "vqa_shards": str(split.folder),
    }
    update_summary(run, result)
    return result


@torch.inference_mode()
def documents_right(model: UnifiedVLM, pack: Pack, policy: Policy) -> list[bool]:
    """For each document of the pack that has supervised tokens: whether all of them are the model's first choice."""
    device = next(model.parameters()).device
    plan = TokenPlan.of(pack, policy, model.num_layers, progress=1.0)
    hidden_SD = model.hidden(pack.to(device), plan.to(device))
    first_choice_S = torch.cat([model.backbone.lm_head(part).argmax(dim=-1) for part in hidden_SD.split(512)]).cpu()
    is_wrong_S = (first_choice_S != pack.labels[plan.supervised]).float()
    document_S = torch.arange(len(pack.doc_task)).repeat_interleave(pack.cu_seqlens.diff())[plan.supervised]
    num_wrong = torch.zeros(len(pack.doc_task)).index_add(0, document_S, is_wrong_S)
    present = torch.unique(document_S)
    return (num_wrong[present] == 0).tolist()


def _packs(split: Split, vocab: Vocab, pack_tokens: int) -> Iterator[Pack]:
    """All documents of a split, in packs; those that do not encode or do not fit are left out."""
    for number, members in enumerate(_bins(split, vocab, pack_tokens)):
        yield make_pack(members, pack_tokens, vocab.pad, (0, number))


def _bins(split: Split, vocab: Vocab, pack_tokens: int) -> Iterator[list[Encoded]]:
    packer = BestFit[Encoded](pack_tokens)
    for index in range(len(split)):
        document = split.read(index)
        encoded = encode(document, vocab) if isinstance(document, Document) else document
        if isinstance(encoded, Encoded) and len(encoded) <= pack_tokens and (full := packer.add(encoded)):
            yield full
    yield from packer.bins
