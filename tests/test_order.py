"""Every epoch is a partition of the samples over the rows, and nothing but its arguments decides it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import BLOCK, row_order

SHARDS = st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(SHARDS, st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 80), st.integers(1, 300))
def test_every_epoch_is_a_partition(
    shard_sizes: list[int], num_rows: int, seed: int, epoch: int, block: int, window: int
) -> None:
    rows = [
        row_order(seed, epoch, row, shard_sizes=shard_sizes, num_rows=num_rows, block=block, window=window)
        for row in range(num_rows)
    ]
    assert all(row.dtype == np.int64 for row in rows)
    assert sorted(np.concatenate(rows).tolist()) == list(range(sum(shard_sizes)))


@given(st.integers(1, 9), st.integers(1, 12))
def test_every_row_has_its_turn_where_samples_are_few(num_samples: int, num_rows: int) -> None:
    num_epochs = -(-num_rows // num_samples)
    for row in range(num_rows):
        turns = [row_order(0, e, row, shard_sizes=[num_samples], num_rows=num_rows) for e in range(num_epochs)]
        assert sum(map(len, turns)) > 0


@given(st.integers(200, 3000), st.integers(1, 8))
def test_the_shares_of_the_rows_are_nearly_equal(num_samples: int, num_rows: int) -> None:
    sizes = [len(row_order(0, 0, row, shard_sizes=[num_samples], num_rows=num_rows)) for row in range(num_rows)]
    assert max(sizes) - min(sizes) <= 2 * BLOCK
    assert min(sizes) >= 0.6 * num_samples / num_rows


def test_the_order_never_changes_between_versions() -> None:
    order = row_order(1, 2, 1, shard_sizes=[5, 7], num_rows=2, block=2, window=3)
    assert order.tolist() == [3, 6, 1, 10, 4, 11]


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    arguments = {"shard_sizes": [300, 200], "num_rows": 2}
    first = row_order(0, 0, 0, **arguments)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first, row_order(0, 0, 0, **arguments))  # type: ignore[arg-type]
    assert not np.array_equal(first, row_order(1, 0, 0, **arguments))  # type: ignore[arg-type]
    assert not np.array_equal(first, row_order(0, 1, 0, **arguments))  # type: ignore[arg-type]


def test_reads_stay_inside_a_few_blocks_at_a_time() -> None:
    order = row_order(0, 0, 0, shard_sizes=[10_000], num_rows=2, block=64, window=128)
    for start in range(0, len(order) - 128, 128):
        assert len(np.unique(order[start : start + 128] // 64)) <= 4


def test_a_row_that_does_not_exist_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        row_order(0, 0, 2, shard_sizes=[3], num_rows=2)
