"""A row goes on from any of its states, mixes its sources exactly, and counts what it leaves out."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.encode import Encoded
from data_pipeline.packing import MAX_AGE
from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Source, open_sources
from data_pipeline.stream import RowStream
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
    row = RowStream(opened, VOCAB, row=0, num_rows=1, pack_tokens=128)
    progress = row.cursors[0]
    for pack, _ in row:
        emitted += [name for name in pack.doc_id if name]
        waiting = [
            document.doc_id for documents in row._bins.bins for document in documents if isinstance(document, Encoded)
        ]
        assert len(emitted) + len(waiting) == progress.draws == 70 * progress.epoch + progress.position
        if progress.epoch == 0:
            assert len(set(emitted + waiting)) == progress.draws
        if progress.epoch == 3:
            break
    counts = Counter(emitted + waiting)
    assert len(counts) == 70
    assert set(counts.values()) <= {3, 4}


def test_the_mixture_is_exact_at_every_moment(tmp_path: Path) -> None:
    row = stream(make_sources(tmp_path))
    for _ in range(30):
        next(row)
        draws = [cursor.draws for cursor in row.cursors]
        assert abs(draws[0] - sum(draws) / 4) <= 1


def test_weights_change_at_their_steps(tmp_path: Path) -> None:
    questions, pictures = make_sources(tmp_path)
    pictures = dataclasses.replace(pictures, weight=((0, 0.0), (10, 3.0), (30, 0.0)))
    row = stream([questions, pictures])
    states, draws = [], [[0, 0]]
    for _ in range(50):
        states.append(next(row)[1])
        draws.append([cursor.draws for cursor in row.cursors])
    assert draws[10][1] == 0
    asked, drawn = (late - early for late, early in zip(draws[30], draws[10], strict=True))
    assert abs(drawn - 3 * asked) <= 4
    assert draws[50][1] == draws[30][1]
    assert draws[50][0] > draws[30][0]
    resumed = stream([questions, pictures], state=states[19])
    assert [next(resumed)[1] for _ in range(30)] == states[20:]


def test_a_state_is_small_however_many_documents_wait_in_the_bins(tmp_path: Path) -> None:
    tiny = [make_document(f"t{i}", ("a",), task="text") for i in range(3000)]
    row = stream([Source("tiny", write_source(tmp_path, tiny, 1000))], pack_tokens=4096)
    for _ in range(6):
        pack, state = next(row)
    assert len(pack.doc_id) > 800
    assert len(json.dumps(state)) < 700


def test_a_bin_that_nothing_fits_closes_in_the_end(tmp_path: Path) -> None:
    documents = [make_document("short", ("a",), task="text")]
    codes = {"0.npy": np.zeros((4, 31), np.uint16)}  # with bos, eos and the image's markers: 128 tokens
    documents += [make_document(f"full{i}", (None,), codes=codes) for i in range(200)]
    row = RowStream(
        open_sources([Source("s", write_source(tmp_path, documents, 1000))], VOCAB),
        VOCAB,
        row=0,
        num_rows=1,
        pack_tokens=128,
    )
    ages = []
    for _ in range(250):
        _, state = next(row)
        ages.append(state["packs"] - state["anchor"]["packs"])
    assert 6 < max(ages) <= MAX_AGE + 1


def test_a_long_document_is_split_between_its_slots_where_its_source_says_so(tmp_path: Path) -> None:
    texts = ("a red circle", None, "what color is the circle?", " blue", None, " b" * 40)
    long = [make_document(f"l{i}", texts, task="interleave") for i in range(9)]
    source = Source("long", write_source(tmp_path, long), over_long="split")
    row = RowStream(open_sources([source], VOCAB), VOCAB, row=0, num_rows=1, pack_tokens=24)
    steps = [next(row) for _ in range(80)]
    names = [name for pack, _ in steps for name in pack.doc_id if name]
    pieces = sorted({int(name.split("/")[1]) for name in names})
    assert pieces == list(range(len(pieces)))
    assert len(pieces) > 3
    drawn = Counter(names)
    assert max(drawn.values()) - min(drawn[f"l{i}/{piece}"] for i in range(9) for piece in pieces) <= 1
    for stop in range(40):  # the middle of a document too
        resumed = RowStream(
            open_sources([source], VOCAB),
            VOCAB,
            row=0,
            num_rows=1,
            pack_tokens=24,
            state=json.loads(json.dumps(steps[stop][1])),
        )
        pack, state = next(resumed)
        assert_equal(pack, steps[stop + 1][0])
        assert state == steps[stop + 1][1]


def test_an_image_too_large_for_any_pack_is_counted_as_long_and_stops_nothing(tmp_path: Path) -> None:
    huge = make_document("huge", ("a", None, "b"), codes={"1.npy": np.zeros((8, 8), np.uint16)})
    documents = [huge if i % 3 == 0 else picture(i) for i in range(300)]
    documents = [dataclasses.replace(document, key=f"d{i}") for i, document in enumerate(documents)]
    opened = open_sources([Source("s", write_source(tmp_path, documents), over_long="split")], VOCAB)
    row = RowStream(opened, VOCAB, row=0, num_rows=1, pack_tokens=48)
    states = [next(row)[1] for _ in range(300)]
    assert set(states[-1]["rejected"]) == {"longer than a pack"}
    assert row.take_refused() == []


def test_too_many_bad_documents_stop_the_run_and_say_why(tmp_path: Path) -> None:
    documents = [make_document(f"d{i}", ("a", None)) for i in range(300)]
    for bad in documents[::10]:
        bad.codes.clear()
    opened = open_sources([Source("tenth", write_source(tmp_path, documents))], VOCAB)
    patient = RowStream(opened, VOCAB, row=0, num_rows=1, pack_tokens=64, max_rejected_share=0.2)
    for _ in range(200):
        next(patient)
    refused = patient.take_refused()
    assert len(refused) == sum(patient.rejected.values())
    assert {(each["source"], each["key"] == f"d{each['sample']}") for each in refused} == {("tenth", True)}
    assert patient.take_refused() == []
    strict = RowStream(opened, VOCAB, row=0, num_rows=1, pack_tokens=64)
    with pytest.raises(
        ValueError, match=r"of the first 2\d\d documents .*'tenth': image has no codes.*max_rejected_share=0.05"
    ):
        list(itertools.islice(strict, 200))


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
    with pytest.raises(ValueError, match=r"'bad'.*longer than a pack.*raise data.pack_tokens"):
        next(stream([bad], pack_tokens=32))
    write_source(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"'none'.*no documents"):
        open_sources([Source("none", tmp_path / "none")], VOCAB)


@pytest.mark.parametrize("num_documents", [1, 3])
def test_a_source_smaller_than_its_share_is_repeated(tmp_path: Path, num_documents: int) -> None:
    opened = open_sources([Source("few", write_source(tmp_path, [picture(i) for i in range(num_documents)]))], VOCAB)
    names = Counter[str]()
    for row in range(8):
        packs = RowStream(opened, VOCAB, row=row, num_rows=8, pack_tokens=64)
        names.update(name for _ in range(6) for name in next(packs)[0].doc_id if name)
    assert set(names) == {f"p{i}" for i in range(num_documents)}


def test_sources_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a", [picture(0)])
    with pytest.raises(ValueError, match="share a name"):
        open_sources([Source("a", path), Source("a", path)], VOCAB)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            open_sources([Source("a", path, weight)], VOCAB)
    for schedule in (((5, 1.0),), ((0, 1.0), (9, 2.0), (7, 1.0)), ()):
        with pytest.raises(ValueError, match="begin at 0 and go up"):
            open_sources([Source("a", path, schedule)], VOCAB)
    with pytest.raises(ValueError, match="weight 0 from step 7 on"):
        open_sources([Source("a", path, ((0, 1.0), (7, 0.0)))], VOCAB)
    with pytest.raises(ValueError, match="no data sources"):
        open_sources([], VOCAB)


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    sources = make_sources(tmp_path)
    row = stream(sources)
    _, state = next(row)
    later = [next(row)[1] for _ in range(30)][-1]
    with pytest.raises(ValueError, match="questions, pictures"):
        stream(sources[:1], state=state)
    with pytest.raises(ValueError, match="pack_tokens=128 and cannot go on with 64"):
        stream(sources, pack_tokens=64, state=state)
    for changed in (0.1, 1.0):
        with pytest.raises(ValueError, match="not read as they were"):
            stream([sources[0], dataclasses.replace(sources[1], weight=changed)], state=later)
    shutil.rmtree(tmp_path / "p")
    write_source(tmp_path / "p", [picture(i) for i in range(50)], samples_per_shard=7)  # the same, cut otherwise
    with pytest.raises(ValueError, match="shards of source 'pictures' are not those that the run was saved with"):
        stream(sources, state=state)
