"""Packing loses and doubles nothing, documents stay apart, and packs are full."""

import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.encode import IGNORED, Encoded
from data_pipeline.packing import BestFit, Pack, make_pack

PAD = 7


def make_encoded(length: int, name: str = "d", has_image: bool = True) -> Encoded:
    """Ids 100, 101, ...; all supervised but the first; an image of one code at position 1."""
    ids = np.arange(100, 100 + length)
    num_images = int(has_image)
    return Encoded(
        ids=ids,
        slot_lengths=[1, length - 1],
        slot_segments=[3, 3],
        slot_losses=[False, True],
        task=length % 4,
        source="made",
        doc_id=name,
        image_starts=[1] * num_images,
        image_shapes=[(1, 1)] * num_images,
        image_targets=[True] * num_images,
    )


def assert_equal(a: Pack, b: Pack) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(1, 5))
def test_no_document_is_lost_or_doubled(lengths: list[int], num_bins: int) -> None:
    bins: BestFit[range] = BestFit(64, num_bins)
    items = [range(i * 1000, i * 1000 + length) for i, length in enumerate(lengths)]  # a range knows who it is
    closed = [pack for item in items if (pack := bins.add(item)) is not None]
    assert all(sum(map(len, pack)) <= 64 for pack in closed)
    assert len(bins.bins) <= num_bins
    out = [item.start for pack in [*closed, *bins.bins] for item in pack]
    assert sorted(out) == [item.start for item in items]


def test_a_document_goes_where_it_leaves_the_least_room() -> None:
    bins: BestFit[range] = BestFit(10, num_bins=2)
    assert bins.add(range(6)) is None
    assert bins.add(range(7)) is None
    assert bins.add(range(2)) is None
    assert [[len(item) for item in items] for items in bins.bins] == [[6], [7, 2]]
    closed = bins.add(range(5))  # fits nowhere: the fullest closes
    assert closed is not None
    assert [len(item) for item in closed] == [7, 2]


def test_a_full_pack_closes_at_once() -> None:
    bins: BestFit[range] = BestFit(10)
    bins.add(range(4))
    assert bins.add(range(6)) == [range(4), range(6)]
    assert bins.add(range(10)) == [range(10)]
    assert bins.bins == []


def test_the_lengths_of_the_demo_fill_packs_to_95_percent() -> None:
    generator = np.random.default_rng(0)
    bins: BestFit[range] = BestFit(1024)
    fills = []
    for i in range(4000):
        mean, spread = ((190, 30), (75, 3))[i % 2]
        closed = bins.add(range(int(generator.normal(mean, spread))))
        if closed is not None:
            fills.append(sum(map(len, closed)) / 1024)
    assert np.mean(fills) > 0.95


def test_a_pack_says_where_everything_lies() -> None:
    pack = make_pack([make_encoded(3, "a"), make_encoded(5, "b"), make_encoded(2, "c", False)], 14, PAD, (2, 9))
    assert pack.ids.tolist() == [100, 101, 102, 100, 101, 102, 103, 104, 100, 101, *[PAD] * 4]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
    assert pack.cu_seqlens.tolist() == [0, 3, 8, 10, 14]
    assert (pack.max_seqlen, pack.name) == (5, (2, 9))
    assert isinstance(pack.max_seqlen, int)
    assert pack.doc_task.tolist() == [3, 1, 2, -1]
    assert pack.doc_id == ["a", "b", "c", ""]
    assert pack.doc_source == ["made"] * 3 + [""]
    assert pack.image_start.tolist() == [1, 4]
    assert pack.image_hw.tolist() == [[1, 1]] * 2
    assert pack.image_is_target.tolist() == [True, True]
    dtypes = (pack.ids.dtype, pack.labels.dtype, pack.position_ids.dtype, pack.cu_seqlens.dtype, pack.segment.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int64, torch.int32, torch.uint8)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_labels_never_cross_a_document(lengths: list[int]) -> None:
    pack = make_pack([make_encoded(length) for length in lengths], 80, PAD, (0, 0))
    ends = pack.cu_seqlens[1:] - 1
    assert (pack.labels[ends] == IGNORED).all()
    supervised = (pack.labels != IGNORED).nonzero().flatten()
    assert torch.equal(pack.labels[supervised], pack.ids[supervised + 1])
    assert torch.equal(pack.position_ids[supervised] + 1, pack.position_ids[supervised + 1])
    assert (pack.labels[sum(lengths) :] == IGNORED).all()


def test_a_full_pack_has_no_tail_and_an_imageless_one_no_images() -> None:
    pack = make_pack([make_encoded(4, "a", False)], 4, PAD, (0, 0))
    assert pack.cu_seqlens.tolist() == [0, 4]
    assert pack.doc_id == ["a"]
    assert (pack.image_start.shape, pack.image_hw.shape, pack.image_is_target.shape) == ((0,), (0, 2), (0,))
    assert (pack.image_start.dtype, pack.image_hw.dtype) == (torch.int64, torch.int64)


def test_a_pack_between_processes_stays_the_same_and_holds_no_shared_memory() -> None:
    pack = make_pack([make_encoded(3)], 8, PAD, (0, 0))
    assert not any(isinstance(value, torch.Tensor) for value in pack.__getstate__().values())
    again = pickle.loads(pickle.dumps(pack))  # noqa: S301  our own bytes
    assert_equal(again, pack)
    again.ids[0] = 1  # stays writable
