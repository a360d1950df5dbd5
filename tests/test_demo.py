"""The demo goes on from wherever it was stopped, and makes again what is damaged. Its corpus is what it says it is."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.image_tokens import image_tokenizer_fingerprint
from data_pipeline.schema import Document
from data_pipeline.split import Split
from uvlm.config import load_config
from uvlm.demo.easy_vqa import COLORS, SHAPES, pictures, write_sources
from uvlm.demo.stages import SPLITS, TOKENIZER_SPLITS, Demo, Shards, Sources
from uvlm.pictures import picture_grid


def test_captions_agree_with_every_answer_of_the_picture() -> None:
    for picture in [*pictures("train"), *pictures("test")]:
        for question, answer in picture.questions:
            words = question.rstrip("?").split()
            for names, told in ((SHAPES, picture.shape), (COLORS, picture.color)):
                if answer in names:
                    assert answer == told
                named = [name for name in names if name in words]
                if named and answer in ("yes", "no") and told:
                    denied = "not" in words or "no" in words
                    assert (named[0] == told) == ((answer == "yes") != denied), (question, answer, told)


def test_the_splits_hold_what_the_package_holds_and_no_test_picture_is_trained_on(tmp_path: Path) -> None:
    write_sources(tmp_path)
    seen: dict[str, set[bytes]] = {}
    questions: dict[str, int] = {}
    for split in SPLITS:
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        seen[split] = {line["image"] for line in lines}
        questions[split] = sum(len(line.get("questions", ())) for line in lines)
    assert questions["understand-train"] + questions["understand-valid"] == 38_575
    assert questions["understand-test"] == 9_673
    assert len(seen["understand-test"]) == 1_000
    for split in TOKENIZER_SPLITS:
        assert not seen[split] & seen["understand-test"]
        assert not seen[split] & seen["understand-valid"]


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    demo = Demo(tmp_path, load_config(Path("demo")), [])
    Sources().work(demo)
    Shards().work(demo)
    return demo


def test_a_shard_that_is_cut_or_changed_or_gone_is_made_again_with_the_same_bytes(demo: Demo) -> None:
    stage = Shards()
    assert stage.is_done(demo)
    shard = demo.data / "shards" / "generate-valid" / "shard-000000.tar"
    whole = shard.read_bytes()
    damages = [whole[: len(whole) // 2], whole[:5000] + b"x" + whole[5001:], None]
    for damage in damages:
        if damage is None:
            shard.unlink()
        else:
            shard.write_bytes(damage)
        assert not stage.is_done(demo)
        stage.work(demo)
        assert shard.read_bytes() == whole
        assert stage.is_done(demo)


def test_documents_keep_the_original_bytes_and_supervise_only_answers_and_drawn_images(demo: Demo) -> None:
    understand = Split.open(demo.data / "shards" / "understand-valid").read(0)
    generate = Split.open(demo.data / "shards" / "generate-valid").read(0)
    assert isinstance(understand, Document)
    assert isinstance(generate, Document)
    first = next(picture for picture in pictures("train") if picture.id % 20 == 0)
    assert understand.image_bytes["0.png"] == first.path.read_bytes()
    assert list(zip(understand.texts[1::2], understand.texts[2::2], strict=True)) == [
        (question, f" {answer}") for question, answer in first.questions
    ]
    assert understand.loss == (False, *[False, True] * len(first.questions))
    assert (generate.texts[0], generate.loss) == (first.caption, (False, True))


def test_a_grid_has_a_cell_for_each_picture() -> None:
    images = [np.full((64, 64, 3), value, np.uint8) for value in (10, 90, 200)]
    grid = picture_grid(images, ["a", "b", "c"], num_columns=2)
    assert {10, 90, 200} <= set(np.unique(grid))
    assert grid.shape[0] > 2 * 128
    assert grid.shape[1] > 2 * 128


# Where to stop the demo: with kill -9 as soon as its output matches.
STOPS = [
    r"\[2/7\]",
    r"image tokenizer: ",
    r"\[4/7\]",
    r"understand-train: 3,800 images",
    r"\[5/7\]",
    r"step 2/",
    r"step 8/",
    r"\[6/7\]",
    r"\[7/7\]",
]


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


@pytest.mark.slow
@pytest.mark.kill
def test_a_demo_that_is_killed_at_every_stage_ends_with_all_its_results(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "uvlm", "demo", "--out", str(tmp_path / "demo")]
    command += ["optim.steps=12", "checkpoint.every=4", "log_every=1", "validation.every=0"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    output = ""
    for stop in [*STOPS, None]:
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        output = ""
        for line in _lines(process):
            output += line
            if stop and re.search(stop, line) and not line.rstrip().endswith(("done before", " s")):
                process.send_signal(signal.SIGKILL)
                break
        assert process.stdout is not None
        process.stdout.close()
        code = process.wait(timeout=60)
        assert code == (0 if stop is None else -signal.SIGKILL), (stop, output)

    assert "[4/7] give every image its codes: done before" in output
    summary = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert set(summary) >= {
        "vqa_accuracy",
        "generation_accuracy",
        "judge_accuracy",
        "tokens_per_second",
        "first_loss",
        "log_vocab",
    }
    assert summary["vqa_questions"] == 9_673
    assert summary["generated_pictures"] == 96
    assert summary["judge_accuracy"] >= 0.99
    picture = Image.open(io.BytesIO((tmp_path / "demo" / "pictures.png").read_bytes()))
    assert picture.width > 1000
    steps = [json.loads(line)["step"] for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), "each step was recorded once"
    fingerprint = image_tokenizer_fingerprint(tmp_path / "demo" / "data" / "tokenizer" / "image")
    for split in SPLITS:
        Split.open(tmp_path / "demo" / "data" / "tokens" / split, image_tokenizer=fingerprint)
