"""The benchmarks run from the command line and end with the line that others read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"


def run(name: str, *arguments: str, timeout: float) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loader_benchmark_says_how_to_run_it() -> None:
    assert "--install-energon" in run("loader.py", "--help", timeout=60)


@pytest.mark.slow
def test_the_loader_benchmark_runs_and_ends_with_its_ratios(tmp_path: Path) -> None:
    output = run("loader.py", "--quick", f"--data={tmp_path}", timeout=900)
    assert "not installed" in output  # Energon was not asked for
    result = json.loads(output.splitlines()[-1])
    for name in ("ratio_webdataset_codes", "ratio_webdataset_jpeg", "ratio_s3_local", "resume_seconds"):
        assert result[name] > 0, name
    assert result["ratio_energon_codes"] is None
    assert result["ratio_energon_jpeg"] is None
    assert result["resume_exact"] is True
    assert set(result["resumes"]["ours"]["shapes"]) == {"1x0", "1x2", "2x1", "2x4", "4x1", "4x2"}
    assert result["resumes"]["webdataset 0-2"]["exact"] is False  # a skip is silently wrong with other workers


@pytest.mark.slow
def test_a_worker_holds_no_more_memory_after_a_hundred_thousand_documents() -> None:
    result = json.loads(run("memory.py", "--documents=100000", timeout=300).splitlines()[-1])
    assert result["documents"] >= 100_000
    assert result["flat"] is True
    assert abs(result["growth"]) <= 0.05


@pytest.mark.slow
def test_predicted_memory_is_what_ranks_take() -> None:
    result = json.loads(run("memory_plan.py", timeout=900).splitlines()[-1])
    assert len(result["cases"]) == 6
    assert result["worst_error"] <= 0.1
    for case in result["cases"]:
        assert case["predicted"]["total"] == pytest.approx(case["measured"]["total"], rel=0.11), case["case"]
        assert case["start"] < case["measured"]["total"], case["case"]


def test_the_token_roles_benchmark_refuses_a_policy_that_it_does_not_have() -> None:
    command = [sys.executable, str(BENCHMARKS / "token_roles.py"), "--policy=himx"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)
    assert result.returncode == 2
    assert "himix_hmgen" in result.stderr


@pytest.mark.slow
def test_the_token_roles_benchmark_runs_every_policy_and_ends_with_its_ratios() -> None:
    result = json.loads(run("token_roles.py", "--quick", "--rounds=1", timeout=900).splitlines()[-1])
    by_policy = ("efficiency", "time_ratio", "flop_ratio", "memory_ratio", "step_ratio")
    policies = set(result["flop_ratio"])
    assert {
        "himix_hmgen",
        "himix",
        "hmgen",
        "pyramid_random",
        "pyramid_score",
        "route",
        "freeze",
        "ffn_skip",
    } == policies
    for name in by_policy:
        assert set(result[name]) == policies, name
        assert all(math.isfinite(value) for value in result[name].values()), name
    assert all(0 < ratio < 1 for ratio in result["flop_ratio"].values())
    assert all(0 < ratio < 1 for ratio in result["memory_ratio"].values())
    assert 0 < result["dense_overhead"] < 1
    median, low, high = result["packed_to_plain"]
    assert 0 < low <= median <= high < math.inf
    assert result["dtype"] == "fp32"


@pytest.mark.slow
def test_the_token_roles_benchmark_trains_one_policy_in_bf16() -> None:
    output = run("token_roles.py", "--quick", "--rounds=1", "--dtype=bf16", "--policy=route", timeout=300)
    result = json.loads(output.splitlines()[-1])
    assert (result["dtype"], list(result["efficiency"])) == ("bf16", ["route"])


@pytest.mark.slow
def test_the_training_memory_benchmark_runs_every_way_to_start_and_ends_with_its_fits() -> None:
    result = json.loads(run("train_memory.py", "--quick", timeout=900).splitlines()[-1])
    ways = [(row["way"], row["num_ranks"], row["num_layers"]) for row in result["rows"]]
    sharded = [("in shards", ranks, layers) for ranks in (1, 2) for layers in (2, 4)]
    assert ways == [*sharded, ("in shards, shipped buffers", 2, 4), ("whole model first", 2, 4)]
    phases = {"build", "engine", "steps", "save", "model", "step while saving"}
    assert set(result["fits"]) == phases
    for row in result["rows"]:
        assert all(row[phase] > 2 * row["parameters"] / row["num_ranks"] for phase in phases), row
    assert all(math.isfinite(value) for fit in result["fits"].values() for value in fit.values())
    assert result["no_rank_holds_the_full_fp32_model"] is None, "tiny models cannot show it"


def test_the_guard_benchmark_runs_and_ends_with_its_share() -> None:
    result = json.loads(run("guard.py", "--quick", timeout=300).splitlines()[-1])
    assert 0 < result["share"] < 1
    assert all(math.isfinite(value) and value > 0 for value in result["time_ratio"])
