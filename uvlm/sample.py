"""What a plan needs to know of a run's data: the size of its vocabulary, and packs as training would see them.

They are read from the data of the config. Where these are not there yet, or not here, they are assumed, and `notes`
says what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.encode import IMAGE, INSTRUCTION, OUTPUT, Encoded
from data_pipeline.loader import Loader
from data_pipeline.packing import Pack, make_pack
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from uvlm.config import Config

# Of most open models that read and draw: Qwen2's text vocabulary and a codebook of 16,384, images of 24 x 24 codes.
ASSUMED_VOCAB = 151_936 + 16_384
ASSUMED_IMAGE = (24, 24)
ASSUMED_TEXT = 100  # tokens of a document beside its image
_MAX_PACKS = 8


class Sample(NamedTuple):
    """packs: the first of some rows. notes: what was assumed, a sentence each."""

    vocab_size: int
    packs: Sequence[Pack]
    notes: tuple[str, ...]


def take_sample(config: Config, vocab_size: int | None = None) -> Sample:
    """Vocabulary and packs of a run; a second at most for shards on a local disk.

    Args:
        vocab_size: where no tokenizer can be read yet; else the tokenizer's own holds.
    """
    try:
        vocab = Vocab.load(config.data.tokenizer)
    except (OSError, ValueError) as error:
        vocab_size = vocab_size or ASSUMED_VOCAB
        note = (
            f"no tokenizer can be read ({error}): a vocabulary of {vocab_size:,}, and "
            f"documents of {ASSUMED_TEXT} text tokens and an image of {ASSUMED_IMAGE[0]} x {ASSUMED_IMAGE[1]} codes, "
            "read and drawn in equal number"
        )
        return Sample(vocab_size, [assumed_pack(config.data.pack_tokens)], (note,))
    num_rows = config.data.num_rows
    num_packs = next(n for n in range(min(_MAX_PACKS, num_rows), 0, -1) if num_rows % n == 0)
    try:
        loader = Loader(
            [source.source() for source in config.data.train],
            vocab,
            pack_tokens=config.data.pack_tokens,
            num_rows=num_rows,
            rank=0,
            world_size=num_rows // num_packs,
            seed=config.seed,
        )
        packs, _ = next(iter(loader))
    except (OSError, ValueError) as error:
        note = (
            f"the training data cannot be read ({error}): documents of {ASSUMED_TEXT} text tokens and an image of "
            f"{ASSUMED_IMAGE[0]} x {ASSUMED_IMAGE[1]} codes are assumed, read and drawn in equal number"
        )
        return Sample(vocab.size, [assumed_pack(config.data.pack_tokens)], (note,))
    return Sample(vocab.size, packs, ())


def assumed_pack(num_tokens: int) -> Pack:
    """Documents of one image each, which is input and target in turns, as many as fit."""
    num_codes = min(ASSUMED_IMAGE[0] * ASSUMED_IMAGE[1], num_tokens // 2)
    length = min(num_codes + ASSUMED_TEXT, num_tokens)
    documents = []
    for number in range(num_tokens // length):
        is_target = number % 2 == 1
        before = (length - num_codes) // 2
        documents.append(
            Encoded(
                ids=np.zeros(length, dtype=np.int64),
                slot_lengths=[before, num_codes, length - num_codes - before],
                slot_segments=[INSTRUCTION, IMAGE, OUTPUT],
                slot_losses=[False, is_target, not is_target],
                task=TASKS.index("generate" if is_target else "understand"),
                source="assumed",
                doc_id=f"assumed-{number}",
                image_starts=[before],
                image_shapes=[(1, num_codes)],
                image_targets=[is_target],
            )
        )
    return make_pack(documents, num_tokens, 0, (0, 0))
