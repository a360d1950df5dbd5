"""Ranks and workers decide who computes a row and nothing else."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.loader import IGNORED_SIGNALS, DataState, Loader, ignore_stop_signals
from data_pipeline.packing import Pack
from data_pipeline.sources import Source
from tests.test_packing import assert_equal
from tests.test_stream import make_sources, picture, write_source
from tests.test_vocab import VOCAB

NUM_ROWS = 4
SHAPES = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 1)]  # ranks, workers of each
Step = tuple[dict[int, Pack], DataState]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return make_sources(tmp_path_factory.mktemp("data"))


def global_steps(
    sources: list[Source], num_ranks: int, num_workers: int, num_steps: int, state: Any = None
) -> list[Step]:
    """The packs of all ranks by row, and all states, step by step."""
    merged: list[Step] = [({}, {}) for _ in range(num_steps)]
    for rank in range(num_ranks):
        loader = Loader(
            sources,
            VOCAB,
            pack_tokens=128,
            num_rows=NUM_ROWS,
            rank=rank,
            world_size=num_ranks,
            num_workers=num_workers,
            seed=5,
            state=state,
        )
        for (packs, states), (all_packs, all_states) in zip(loader, merged, strict=False):
            assert [pack.name[0] for pack in packs] == list(states) == list(range(rank, NUM_ROWS, num_ranks))
            all_packs.update({pack.name[0]: pack for pack in packs})
            all_states.update(states)
    return merged


def assert_same(steps: list[Step], expected: list[Step]) -> None:
    assert len(steps) == len(expected)
    for (packs, states), (expected_packs, expected_states) in zip(steps, expected, strict=True):
        assert states == expected_states
        assert set(packs) == set(expected_packs) == set(range(NUM_ROWS))
        for row in packs:
            assert_equal(packs[row], expected_packs[row])


@functools.cache
def uninterrupted(paths: tuple[Source, ...]) -> list[Step]:
    return global_steps(list(paths), 1, 0, 16)


@pytest.mark.parametrize(("num_ranks", "num_workers"), SHAPES[1:])
def test_ranks_and_workers_change_no_global_batch(sources: list[Source], num_ranks: int, num_workers: int) -> None:
    assert_same(global_steps(sources, num_ranks, num_workers, 6), uninterrupted(tuple(sources))[:6])


def test_the_rows_differ_from_one_another(sources: list[Source]) -> None:
    packs, _ = uninterrupted(tuple(sources))[0]
    assert len({tuple(pack.ids.tolist()) for pack in packs.values()}) == NUM_ROWS


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.sampled_from(SHAPES), st.sampled_from(SHAPES))
def test_resume_on_another_shape_gives_the_same_batches(
    sources: list[Source], stop: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    expected = uninterrupted(tuple(sources))
    _, state = global_steps(sources, *before, stop + 1)[stop]
    state = json.loads(json.dumps(state))  # as a checkpoint gives it back, keys turned into strings
    assert_same(global_steps(sources, *after, 3, state), expected[stop + 1 : stop + 4])


def test_the_streams_can_be_sent_to_a_spawned_worker(sources: list[Source]) -> None:
    loader = Loader(sources, VOCAB, pack_tokens=128, num_rows=NUM_ROWS, seed=5)
    items = iter(pickle.loads(pickle.dumps(loader._rows)))  # noqa: S301  our own bytes
    packs, _ = uninterrupted(tuple(sources))[0]
    for item in next(items):
        assert_equal(item.pack, packs[item.row])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_rows": 8, "world_size": 3}, "world_size=3 does not divide num_rows=8; use 1 or 2 or 4 or 8"),
        ({"num_rows": 8, "world_size": 2, "num_workers": 3}, "num_workers=3 does not divide"),
        ({"num_rows": 0}, "num_rows=0"),
        ({"num_rows": 4, "pack_tokens": 0}, "pack_tokens=0"),
        ({"num_rows": 4, "state": {0: {}}}, "num_rows cannot change"),
        ({"num_rows": 1, "state": {0: {}, 1: {}}}, "num_rows cannot change"),
    ],
)
def test_numbers_that_do_not_fit_are_errors_with_values_that_work(
    sources: list[Source], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Loader(sources, VOCAB, **{"pack_tokens": 128, **arguments})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_one_sentence(tmp_path: Path, num_workers: int) -> None:
    bad = Source("bad", write_source(tmp_path, [picture(0)]))
    loader = Loader([bad], VOCAB, pack_tokens=8, num_rows=1, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^source 'bad' gave \d+ documents in a row.*") as error:
        next(iter(loader))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_documents_are_put_aside_once_their_step_is_consumed(tmp_path: Path, num_workers: int) -> None:
    documents = [picture(i) for i in range(40)]
    documents[7].codes.clear()
    source = Source("some", write_source(tmp_path / "some", documents))
    quarantine = tmp_path / "run" / "rank_0.jsonl"
    arguments: dict[str, Any] = {"pack_tokens": 64, "num_rows": 2, "num_workers": num_workers, "quarantine": quarantine}
    state = None
    for _, state in Loader([source], VOCAB, **arguments):
        rejected = sum(sum(row["rejected"].values()) for row in state.values())
        told = quarantine.read_text().splitlines() if quarantine.exists() else []
        assert len(told) == rejected
        if rejected == 2:
            break
    record = json.loads(told[0])
    reason = "image has no codes, run `uvlm data tokenize`: 1.png"
    assert record == {
        "row": record["row"],
        "pack": record["pack"],
        "source": "some",
        "sample": 7,
        "key": "p7",
        "reason": reason,
    }
    next(iter(Loader([source], VOCAB, state=state, **arguments)))
    assert quarantine.read_text().splitlines()[:2] == told


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_bad_documents_that_stop_a_run_are_put_aside_too(tmp_path: Path, num_workers: int) -> None:
    documents = [picture(i) for i in range(400)]
    for document in documents[::3]:
        document.codes.clear()
    source = Source("some", write_source(tmp_path / "some", documents))
    quarantine = tmp_path / "quarantine.jsonl"
    loader = Loader([source], VOCAB, pack_tokens=4096, num_rows=2, num_workers=num_workers, quarantine=quarantine)
    with pytest.raises(ValueError, match=r"(\d+) of the first 200 documents of row") as error:
        list(loader)
    told = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert len(told) >= int(str(error.value).split()[0])
    assert {each["sample"] % 3 for each in told} == {0}


def test_workers_ignore_the_signals_that_stop_a_job(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.update({number: handler}))
    ignore_stop_signals()
    assert set_to == dict.fromkeys(IGNORED_SIGNALS, signal.SIG_IGN)
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2} == set(IGNORED_SIGNALS)


SCRIPT = """
import os, pickle, signal, sys
import torch.multiprocessing
from data_pipeline.loader import IGNORED_SIGNALS, Loader

