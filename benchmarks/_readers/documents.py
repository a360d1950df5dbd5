"""The documents that every reader of `loader.py` reads, in canonical shards: made once, kept between runs.

    python documents.py FOLDER NUM_DOCUMENTS SAMPLES_PER_SHARD

A document is two captions of about 15 words and two images, each a JPEG of about 63 kB (512 x 512) with 16 x 16 codes.
The same documents lie in two folders: `images` holds everything, `codes` what `uvlm data tokenize --drop-images`
leaves, which is what a trainer reads. Drawing and compressing is the slow part of it, so a few hundred pictures are
used again and again: a decoder does the same work on each, and no reader remembers one.
Cost (run): 16 s and 1.3 GB for 10,000 documents.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.schema import Document
from data_pipeline.shards import MANIFEST_NAME, ShardWriter
from data_pipeline.text_tokenizer import train_text_tokenizer

NUM_CODES, CODES_SIDE = 16384, 16
FINGERPRINT = "benchmark"  # of the image tokenizer that would have made the codes
NUM_PICTURES, PICTURE_SIDE, PICTURE_BYTES = 200, 512, 63_000
NUM_WORDS, WORDS_IN_CAPTION = 4000, 15
TEXT_VOCAB_SIZE = 8000
TEXT_TOKENIZER = "tokenizer.json"
WITH_IMAGES, CODES_ONLY = "images", "codes"  # the two folders


def make_documents(folder: Path, num_documents: int, samples_per_shard: int = 1000) -> None:
    """FOLDER/images, FOLDER/codes and FOLDER/tokenizer.json; nothing is done where they are there already."""
    if (folder / CODES_ONLY / MANIFEST_NAME).is_file():  # it is written last
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    captions = list(_captions(random, 2 * num_documents))
    train_text_tokenizer(captions, folder / TEXT_TOKENIZER, vocabulary=TEXT_VOCAB_SIZE)
    pictures = [_picture(random) for _ in range(min(NUM_PICTURES, num_documents // 10))]
    with (
        ShardWriter(folder / WITH_IMAGES, samples_per_shard, image_tokenizer=FINGERPRINT) as images,
        ShardWriter(folder / CODES_ONLY, samples_per_shard, image_tokenizer=FINGERPRINT) as codes,
    ):
        for number in range(num_documents):
            pair = random.integers(0, NUM_CODES, (2, CODES_SIDE, CODES_SIDE)).astype(np.uint16)
            first, second = random.integers(0, len(pictures), 2)
            document = Document(
                key=f"{number:09d}",
                texts=(captions[2 * number], None, captions[2 * number + 1], None),
                images=(None, "1.jpg", None, "3.jpg"),
                task="interleave",
                loss=(False, True, True, True),
                source="benchmark",
                meta={},
                image_bytes={"1.jpg": pictures[first], "3.jpg": pictures[second]},
                codes={"1.npy": pair[0], "3.npy": pair[1]},
            )
            images.write(document)
            codes.write(replace(document, image_bytes={}))


def _captions(random: np.random.Generator, count: int) -> Iterator[str]:
    """Captions over made-up words, of which few are common and most are rare, as in a language."""
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(random.choice(syllables, random.integers(1, 5))) for _ in range(NUM_WORDS)]
    share = 1 / np.arange(1, NUM_WORDS + 1)
    for _ in range(count):
        chosen = random.choice(NUM_WORDS, WORDS_IN_CAPTION + random.integers(-3, 4), p=share / share.sum())
        yield " ".join(words[word] for word in chosen).capitalize() + "."


def _picture(random: np.random.Generator) -> bytes:
    """A JPEG close to PICTURE_BYTES: large soft shapes under fine noise, the amount of noise sets the size."""
    shapes = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    soft = np.asarray(shapes.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = random.standard_normal((PICTURE_SIDE, PICTURE_SIDE, 1), dtype=np.float32)
    low, high, content = 0.0, 64.0, b""
    for _ in range(7):
        middle = (low + high) / 2
        buffer = io.BytesIO()
        Image.fromarray((soft + middle * noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        content = buffer.getvalue()
        low, high = (middle, high) if len(content) < PICTURE_BYTES else (low, middle)
    return content


if __name__ == "__main__":
    make_documents(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
