"""`uvlm check`: findings first, every value with its owner, exit code 1 on an error alone, and the same as JSON."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.broken_configs import BROKEN, Broken
from tests.one_rank import save
from uvlm import check_report
from uvlm.check_report import choose_place, examine, show
from uvlm.cli_plan import app
from uvlm.config import load_config


@pytest.fixture
def run(tmp_path: Path) -> str:
    return f"run={tmp_path / 'run'}"


def asked(config: Path, *words: str) -> dict[str, Any]:
    return examine(config, words, None, None, None)


def printed(report: dict[str, Any]) -> str:
    console = Console(width=120, file=io.StringIO())
    show(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def mine(folder: Path, text: str) -> str:
    (folder / "mine.json").write_text(text)
    return f"deepspeed={folder / 'mine.json'}"


def test_exit_code_1_is_for_errors_and_0_for_warnings(config: Path, run: str, tmp_path: Path) -> None:
    def code(zero: str) -> int:
        words = ["check", str(config), run, mine(tmp_path, f'{{"zero_optimization": {zero}}}')]
        return CliRunner().invoke(app, words).exit_code

    assert code('{"stage": 3}') == 0
    assert code('{"stage": 3, "round_robin_gradients": true}') == 0
    assert code('{"stage": 3, "reduce_bucket_size": 0}') == 1


def test_json_is_one_object_with_what_the_table_says(config: Path, run: str) -> None:
    result = CliRunner().invoke(app, ["check", str(config), run, "--json"])
    assert result.exit_code == 0
    told, again = json.loads(result.stdout), asked(config, run)
    told["disk"]["free"] = again["disk"]["free"]
    assert told == json.loads(check_report.as_json(again))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_every_broken_config_is_a_report_too(broken: Broken, config: Path, run: str, tmp_path: Path) -> None:
    text = printed(asked(config, run, mine(tmp_path, broken.text), *broken.overrides))
    assert "errors: " in text


@pytest.mark.parametrize(
    "text",
    [
        '{"gradient_clipping": "auto", "zero_optimization": {"stage": 3}}',
        '{"optimizer": {"params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}',
        '{"data.num_rows": 1, "zero_optimization": {"stage": 3}}',
        '{"zero_optimization.overlap_comm": true, "zero_optimization": {"stage": 3}}',
    ],
)
def test_what_people_bring_from_elsewhere_is_an_error(text: str, config: Path, run: str, tmp_path: Path) -> None:
    report = asked(config, run, mine(tmp_path, text))
    assert not report["ok"]
    assert "error" in printed(report)


@pytest.mark.parametrize(
    ("words", "key", "sentence"),
    [
        (["data.pack_tokens=3", "model.max_position=64"], "data.train", "cannot be read"),
        (["model.init_from=/nowhere"], "model.init_from", "no config.json"),
        (["run=/etc/hostname/x"], "run", "/etc/hostname is a file"),
        (["optim.betas=[2, 0]"], "config", "less than 1"),
        (["model.rope_theta=0"], "config", "greater than 0"),
    ],
)
def test_what_would_die_in_the_first_step_is_known(
    words: list[str], key: str, sentence: str, config: Path, run: str
) -> None:
    report = asked(config, run, *words)
    assert any(one["key"] == key and sentence in one["sentence"] for one in report["findings"]), report["findings"]
    assert not report["ok"]


def test_without_shapes_nothing_is_said_of_the_size_of_the_model(tmp_path: Path) -> None:
    report = examine(Path("1b"), [f"run={tmp_path / 'run'}"], 1, 8, 16)
    assert not any("0 parameters" in one["sentence"] for one in report["findings"])
    (memory,) = (one for one in report["findings"] if one["key"] == "memory")
    assert "set recompute=selective, recompute=full, take more ranks" in memory["sentence"]


def test_a_run_of_this_machine_is_held_against_its_memory(tmp_path: Path) -> None:
    report = examine(Path("7b"), [f"run={tmp_path / 'run'}"], None, None, None)
    assert any((one["level"], one["key"]) == ("warning", "memory") for one in report["findings"])


def test_a_check_leaves_no_trace_in_the_environment(config: Path, run: str) -> None:
    """A job that is submitted afterwards, for GPUs, inherits it."""
    code = (
        "import os, sys; from pathlib import Path; from uvlm.check_report import examine; before = dict(os.environ); "
        "examine(Path(sys.argv[1]), [sys.argv[2]], None, None, None); "
        "sys.exit(str({k: v for k, v in os.environ.items() if before.get(k) != v} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(config), run], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_every_value_has_its_default_and_its_owner(config: Path, run: str) -> None:
    report = asked(config, run, "deepspeed=zero3_offload.json")
    values = {row["key"]: {**row} for row in report["deepspeed"]["values"]}
    assert values["zero_optimization.reduce_bucket_size"] == {
        "key": "zero_optimization.reduce_bucket_size",
        "value": 64 * 64,
        "default": 500_000_000,
        "from": "JSON: auto, h²",
    }
    assert values["optimizer.params.lr"]["from"] == "YAML: optim.learning_rate"
    assert values["bf16.enabled"]["from"] == "YAML: dtype"
    assert [values["zero_optimization.stage"][name] for name in ("value", "default", "from")] == [3, 0, "JSON"]
    text = printed(report)
    assert "JSON: auto, 0.9 h²" in text
    assert "500,000,000" in text


def test_data_tokenizer_disk_and_memory_are_told(config: Path, run: str) -> None:
    report = asked(config, run)
    assert report["data"] == {"train: understand": 96, "train: generate": 96, "valid: understand": 96}
    assert report["vocabulary"]["fingerprint"] in printed(report)
    assert 0 < report["disk"]["needed"] < report["disk"]["free"]
    memory = report["memory"]["parts"]
    assert memory["total"] >= memory["parameters"] > 0


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_does_not_fit_is_told(config: Path, run: str, tmp_path: Path) -> None:
    assert asked(config, run)["checkpoints"] == {"run": str(tmp_path / "run"), "complete": [], "fit": True}
    save(load_config(Path("demo"), [run, "checkpoint.every=1"]), 1)
    report = asked(config, run)
    assert report["checkpoints"] == {"run": str(tmp_path / "run"), "complete": ["step_00000001"], "fit": False}
    assert not report["ok"]
    assert "newest step_00000001: does not fit" in printed(report)


def test_memory_beyond_the_gpu_is_an_error_and_close_to_it_a_warning(config: Path, run: str) -> None:
    needed = examine(config, [run], 1, 2, 1000.0)["memory"]["parts"]["total"] / 1e9

    def level(gigabytes: float) -> list[str]:
        found = examine(config, [run], 1, 2, gigabytes)["findings"]
        return [one["level"] for one in found if one["key"] == "memory"]

    assert level(needed * 0.99) == ["error"]
    assert level(needed * 1.05) == ["warning"]
    assert level(needed * 1.2) == []


def test_a_broken_yaml_hides_nothing_of_the_json(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    text = config.read_text().replace("num_rows: 4", "num_rows: -4")
    path.write_text(text + "\n" + mine(tmp_path, '{"typo": 1, "zero_optimization": {"stage": 7}}').replace("=", ": "))
    found = {one["key"] for one in asked(path)["findings"]}
    assert found == {"config", "typo", "zero_optimization.stage"}
    assert "errors: 3, warnings: 0" in printed(asked(path))


def test_all_missing_shards_are_told_and_without_a_tokenizer_too(config: Path, run: str) -> None:
    shards = "data.train=[{path: /nowhere/one}, {path: /nowhere/two}]"
    for words in ([], ["data.tokenizer=/nowhere/tokenizer"]):
        report = asked(config, run, shards, *words)
        text = " ".join(one["sentence"] for one in report["findings"])
        assert "/nowhere/one" in text
        assert "/nowhere/two" in text
        assert len(report["findings"]) == 2 + len(words)
        assert report["memory"]["assumed"]


def test_missing_data_hides_neither_values_nor_other_faults(config: Path, run: str) -> None:
    report = asked(config, run, "data.train=[{path: /nowhere}]", "policy.full_tail=0.001")
    assert {one["key"] for one in report["findings"]} == {"data.train", "policy.full_tail"}
    assert report["deepspeed"]["values"]
    assert report["memory"]


@pytest.mark.parametrize(
    ("num_rows", "told", "ranks", "words"),
    [
        (48, (4, 8, 80.0), 32, "32 ranks: 4 nodes of 8 GPUs"),
        (48, (2, None, None), 16, "16 ranks: 2 nodes of 8 GPUs"),
        (6, (None, None, 80.0), 6, "6 ranks: one node of 6 GPUs"),
    ],
)
def test_the_number_of_ranks_is_as_told_or_the_most_that_fit_and_is_said(
    num_rows: int, told: tuple[Any, ...], ranks: int, words: str
) -> None:
    place = choose_place(num_rows, *told)
    assert (place.num_ranks, place.words) == (ranks, words)


def test_without_a_place_this_machine_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    place = choose_place(4, None, None, None)
    assert place.num_ranks == 4
    assert place.on_gpus is None
    assert place.words.startswith("4 ranks: of this machine with 6 cores")


def test_findings_come_before_all_else_and_name_their_reference(config: Path, run: str, tmp_path: Path) -> None:
    text = '{"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}}'
    lines = printed(asked(config, run, mine(tmp_path, text))).splitlines()
    assert lines[0].startswith("error optimizer.type='OneBitAdam'")
    assert "issues/5046" in lines[1]
    assert lines[2].startswith("warning zero_optimization.stage3_max_live_parameters")
    assert lines[4].startswith("errors: 1, warnings: 1")
