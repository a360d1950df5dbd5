"""Several ranks share the work by shard, in any order and at any time, and make what one process makes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from data_pipeline.shards import Manifest
from data_pipeline.tokenize import TokenizeReport, tokenize
from data_pipeline.tokenize_ranks import _listen, ranks_of_slurm
from tests.test_tokenize import NUM_DOCUMENTS, SHARDS, contents, interrupt_at, run, shards, tokenizer, whole

__all__ = ["shards", "tokenizer", "whole"]  # fixtures


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2, 3), (3, 1, 2, 0)])
def test_ranks_in_any_order_make_what_one_process_makes(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes], order: tuple[int, ...]
) -> None:
    images = written = 0
    for position, rank in enumerate(order, 1):
        report = tokenize(shards, tmp_path, tokenizer, batch_size=3, min_psnr=0.0, rank=rank, num_ranks=len(order))
        images, written = images + report.images, written + report.shards_written
        last = written == 3
        assert (report.finished, report.shards_missing) == (last, 3 - written)
        assert (tmp_path / "manifest.json").exists() == last
        assert last == (position == len(order)) or len(order) > 3  # a rank without shards of its own may be last
    assert images == 2 * NUM_DOCUMENTS
    assert contents(tmp_path) == whole


def test_a_rank_that_runs_again_takes_no_manifest_away(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run(shards, tmp_path, tokenizer)

    def progress(stage: str, done: int, total: int) -> None:
        assert (tmp_path / "manifest.json").exists()

    for rank in (0, 1, 3):
        report = run(shards, tmp_path, tokenizer, rank=rank, num_ranks=4, progress=progress)
        assert (report["shards_written"], report["shards_missing"]) == (0, 0)
    assert contents(tmp_path) == whole


def test_a_rank_that_makes_a_shard_again_takes_the_manifest_away_first(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    run(shards, tmp_path, tokenizer)
    (tmp_path / SHARDS[1]).write_bytes(b"damaged")
    seen: list[bool] = []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((tmp_path / "manifest.json").exists())

    report = run(shards, tmp_path, tokenizer, rank=1, num_ranks=2, progress=progress)
    assert seen[0]
    assert not seen[1]
    assert report["shards_missing"] == 0
    assert contents(tmp_path) == whole


def test_a_manifest_does_not_outlive_a_shard_that_is_made_again_while_it_is_written(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import tokenize as module

    write_manifest = module.write_manifest

    def another_rank_begins(folder: Path, *rest: object) -> Manifest:
        (tmp_path / (SHARDS[2] + ".done.json")).unlink()  # then it finds no manifest to take away
        return write_manifest(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_manifest", another_rank_begins)
    assert run(shards, tmp_path, tokenizer)["shards_missing"] == 1
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.undo()
    assert run(shards, tmp_path, tokenizer, rank=2, num_ranks=3)["shards_missing"] == 0  # which ends like this
    assert contents(tmp_path) == whole


def test_two_processes_at_one_shard_do_not_mix_their_bytes(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if done == 6 and not (tmp_path / "manifest.json").exists():  # in the middle of the second shard
            run(shards, tmp_path, tokenizer)

    report = run(shards, tmp_path, tokenizer, progress=progress)
    assert report["shards_missing"] == 0
    assert contents(tmp_path) == whole


def test_what_a_killed_process_left_goes_after_a_day(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for name in (".making-old", ".making-new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SHARDS[0]).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / ".making-old" / SHARDS[0], (0, 0))
    run(shards, tmp_path, tokenizer)
    assert not (tmp_path / ".making-old").exists()
    assert (tmp_path / ".making-new" / SHARDS[0]).read_bytes() == b"half"  # somebody is at it, for more than a day


@pytest.mark.parametrize(("rank", "num_ranks"), [(2, 2), (-1, 2), (0, 0), (None, 0)])
def test_a_rank_that_does_not_exist_is_refused(
    shards: Path, tokenizer: Path, tmp_path: Path, rank: int | None, num_ranks: int
) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {num_ranks}"):
        run(shards, tmp_path, tokenizer, rank=rank, num_ranks=num_ranks)


def test_local_ranks_make_what_one_process_makes(
    shards: Path, tokenizer: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    seen: list[tuple[int, int]] = []
    report = run(shards, tmp_path, tokenizer, num_ranks=2, progress=lambda what, *done: seen.append(done))
    assert seen[-1] == (NUM_DOCUMENTS, NUM_DOCUMENTS)
    assert seen == sorted(seen)
    assert (report["documents"], report["images"]) == (NUM_DOCUMENTS, 2 * NUM_DOCUMENTS)
    assert (report["shards_written"], report["shards_missing"], report["rejected"]) == (3, 0, {})
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_an_interrupt_ends_all_local_ranks_and_leaves_no_half_made_file(
    shards: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path, tokenizer, num_ranks=2, progress=interrupt_at(0))
    assert not multiprocessing.active_children()
    assert not (tmp_path / "manifest.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".making")]


@pytest.mark.slow
def test_an_error_of_one_local_rank_is_the_error_of_all(shards: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^the image tokenizer .* with a PSNR of .* dB, below 60"):
        run(shards, tmp_path / "out", tokenizer, num_ranks=2, min_psnr=60.0)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_killed_is_an_error_that_says_so() -> None:
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    pipes[0][1].send(TokenizeReport())
    pipes[1][1].close()
    with pytest.raises(OSError, match="tokenize rank 1 of 2 was killed"):
        _listen({receiver: rank for rank, (receiver, _) in enumerate(pipes)}, 10, None)


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}


@pytest.mark.parametrize(
    ("environment", "rank", "num_ranks", "expected"),
    [
        ({}, None, None, (None, 1)),
        ({}, None, 3, (None, 3)),
        ({}, 2, 3, (2, 3)),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4"}, None, None, (2, 4)),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4"}, None, 4, (2, 4)),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "4"}, 0, 9, (0, 9)),
        ({"SLURM_ARRAY_TASK_ID": ""}, None, None, (None, 1)),
    ],
)
def test_a_task_of_a_slurm_array_is_a_rank(
    environment: dict[str, str], rank: int | None, num_ranks: int | None, expected: tuple[int | None, int]
) -> None:
    assert ranks_of_slurm(environment, rank, num_ranks) == expected


@pytest.mark.parametrize(
    ("count", "rank", "num_ranks", "message"),
    [
        ("4", None, 8, r"4 tasks, 5 to 8, but --ranks is 8; submit --array=0-7"),
        ("2", None, None, r"2 tasks, 5 to 8; submit --array=0-1"),  # --array=5,8 or 5-8:3
        ("4", 1, None, r"--rank 1 .* give --ranks"),
    ],
)
def test_a_slurm_array_that_contradicts_is_refused(
    count: str, rank: int | None, num_ranks: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_of_slurm({**ARRAY, "SLURM_ARRAY_TASK_COUNT": count}, rank, num_ranks)
