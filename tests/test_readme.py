"""The README's commands, run as they stand there. The `make` commands are run by CI itself."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from uvlm.demo.easy_vqa import pictures

pytestmark = pytest.mark.slow

# Smaller numbers for the test, and where its files are; the commands themselves stay as the README has them.
SMALLER = {"optim.steps=100": "optim.steps=3", "runs/demo": "runs/mine", "--budget 10": "--budget 1"}
NOT_HERE = {
    "make": "run by CI itself",
    "pip": "needs a GPU machine",
    ".venv/bin/tensorboard": "a server; the event files are read in test_train",
}
ON_A_CLUSTER = ("submit", "status", "stop")  # test_slurm runs these


def _commands(repository: Path) -> list[str]:
    lines = (repository / "README.md").read_text().splitlines()
    indented = [line.strip().partition("  #")[0].strip() for line in lines if line.startswith("    ")]
    return [line for line in indented if re.match(r"(\.venv/bin/)?(uvlm|make|pip|tensorboard) ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user of the README has: two jsonl files and a config."""
    folder = tmp_path_factory.mktemp("user")
    known = [picture for picture in pictures("train") if picture.caption][:64]
    (folder / "images").mkdir()
    for p in known:
        shutil.copy(p.path, folder / "images" / p.path.name)
    questions = [{"image": f"images/{p.path.name}", "questions": p.questions} for p in known]
    captions = [{"image": f"images/{p.path.name}", "caption": p.caption} for p in known]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    tree = yaml.safe_load((Path(__file__).parent.parent / "uvlm" / "configs" / "demo.yaml").read_text())
    tree["run"] = "runs/mine"
    tree["data"].update(
        tokenizer="tokenizer", train=[{"path": "tokens/vqa"}, {"path": "tokens/pairs"}], valid=[{"path": "tokens/vqa"}]
    )
    (folder / "my.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_every_command_of_the_readme_runs(repository: Path, folder: Path) -> None:
    commands = _commands(repository)
    assert len(commands) >= 10
    ran = 0
    # The demo's commands stand first in the README; here its run is the one that the others train.
    for command in sorted(commands, key=lambda command: "runs/demo" in command):
        for name, smaller in SMALLER.items():
            command = command.replace(name, smaller)
        program, *arguments = shlex.split(command)
        if program in NOT_HERE or arguments[0] in ON_A_CLUSTER:
            continue
        assert program.endswith("uvlm"), command
        if arguments[:2] == ["tokenizer", "train"]:
            arguments.append("--steps=300")
        if any(argument.startswith("policy=") for argument in arguments):  # a second run, not the first one again
            arguments += ["run=runs/route", "optim.steps=3"]
        arguments = [str(pictures("test")[0].path) if argument == "IMAGE" else argument for argument in arguments]
        if not program.startswith(".venv"):
            assert shutil.which("uvlm"), "the console script is not installed"
        result = subprocess.run(
            [sys.executable, "-m", "uvlm", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        ran += 1
    assert ran >= 9
    assert (folder / "x.png").is_file()


def test_every_path_the_readme_names_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    named = re.findall(r"`((?:data_pipeline|uvlm|ds_configs|slurm|docs|tests)/[\w./]*)`", text)
    named += re.findall(r"^    ([\w/]+/) ", text, re.MULTILINE) + re.findall(r"\]\((docs/[\w.]+)\)", text)
    assert len(named) > 20
    assert [path for path in named if not (repository / path).exists()] == []