if __name__ == "__main__":
    sources, vocab = pickle.load(open(sys.argv[1], "rb"))
    steps = iter(Loader(sources, vocab, pack_tokens=128, num_rows=4, num_workers=2, seed=5))
    first = next(steps)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in IGNORED_SIGNALS:
            os.kill(worker.pid, number)
    for _ in range(20):
        packs, _ = next(steps)
    print(packs[0].name, flush=True)
    if sys.argv[2] == "kill":
        os.kill(workers[0].pid, signal.SIGKILL)
        while True:
            next(steps)
"""


def test_signals_do_not_stop_the_workers_and_the_end_of_the_program_does(
    sources: list[Source], tmp_path: Path, repository: Path
) -> None:
    script, arguments = tmp_path / "program.py", tmp_path / "arguments.pickle"
    script.write_text(SCRIPT)
    arguments.write_bytes(pickle.dumps((sources, VOCAB)))
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    programs = {
        ending: subprocess.Popen(
            [sys.executable, str(script), str(arguments), ending],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for ending in ("normal", "kill")
    }
    results = {ending: (*program.communicate(timeout=120), program.returncode) for ending, program in programs.items()}
    assert results["normal"] == ("(0, 20)\n", "", 0)
    out, error, code = results["kill"]
    assert (out, code) == ("(0, 20)\n", 1)
    assert "worker" in error.splitlines()[-1]


def test_packs_of_workers_are_ordinary_tensors(sources: list[Source]) -> None:
    loader = Loader(sources, VOCAB, pack_tokens=128, num_rows=1, num_workers=1)
    packs, _ = next(iter(loader))
    assert isinstance(packs[0].ids, torch.Tensor)
    assert not packs[0].ids.is_shared()
