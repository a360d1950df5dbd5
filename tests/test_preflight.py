"""Before a job spends time, whoever is out of line is named: node, rank or link, and what to do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import data_pipeline
import uvlm
from tests.corpus import write_corpus
from tests.preflight_worker import NUM_RANKS
from uvlm.backbone import DTYPES
from uvlm.preflight import failing_as, multiply
from uvlm.preflight_judge import (
    Facts,
    Measured,
    Stage,
    judge,
    judge_measured,
    late,
    links_of,
    named,
    rounds,
    summary,
)

NODES = ["n1"] * 8 + ["n2"] * 8
SECOND = range(8, 16)
MEGABYTE = 1 << 20


def facts(**changes: dict[int, Any]) -> list[Facts]:
    """Of 16 ranks on 2 nodes that agree in all, but for `changes`: by name of the field, its value by rank."""
    versions = {"python": "3.11.2", "torch": "2.13.0", "GPU": "H100"}
    seen = {"data /shards": "d1", "tokenizer /tokenizer": "t1"}
    equal = [
        Facts(rank, node, [], seen, "c1", "/code", versions, 0.002, "/tmp", 10**10, 10**11)
        for rank, node in enumerate(NODES)
    ]
    return [
        dataclasses.replace(one, **{name: values[one.rank] for name, values in changes.items() if one.rank in values})
        for one in equal
    ]


def measured(
    nodes: list[str] = NODES,
    slow: Collection[tuple[int, int]] = (),
    wrong: Collection[tuple[int, int]] = (),
    **changes: dict[int, Any],
) -> list[Measured]:
    """Of ranks whose links inside a node take 1 ms, between nodes 8 ms and, of `slow` pairs (a < b), ten times that."""
    exchanges: dict[int, list[tuple[int, float, bool]]] = {rank: [] for rank in range(len(nodes))}
    for a, b in itertools.chain(*rounds(nodes)):
        seconds = (1e-3 if nodes[a] == nodes[b] else 8e-3) * (10 if (a, b) in slow else 1)
        exchanges[a].append((b, seconds, (a, b) not in wrong))
        exchanges[b].append((a, seconds / 2, True))  # the slower side counts
    equal = [Measured(rank, 0, 0.01, exchanges[rank], True) for rank in range(len(nodes))]
    return [
        dataclasses.replace(one, **{name: values[one.rank] for name, values in changes.items() if one.rank in values})
        for one in equal
    ]


def pairs(nodes: list[str] = NODES) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in itertools.chain(*rounds(nodes))}


def of_rank(rank: int, nodes: list[str] = NODES) -> set[tuple[int, int]]:
    return {pair for pair in pairs(nodes) if rank in pair}


def test_ranks_that_agree_give_no_sentence() -> None:
    assert judge(facts()) == ([], [])
    assert judge_measured(measured(), NODES, MEGABYTE) == ([], [])


def test_a_node_that_lacks_data_is_one_sentence() -> None:
    trouble = {rank: ["cannot read data /shards (missing); mount it"] for rank in SECOND}
    seen = {rank: {"tokenizer /tokenizer": "t1"} for rank in SECOND}
    assert judge(facts(troubles=trouble, seen=seen)) == (
        ["ranks 8-15 on n2 cannot read data /shards (missing); mount it"],
        [],
    )


def test_what_differs_from_the_majority_is_named() -> None:
    other = {"data /shards": "d2", "tokenizer /tokenizer": "t1"}
    (error,), warnings = judge(facts(seen={9: other, 11: other}))
    assert error.startswith("ranks 9, 11 on n2 cannot see the same data /shards as ranks 0-7 on n1 and ranks 8, 10, 12")
    (error,), _ = judge(facts(code={0: "c2"}, code_folder={0: "/old"}))
    assert error.startswith(
        "rank 0 on n1 would run other code (/old) than ranks 1-7 on n1 and ranks 8-15 on n2 (/code)"
    )
    assert not warnings


def test_versions_must_be_equal_and_gpus_should_be() -> None:
    old = {"python": "3.11.2", "torch": "2.6.0", "GPU": "A100"}
    (error,), (warning,) = judge(facts(versions=dict.fromkeys(SECOND, old)))
    assert error.startswith("ranks 8-15 on n2 would run with torch 2.6.0, ranks 0-7 on n1 with torch 2.13.0; activate")
    assert warning == "ranks 8-15 on n2 would use A100, ranks 0-7 on n1 H100"


def test_a_full_local_disk_is_an_error_and_so_is_small_shared_memory() -> None:
    (error,), _ = judge(facts(kernel_bytes=dict.fromkeys(SECOND, 12_000_000)))
    assert error.startswith("ranks 8-15 on n2 cannot compile kernels with 12 MB free in /tmp, 512 MB are needed")
    assert judge(facts(kernel_bytes={3: 0}))[0]
    (error,), _ = judge(facts(shared_bytes=dict.fromkeys(SECOND, 64 * MEGABYTE)))  # what docker gives
    assert error.startswith("ranks 8-15 on n2 cannot pass data with 67 MB free in /dev/shm, 560 MB are needed")
    assert judge(facts(shared_bytes={3: 0}))[0], "full is not absent"
    assert not judge(facts(shared_bytes={3: None}))[0]


def test_clocks_apart_by_more_than_a_second_are_a_warning() -> None:
    errors, (warning,) = judge(facts(clock=dict.fromkeys(SECOND, -3.0)))
    assert warning.startswith("the clock of ranks 8-15 on n2 is 3.0 s behind")
    assert not errors
    assert judge(facts(clock=dict.fromkeys(SECOND, 0.9))) == ([], [])


def test_a_rank_that_calculates_wrongly_is_an_error_and_a_slow_one_a_warning() -> None:
    (error,), warnings = judge_measured(measured(num_wrong={5: 12}), NODES, MEGABYTE)
    assert error.startswith("rank 5 on n1 calculates wrongly (12 wrong elements")
    assert not warnings
    errors, (warning,) = judge_measured(measured(product_seconds={9: 0.04}), NODES, MEGABYTE)
    assert warning.startswith("rank 9 on n2 multiplied matrices 4.0 times slower")
    assert not errors


@pytest.mark.parametrize(
    ("slow", "subject"),
    [
        (
            {(2, 3)},
            "the link of rank 2 on n1 and rank 3 on n1: 10.0 times slower than the median, 105 MB/s instead of 1",
        ),
        ({(3, 11)}, "the link of rank 3 on n1 and rank 11 on n2: 10.0"),
        (of_rank(5), "all links of rank 5 on n1: 10.0"),
    ],
)
def test_a_slow_link_is_named_or_the_rank_whose_links_are_all_slow(slow: set[tuple[int, int]], subject: str) -> None:
    errors, (warning,) = judge_measured(measured(slow=slow), NODES, MEGABYTE)
    assert warning.startswith(subject)
    assert not errors


def test_a_node_whose_links_are_all_slow_is_named_and_a_slow_network_card_too() -> None:
    nodes = [f"n{number}" for number in range(8) for _ in range(4)]
    node = {pair for pair in pairs(nodes) if (nodes[pair[0]] == "n3") != (nodes[pair[1]] == "n3")}
    _, (warning,) = judge_measured(measured(nodes, node), nodes, MEGABYTE)
    assert warning.startswith("all links of n3 to other nodes: 10.0 times slower")
    card = {pair for pair in of_rank(13, nodes) if nodes[pair[0]] != nodes[pair[1]]}
    _, (warning,) = judge_measured(measured(nodes, card), nodes, MEGABYTE)
    assert warning.startswith("all links of rank 13 on n3 to other nodes: 10.0 times slower")


def test_two_links_of_a_class_are_not_compared() -> None:
    nodes = ["n1", "n1", "n2", "n2"]
    assert judge_measured(measured(nodes, {(0, 1)}), nodes, MEGABYTE) == ([], [])


def test_changed_bytes_are_an_error_that_names_link_rank_or_network() -> None:
    (error,), _ = judge_measured(measured(wrong={(7, 8)}), NODES, MEGABYTE)
    assert error.startswith("the link of rank 7 on n1 and rank 8 on n2: bytes came out changed")
    (error,), _ = judge_measured(measured(wrong=of_rank(12)), NODES, MEGABYTE)
    assert error.startswith("all links of rank 12 on n2: bytes")
    between = {(a, b) for a, b in pairs() if NODES[a] != NODES[b]}
    (error,), _ = judge_measured(measured(wrong=between), NODES, MEGABYTE)
    assert error.startswith("all links between nodes: bytes")
    (error,), _ = judge_measured(measured(sum_is_right={4: False}), NODES, MEGABYTE)
    assert error.startswith("rank 4 on n1 got a wrong sum")


@pytest.mark.parametrize("nodes", [["n"], ["n"] * 2, ["n"] * 7, NODES, list("aabbbccc"), list("abab"), list("aabbcc")])
def test_in_each_round_a_rank_has_one_partner_and_over_all_both_neighbours(nodes: list[str]) -> None:
    for of_round in rounds(nodes):
        ranks = list(itertools.chain(*of_round))
        assert len(set(ranks)) == len(ranks)
    size = len(nodes)
    assert {(min(r, (r + 1) % size), max(r, (r + 1) % size)) for r in range(size) if size > 1} <= pairs(nodes)
    assert len(rounds(nodes)) <= 6


def test_every_local_rank_also_exchanges_with_its_like_on_the_next_node() -> None:
    assert {(rank, rank + 8) for rank in range(8)} <= pairs()
    assert len(list(itertools.chain(*rounds(NODES)))) == 16 + 8
    assert pairs(list("abab")) == {(0, 1), (1, 2), (2, 3), (0, 3)}, "nodes whose ranks are not in a row have no rails"


def test_who_holds_up_the_others_is_named() -> None:
    stages = {rank: Stage(4, "exchanging", node, rank ^ 1) for rank, node in enumerate(NODES)}
    assert late({rank: stages[rank] for rank in stages if rank != 3}, 16) == "rank 3 has not come"
    stages |= {rank: Stage(3, "exchanging", NODES[rank], partner) for rank, partner in ((7, 8), (8, 7))}
    assert late(stages, 16) == "rank 7 on n1 and rank 8 on n2 have not finished exchanging with each other"
    stages[5] = Stage(1, "reading data", "n1")
    assert late(stages, 16) == "rank 5 on n1 has not finished reading data"


def test_the_summary_tells_the_slowest_links() -> None:
    text = summary(facts(), measured(slow={(7, 8), (1, 2)}), 80 * 10**6, 4.06)
    assert text == (
        "preflight: 16 ranks on 2 nodes agree on code, versions, data and run folder; clocks within 1 ms; slowest link "
        "inside a node 8 GB/s (rank 1 on n1 - rank 2 on n1); slowest link between nodes 1 GB/s (rank 7 on n1 - rank 8 "
        "on n2); 4.1 s"
    )
    assert len(links_of(measured())) == 24


def test_of_many_nodes_a_sentence_lists_a_few() -> None:
    nodes = [f"n{rank // 2}" for rank in range(16)]
    assert named([0, 1, 3], nodes) == "ranks 0-1 on n0 and rank 3 on n1"
    assert named(range(16), nodes).endswith("ranks 6-7 on n3 and those on 4 more nodes")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_products_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    num_wrong, seconds = multiply(dtype, torch.device("cpu"))
    assert num_wrong == 0
    assert seconds > 0


def test_a_link_that_fails_is_named() -> None:
    with (
        pytest.raises(ValueError, match=r"rank 1 cannot exchange with rank 2 \(Connection closed"),
        failing_as("rank 1 cannot exchange with rank 2"),
    ):
        raise RuntimeError("Connection closed by peer")


Said = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def said(folder: Path) -> tuple[Said, list[str]]:
    """What four ranks on two pretended nodes printed and were refused with, by rank and case; what each wrote to
    standard error in the last case, which none of them survives."""
    config = write_corpus(folder)
    (folder / "run").mkdir()
    (folder / "local").mkdir()
    shutil.copytree(folder / "understand", folder / "other")
    with (folder / "other" / "manifest.json").open("a") as manifest:
        manifest.write("\n")
    for package in (uvlm, data_pipeline):
        shutil.copytree(package.__path__[0], folder / "code" / package.__name__)
    with (folder / "code" / "uvlm" / "train.py").open("a") as code:
        code.write("# another version\n")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    processes = []
    for rank in range(NUM_RANKS):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": f"n{1 + rank // 2}"}
        command = [
            sys.executable,
            "-m",
            "tests.preflight_worker",
            str(rank),
            str(server.port),
            str(config),
            str(folder),
        ]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1] * NUM_RANKS, "\n".join(errors)
    assert not list((folder / "run").glob(".preflight_*")), "tokens are removed"
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(NUM_RANKS)], errors


@pytest.mark.slow
def test_ranks_that_agree_go_on_and_rank_0_prints_a_summary(said: tuple[Said, list[str]]) -> None:
    (zero, *others), _ = said
    assert zero["well"]["refused"] is None
    assert zero["well"]["printed"].startswith(
        "preflight: 4 ranks on 2 nodes agree on code, versions, data and run folder; clocks within"
    )
    assert zero["well"]["printed"].count("\n") == 1
    assert [(rank["well"]["printed"], rank["well"]["refused"]) for rank in others] == [("", None)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "warning"),
    [
        ("slow link", "preflight: the link of rank 1 on n1 and rank 2 on n2: "),
        ("slow rank", "preflight: all links of rank 1 on n1 to other nodes: "),
        ("clock", "preflight: the clock of ranks 2-3 on n2 is 3.0 s ahead; "),
    ],
)
def test_what_is_slow_is_named_and_training_goes_on(
    said: tuple[Said, list[str]], folder: Path, case: str, warning: str
) -> None:
    ranks, _ = said
    assert [rank[case]["refused"] for rank in ranks] == [None] * NUM_RANKS
    first, second = ranks[0][case]["printed"].splitlines()
    assert first.startswith(warning)
    assert second.startswith("preflight: 4 ranks on 2 nodes agree")
    assert first in [json.loads(line)["event"] for line in (folder / "run" / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("flipped byte", "preflight: all links of rank 2 on n2: bytes came out changed"),
        ("wrong product", "preflight: rank 3 on n2 calculates wrongly (6 wrong elements"),
        ("wrong sum", "preflight: ranks 0-1 on n1 and ranks 2-3 on n2 got a wrong sum over all ranks"),
        (
            "other data",
            "preflight: rank 3 on n2 cannot see the same data FOLDER/generate, data FOLDER/understand as ranks 0-1 on",
        ),
        (
            "no data",
            "preflight: ranks 2-3 on n2 cannot read data FOLDER/generate (FOLDER/nowhere/manifest.json is missi",
        ),
        ("other code", "preflight: ranks 2-3 on n2 would run other code (FOLDER/code) than ranks 0-1 on n1 ("),
        ("other run folder", "cannot see the run folder FOLDER/local as rank 0 sees it; "),
    ],
)
def test_what_is_wrong_is_named_and_ends_all_ranks(
    said: tuple[Said, list[str]], folder: Path, case: str, error: str
) -> None:
    (zero, *others), _ = said
    refused = zero[case]["refused"]
    assert error.replace("FOLDER", str(folder)) in refused
    assert [rank[case]["refused"] for rank in others] == [f"rank 0: {refused}"] * 3
    assert not zero[case]["printed"]


@pytest.mark.slow
def test_ranks_that_do_not_come_to_an_end_are_named_at_the_deadline(said: tuple[Said, list[str]]) -> None:
    _, errors = said
    assert (
        "error: preflight: after 8 s, rank 1 on n1 and rank 2 on n2 have not finished exchanging with each other; "
    ) in errors[0]


@pytest.mark.slow
def test_a_training_with_preflight_prints_its_summary_first(tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "uvlm.torchrun", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "uvlm", "train", str(config), "--preflight", "optim.steps=2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("preflight: rank")]
    assert lines[0].startswith("preflight: 2 ranks on 1 node agree on code, versions, data and run folder; ")
    assert "parameters" in lines[1]
    assert (tmp_path / "run" / "model").is_dir()
