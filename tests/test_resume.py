"""The promise of the data pipeline: the same global batches on any ranks and workers, and after any stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader import DataState, Loader
from data_pipeline.packing import Pack
from data_pipeline.schema import Document
from data_pipeline.sources import Source
from tests.test_packing import assert_equal
from tests.test_schema import make_document
from tests.test_stream import picture, question, write_source
from tests.test_vocab import VOCAB

NUM_ROWS = 8
NUM_STEPS = 200
SHAPES = [(1, 0), (1, 2), (2, 1), (2, 4), (4, 1), (4, 2)]  # ranks, workers of each
Step = tuple[list[Pack], DataState]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose


def story(i: int) -> Document:
    """Interleaved, of very different lengths, some longer than a pack."""
    texts = ("a red circle", *[None, " a blue circle" * (1 + i % 7)] * (1 + i % 9))
    return make_document(f"s{i}", texts, task="interleave", source="s")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Three of different sizes and weights, one with weights that change, one in fewer documents than rows."""
    folder = tmp_path_factory.mktemp("data")
    return [
        Source("questions", write_source(folder / "q", [question(i) for i in range(150)], 16), ((0, 1.0), (90, 2.5))),
        Source("stories", write_source(folder / "s", [story(i) for i in range(70)], 70), 0.7, over_long="split"),
        Source("pictures", write_source(folder / "p", [picture(i) for i in range(5)], 1), 0.4),
    ]


def steps(sources: list[Source], shape: tuple[int, int], state: Any = None) -> Iterator[Step]:
    """The global batches: packs by row, and the state of all rows."""
    num_ranks, num_workers = shape
    arguments: dict[str, Any] = {"pack_tokens": 128, "num_rows": NUM_ROWS, "num_workers": num_workers, "seed": 11}
    ranks = [
        iter(Loader(sources, VOCAB, rank=rank, world_size=num_ranks, state=state, **arguments))
        for rank in range(num_ranks)
    ]
    try:
        while True:
            parts = [next(rank) for rank in ranks]
            packs = sorted((pack for part, _ in parts for pack in part), key=lambda pack: pack.name)
            yield packs, {row: row_state for _, states in parts for row, row_state in states.items()}
    finally:
        for rank in ranks:
            rank.close()  # type: ignore[attr-defined]  # a generator; its workers end here


def assert_same(step: Step, expected: Step) -> None:
    packs, state = step
    expected_packs, expected_state = expected
    assert len(packs) == len(expected_packs) == NUM_ROWS
    for pack, expected_pack in zip(packs, expected_packs, strict=True):
        assert_equal(pack, expected_pack)
    assert state == expected_state


@pytest.fixture(scope="module")
def uninterrupted(sources: list[Source]) -> list[Step]:
    return [step for step, _ in zip(steps(sources, (1, 0)), range(NUM_STEPS), strict=False)]


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_every_shape_gives_the_same_global_batches(
    sources: list[Source], uninterrupted: list[Step], shape: tuple[int, int]
) -> None:
    for step, expected in zip(steps(sources, shape), uninterrupted, strict=False):
        assert_same(step, expected)


@pytest.mark.parametrize("trial", range(50))
def test_a_stop_anywhere_and_a_resume_on_another_shape_change_nothing(
    sources: list[Source], uninterrupted: list[Step], trial: int
) -> None:
    random = np.random.default_rng([2026, trial])
    first = int(random.integers(0, NUM_STEPS - 24))
    stop = first + int(random.integers(1, 12))
    before, after = (SHAPES[int(i)] for i in random.integers(0, len(SHAPES), 2))
    state: Any = uninterrupted[first][1]
    for shape, begin, end in ((before, first, stop), (after, stop, stop + 12)):
        state = json.loads(json.dumps(state))  # as a checkpoint gives it back
        for step, expected in zip(steps(sources, shape, state), uninterrupted[begin + 1 : end + 1], strict=False):
            assert_same(step, expected)
            state = step[1]


def test_the_mixture_uses_every_source_and_every_way_to_be_packed(uninterrupted: list[Step]) -> None:
    """What the tests above compare is not trivial."""
    names = {name for packs, _ in uninterrupted for pack in packs for name in pack.doc_id}
    assert sum(name.startswith("q") for name in names) == 150
    assert {name for name in names if name.startswith("p")} == {f"p{i}" for i in range(5)}
    assert any("/" in name for name in names), "no document was split"
    sizes = [len(json.dumps(row_state)) for _, state in uninterrupted for row_state in state.values()]
    assert max(sizes) < 1200
