"""A small tokenized corpus on disk, and trainings of it by real DeepSpeed ranks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import yaml

from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.vocab import Vocab
from tests.test_image_tokens import make_folder
from tests.test_schema import make_document
from tests.test_vocab import make_tokenizer
from uvlm.metrics import read_records

NUM_DOCUMENTS = 96


def write_corpus(folder: Path, seed: int = 0, samples_per_shard: int = 32) -> Path:
    """FOLDER/tokenizer, FOLDER/understand, FOLDER/generate and a config that trains a tiny model on them."""
    make_folder(folder / "tokenizer" / "image", seed)
    (folder / "tokenizer" / "text").mkdir()
    make_tokenizer().save(str(folder / "tokenizer" / "text" / "tokenizer.json"))
    vocab = Vocab.load(folder / "tokenizer")
    for task in ("understand", "generate"):
        with ShardWriter(folder / task, samples_per_shard, image_tokenizer=vocab.image_tokenizer) as writer:
            for document in _documents(task, vocab.num_codes):
                writer.write(document)
    config = {
        "run": str(folder / "run"),
        "model": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "tie_embeddings": False,
        },
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "train": [{"path": str(folder / "understand")}, {"path": str(folder / "generate"), "weight": 2.0}],
            "valid": [{"path": str(folder / "understand")}],
            "pack_tokens": 256,
            "num_rows": 4,
        },
        "policy": {"name": "route", "first_layer": 1, "last_layer": 1},
        "optim": {"steps": 20, "learning_rate": 1e-3, "warmup_steps": 5, "schedule": "constant"},
        "checkpoint": {"every": 10},
        "log_every": 1,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _documents(task: str, num_codes: int) -> Iterator[Document]:
    """The picture's first code decides the answer or follows from the caption, so that there is something to learn."""
    random = np.random.default_rng(0)
    for number in range(NUM_DOCUMENTS):
        codes = random.integers(0, num_codes, (4, 4)).astype(np.uint16)
        codes[0, 0] = number % 2
        color = ("red", "blue")[number % 2]
        if task == "understand":
            texts: tuple[str | None, ...] = (None, "what color is it?", f" {color}")
            yield make_document(f"u{number}", texts, loss=(False, False, True), codes={"0.npy": codes})
        else:
            yield make_document(f"g{number}", (f"a {color} thing", None), task="generate", codes={"1.npy": codes})


def uvlm(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "uvlm", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch(config: Path, num_ranks: int, *overrides: str) -> None:
    """Train on `num_ranks` real ranks; the test fails with their output where they fail."""
    result = uvlm("launch", str(config), f"--nproc={num_ranks}", *overrides)
    assert result.returncode == 0, result.stdout + result.stderr


def losses(run: Path) -> dict[int, float]:
    """The mean loss of each step that was recorded."""
    return {record["step"]: record["loss/mean"] for record in read_records(run) if "loss/mean" in record}


def rank_process(launcher: int, rank: int) -> psutil.Process | None:
    """The process of a rank below `launcher`, a process id; None where it has not started or has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank) and "uvlm" in child.cmdline():
                    return child
    return None
