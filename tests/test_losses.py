"""Loss by task: whatever the split over ranks and micro-steps, the gradients are those of one process."""

import pytest
import torch

from data_pipeline.schema import TASKS
from tests.helpers import mixed_pack, tiny_model
from uvlm.losses import task_counts, task_ids, task_scales, task_sums
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan


def test_counts_are_the_supervised_tokens_of_each_task() -> None:
    counts = dict(zip(TASKS, task_counts([mixed_pack(), mixed_pack()]).tolist(), strict=True))
    assert counts == {"understand": 2 * 9, "generate": 2 * 25, "interleave": 0, "text": 2 * 20}


def test_task_sums_name_each_token_once() -> None:
    pack = mixed_pack()
    ids = task_ids(pack)
    sums = task_sums(torch.full((len(ids),), 0.5), ids)
    torch.testing.assert_close(sums, task_counts([pack]).float() * 0.5)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
def test_scaled_sums_give_the_weighted_mean_by_task_after_the_average_over_micro_batches(
    num_micro_batches: int,
) -> None:
    model, weights = tiny_model(), {"understand": 2.0, "generate": 0.5}
    packs = [mixed_pack(name=(0, number)) for number in range(4)]
    counts = task_counts(packs)
    scales = task_scales(counts, weights, num_micro_batches)
    total = torch.zeros(())
    expected = torch.zeros(())
    for pack in packs:
        loss, nll, _ = model(pack, TokenPlan.of(pack, Policy(), model.num_layers), scales[task_ids(pack)])
        sums = task_sums(nll, task_ids(pack))
        total = total + loss.detach() / num_micro_batches
        for task in ("understand", "generate", "text"):
            index = TASKS.index(task)
            expected = expected + weights.get(task, 1.0) * sums[index] / counts[index]
    torch.testing.assert_close(total, expected.float())
