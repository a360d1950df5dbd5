"""Claim: a loader worker's memory stays flat, within 5%, over a million documents.

One real worker process reads small documents again and again, in packs, as training would; its private memory (USS:
pages that no other process shares) is sampled on the way. The first 50,000 are warm-up: open files, orders, allocator.

    python benchmarks/memory.py [--documents 1000000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch.multiprocessing
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.loader import Loader
from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Source
from data_pipeline.text_tokenizer import train_text_tokenizer
from data_pipeline.vocab import Vocab

NUM_SAMPLES = 20
WARM_UP = 50_000  # documents
CORPUS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000, help=f"documents to read, more than {WARM_UP:,}")
    num_documents = parser.parse_args().documents
    if num_documents <= WARM_UP:
        parser.error(f"--documents={num_documents} must be more than {WARM_UP}")
    with tempfile.TemporaryDirectory(prefix="uvlm-memory-") as folder:
        samples, seconds = measure(Path(folder), num_documents)
    table = Table("documents", "private memory of the worker, MB", title="a loader worker over time")
    for count, size in samples:
        table.add_row(f"{count:,}", f"{size / 1e6:.1f}")
    Console().print(table)
    warm = [size for count, size in samples if count >= WARM_UP]
    growth = max(warm) / warm[0] - 1
    result = {"documents": samples[-1][0], "seconds": round(seconds, 1), "growth": round(growth, 4)}
    print(json.dumps({**result, "flat": growth <= 0.05, "megabytes": round(warm[-1] / 1e6, 1)}))


def measure(folder: Path, num_documents: int) -> tuple[list[tuple[int, int]], float]:
    """(documents consumed, bytes) at equal distances, and the seconds it took."""
    vocab = write_corpus(folder)
    loader = Loader([Source("small", folder / "shards")], vocab, pack_tokens=1024, num_rows=1, num_workers=1)
    started = time.perf_counter()
    samples, count, steps = [], 0, iter(loader)
    for index in track(range(1, NUM_SAMPLES + 1), "reading", transient=True):
        while count < index * num_documents // NUM_SAMPLES:
            packs, _ = next(steps)
            count += sum(bool(name) for name in packs[0].doc_id)
        (worker,) = torch.multiprocessing.active_children()
        samples.append((count, psutil.Process(worker.pid).memory_full_info().uss))
    return samples, time.perf_counter() - started


def write_corpus(folder: Path) -> Vocab:
    """Captions with one image of 4x4 codes: small documents, so that a million pass quickly."""
    from tokenizers import Tokenizer

    random = np.random.default_rng(0)
    texts = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "star")]
    train_text_tokenizer(texts, folder / "tokenizer.json")
    with ShardWriter(folder / "shards", image_tokenizer="benchmark") as writer:
        for number in range(CORPUS):
            codes = {"0.npy": random.integers(0, 256, (4, 4)).astype(np.uint16)}
            text = texts[number % len(texts)]
            slots = (text, None), (None, "0.png"), "generate", (False, True)
            writer.write(Document(f"{number:09d}", *slots, "made", {}, {}, codes))
    return Vocab(Tokenizer.from_file(str(folder / "tokenizer.json")), 256, "benchmark")


if __name__ == "__main__":
    main()
