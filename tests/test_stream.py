"""A row goes on from any of its states, mixes its sources exactly, and counts what it leaves out."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.stream import RowStream, Source, open_sources
from tests.test_packing import assert_equal
from tests.test_schema import make_document
from tests.test_vocab import VOCAB


def question(i: int) -> Document:
    texts = (None, *["what color is the circle?", " blue"] * (1 + i % 5))
    return make_document(f"q{i}", texts, loss=tuple(i > 0 and i % 2 == 0 for i in range(len(texts))), source="q")


def picture(i: int) -> Document:
    return make_document(f"p{i}", ("a red circle", None), task="generate", source="p")


def write_source(folder: Path, documents: list[Document], samples_per_shard: int = 16) -> Path:
    with ShardWriter(folder, samples_per_shard, image_tokenizer=VOCAB.image_tokenizer) as writer:
        for document in documents:
            writer.write(document)
    return folder


def make_sources(folder: Path) -> list[Source]:
    return [
        Source("questions", write_source(folder / "q", [question(i) for i in range(70)]), 1.0),
        Source("pictures", write_source(folder / "p", [picture(i) for i in range(50)]), 3.0),
    ]


def stream(sources: list[Source], pack_tokens: int = 128, state: dict | None = None, row: int = 0) -> RowStream:
    opened = open_sources(sources, VOCAB)
    return RowStream(opened, VOCAB, row=row, num_rows=2, pack_tokens=pack_tokens, seed=3, state=state)


def test_every_state_goes_on_with_the_same_packs(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    whole = stream(sources)
    steps = [next(whole) for _ in range(40)]  # several epochs
    for stop in (0, 1, 7, 23):
        state = json.loads(json.dumps(steps[stop][1]))
        resumed = stream(sources, state=state)
        for pack, after in steps[stop + 1 :]:
            again, again_after = next(resumed)
            assert_equal(again, pack)
            assert again_after == after


def test_nothing_is_drawn_twice_in_an_epoch_and_nothing_is_lost(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)[:1]
    opened = open_sources(sources, VOCAB)
    emitted: list[str] = []
    for pack, state in RowStream(opened, VOCAB, row=0, num_rows=1, pack_tokens=128):
        emitted += [name for name in pack.doc_id if name]
        waiting = [f"q{sample}" for references in state["open"] for _, sample in references]
        progress = state["sources"]["questions"]
        assert len(emitted) + len(waiting) == progress["draws"] == 70 * progress["epoch"] + progress["position"]
        if progress["epoch"] == 0:
            assert len(set(emitted + waiting)) == progress["draws"]
        if progress["epoch"] == 3:
            break
    counts = Counter(emitted + waiting)
    assert len(counts) == 70
    assert set(counts.values()) <= {3, 4}


def test_the_mixture_is_exact_at_every_moment(tmp_path: Path) -> None:
    row = stream(make_sources(tmp_path))
    for _ in range(30):
        _, state = next(row)
        draws = [source["draws"] for source in state["sources"].values()]
        assert abs(draws[0] - sum(draws) / 4) <= 1


def test_a_state_takes_less_than_four_kilobytes(tmp_path: Path) -> None:
    row = stream(make_sources(tmp_path), pack_tokens=1024)
    assert max(len(json.dumps(next(row)[1])) for _ in range(12)) < 4096


def test_packs_carry_their_names_and_stay_unchanged_by_what_comes_after(tmp_path: Path) -> None:
    row = stream(make_sources(tmp_path), row=1)
    first, state = next(row)
    before = json.dumps(state)
    second, _ = next(row)
    assert (first.name, second.name) == ((1, 0), (1, 1))
    assert json.dumps(state) == before


def test_what_cannot_be_used_is_skipped_and_counted(tmp_path: Path) -> None:
    documents = [picture(0), make_document("bare", ("a", None), codes={}), make_document("long", ("a " * 200,))]
    source = Source("mixed", write_source(tmp_path, documents, 1))
    names: set[str] = set()
    row = stream([source], pack_tokens=32)
    states = []
    for _ in range(8):
        pack, state = next(row)
        names |= set(pack.doc_id)
        states.append((state, json.dumps(state)))
    assert all(json.dumps(state) == text for state, text in states), "a state changed after it was given out"
    assert next(stream([source], pack_tokens=32, state=states[3][0]))[1] == states[4][0]
    assert names == {"p0", ""}
    assert set(state["rejected"]) == {"image has no codes, run `uvlm data tokenize`", "longer than a pack"}
    assert all(count > 0 for count in state["rejected"].values())


def test_a_source_that_gives_nothing_is_named(tmp_path: Path) -> None:
    bad = Source("bad", write_source(tmp_path / "bad", [make_document("0", ("a" * 200,))]))
    with pytest.raises(ValueError, match=r"'bad'.*longer than a pack.*make its shards again"):
        next(stream([bad], pack_tokens=32))
    write_source(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"'none'.*no documents"):
        open_sources([Source("none", tmp_path / "none")], VOCAB)


def test_sources_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a", [picture(0)])
    with pytest.raises(ValueError, match="share a name"):
        open_sources([Source("a", path), Source("a", path)], VOCAB)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            open_sources([Source("a", path, weight)], VOCAB)
    with pytest.raises(ValueError, match="no data sources"):
        open_sources([], VOCAB)


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    _, state = next(stream(sources))
    with pytest.raises(ValueError, match="questions, pictures"):
        stream(sources[:1], state=state)
    with pytest.raises(ValueError, match="cannot be used now"):
        stream(sources, pack_tokens=8, state=state)
    shutil.rmtree(tmp_path / "p")
    write_source(tmp_path / "p", [picture(i) for i in range(50)], samples_per_shard=7)  # the same, cut otherwise
    with pytest.raises(ValueError, match="shards of source 'pictures' are not those that the run was saved with"):
        stream(sources, state=state)
