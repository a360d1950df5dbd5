"""The plan: pure in the pack's name, spans that cover the layers, counts that depend on the image alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import mixed_pack
from uvlm.policies import Dense, Route
from uvlm.token_plan import TokenPlan


def _kept(plan: TokenPlan) -> list[torch.Tensor]:
    return [span.kept for span in plan.spans if span.kept is not None]


def test_the_plan_is_a_function_of_seed_and_pack_name() -> None:
    policy = Route(first_layer=1, last_layer=2)
    plans = [
        TokenPlan.of(mixed_pack(name=name), policy, 4, seed) for name, seed in [((0, 3), 1), ((0, 3), 1), ((0, 4), 1)]
    ]
    same, again, other_name = (_kept(plan)[0] for plan in plans)
    assert torch.equal(same, again)
    assert not torch.equal(same, other_name)
    other_seed = _kept(TokenPlan.of(mixed_pack(name=(0, 3)), policy, 4, seed=2))[0]
    assert not torch.equal(same, other_seed)


@given(
    first=st.integers(0, 5),
    length=st.integers(1, 6),
    keep_input=st.floats(0, 1),
    keep_target=st.floats(0, 1),
    number=st.integers(0, 50),
)
def test_route_leaves_out_only_image_tokens_and_keeps_the_order(
    first: int, length: int, keep_input: float, keep_target: float, number: int
) -> None:
    last = min(5, first + length - 1)
    policy = Route(first_layer=first, last_layer=last, keep_input=keep_input, keep_target=keep_target)
    pack = mixed_pack(name=(1, number))
    plan = TokenPlan.of(pack, policy, 6)

    layers = [layer for span in plan.spans for layer in range(span.first, span.stop)]
    assert layers == list(range(6)), "every layer runs, once and in order"
    is_image = np.zeros(len(pack.ids), dtype=bool)
    for start, (height, width) in zip(pack.image_start.tolist(), pack.image_hw.tolist(), strict=True):
        is_image[start : start + height * width] = True
    for span in plan.spans:
        if span.kept is None:
            assert torch.equal(span.cu_seqlens, pack.cu_seqlens)
            continue
        kept = span.kept.numpy()
        assert (np.diff(kept) > 0).all()
        assert np.isin(np.flatnonzero(~is_image), kept).all(), "text is never left out"
        assert len(kept) == (~is_image).sum() + round(keep_input * 16) + round(keep_target * 25)
        documents = np.repeat(np.arange(len(pack.doc_task)), np.diff(pack.cu_seqlens.numpy()))
        counts = np.bincount(documents[kept], minlength=len(pack.doc_task))
        assert span.cu_seqlens.diff().tolist() == counts.tolist()
        assert span.max_seqlen == counts.max()


def test_kept_shares_count_token_layers() -> None:
    policy = Route(first_layer=1, last_layer=2, keep_input=0.5, keep_target=0.0)
    plan = TokenPlan.of(mixed_pack(128), policy, 4)
    num_dropped = 2 * (8 + 25)
    assert plan.kept_share == pytest.approx(1 - num_dropped / (4 * 128))
    assert plan.image_kept_share == pytest.approx(1 - num_dropped / (4 * 41))
    dense = TokenPlan.of(mixed_pack(128), Dense(), 4)
    assert (dense.kept_share, dense.image_kept_share) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("first", "last", "message"), [(3, 2, "swap the two"), (1, 4, "use at most 3")], ids=["backwards", "outside"]
)
def test_a_span_outside_the_model_is_refused_with_a_value_that_works(first: int, last: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Route(first_layer=first, last_layer=last).check(num_layers=4)
