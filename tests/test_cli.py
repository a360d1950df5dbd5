"""The command line: what the user can mend is one sentence and an exit code, never a stack trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import uvlm, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _refused(*arguments: str, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "uvlm", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_an_unknown_config_key_names_the_nearest(config: Path) -> None:
    assert "nearest known one is 'optim.steps'" in _refused("train", str(config), "optim.step=3")


def test_missing_shards_are_named(config: Path) -> None:
    sentence = _refused("launch", str(config), "--nproc=2", "data.train=[{path: /nowhere/shards}]")
    assert "/nowhere/shards" in sentence


def test_codes_of_another_tokenizer_are_refused(config: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path, seed=1)
    sentence = _refused("train", str(config), f"data.tokenizer={other.parent / 'tokenizer'}")
    assert "uvlm data tokenize" in sentence


def test_a_missing_compiler_is_named_with_the_remedy(config: Path) -> None:
    assert "apt-get install g++" in _refused("train", str(config), environment={"CXX": "no-such-compiler"})
    assert "apt-get install g++" in _refused("demo", "--out", "unused", environment={"CXX": "no-such-compiler"})


def test_ranks_that_do_not_divide_the_rows_are_refused_with_numbers_that_work(config: Path) -> None:
    sentence = _refused("launch", str(config), "--nproc=3")
    assert "data.num_rows=4 does not divide over 3 ranks; start 1 or 2 or 4 ranks, or set data.num_rows=6" in sentence


def test_workers_that_do_not_divide_and_documents_beyond_the_model_are_refused(config: Path) -> None:
    assert "set data.num_workers=4, or 0" in _refused("train", str(config), "data.num_workers=3")
    assert "set model.max_position=8192" in _refused("train", str(config), "data.pack_tokens=8192")


def test_too_little_disk_is_refused_before_anything_is_written(config: Path, tmp_path: Path) -> None:
    # A model of a trillion weights needs more disk than any machine that runs this test.
    sentence = _refused("train", str(config), f"run={tmp_path / 'run'}", "model.intermediate_size=5000000000")
    assert "MB free; free some space" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["ask", "nowhere", "x.png", "what?"], "there is no image x.png"),
        (["generate", "nowhere", "a red thing", "--out", "x.png"], "is no run folder"),
        (["eval", "nowhere", "--shards", "s"], "is no run folder"),
        (["data", "convert", "vqaa", "s", "o"], "did you mean 'vqa'"),
        (["data", "convert", "vqa", "s", "o"], "s is missing"),
        (["data", "tokenize", "nowhere", "o", "--tokenizer", "t"], "nowhere"),
        (["tokenizer", "train", "nowhere", "o"], "nowhere"),
    ],
)
def test_a_folder_or_file_that_is_not_there_is_named(tmp_path: Path, command: list[str], sentence: str) -> None:
    assert sentence in _refused(*command)


def test_help_names_every_command_and_needs_neither_torch_nor_deepspeed() -> None:
    commands = {
        (): ["demo", "train", "launch", "eval", "ask", "generate", "data", "tokenizer"],
        ("data",): ["convert", "tokenize"],
        ("tokenizer",): ["train"],
    }
    for group, names in commands.items():
        listed = uvlm(*group, "--help").stdout
        for name in names:
            assert name in listed
            assert uvlm(*group, name, "--help").returncode == 0
    program = "import sys, uvlm.cli; print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
