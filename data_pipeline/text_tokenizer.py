"""Trains the text half of a tokenizer folder: a byte-level BPE whose last ids are the specials of `vocab.py`.

Byte-level, so every string has ids and comes back unchanged; a word is a token together with the space before it, so an
answer such as " yes" costs one token. Cost (run): 0.4 s for 7,159 documents of easy-vqa, which need 350 ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.files import replace_file
from data_pipeline.vocab import SPECIALS

MIN_VOCABULARY = 256 + len(SPECIALS)  # every byte, and the specials


def train_text_tokenizer(texts: Iterable[str], path: Path, *, vocabulary: int = 512) -> int:
    """Writes `path` (tokenizer.json) and returns how many ids it has, specials included: at most `vocabulary`.

    Fewer where the texts do not offer that many merges. The same texts give the same file. ValueError where
    `vocabulary` has no room for bytes and specials.
    """
    if vocabulary < MIN_VOCABULARY:
        raise ValueError(f"text vocabulary {vocabulary} is too small; bytes and specials need {MIN_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIALS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, tokenizer.to_str(pretty=True))
    return tokenizer.get_vocab_size(with_added_tokens=True)
