"""Records between two logs: sums over packs, losses of the steps that counted, time and memory of each phase."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.schema import TASKS
from tests.helpers import mixed_pack, tiny_model
from uvlm.flops import Widths, dense_flops
from uvlm.phases import PHASES, Phases
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan
from uvlm.window import Window, num_useful_tokens

pytestmark = pytest.mark.usefixtures("alone")

CPU = torch.device("cpu")


def _counts(**by_task: float) -> torch.Tensor:
    return torch.tensor([by_task.get(task, 0.0) for task in TASKS], dtype=torch.float64)


def test_time_is_added_by_phase_and_begins_anew_with_each_record(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr("uvlm.phases.time.perf_counter", lambda: next(clock))
    phases = Phases(CPU)
    for name in ("forward", "backward", "forward"):
        with phases(name):
            pass
    seconds, peaks = phases.take()
    assert seconds == {"data": 0.0, "forward": 3.0, "backward": 0.5, "step": 0.0, "save": 0.0}
    assert peaks["forward"] > 10**7, "bytes of this process"
    assert peaks["save"] == 0
    assert phases.take() == (dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0))


def test_a_record_holds_losses_shares_speed_time_and_memory() -> None:
    model, pack = tiny_model(), mixed_pack()
    plan = TokenPlan.of(pack, Policy(), model.num_layers)
    widths = Widths.of(model.backbone.config)
    window = Window(CPU)
    with window.phases("forward"):
        window.add_pack(pack, plan, widths)
    window.add_step(_counts(understand=6.0, generate=1.0).float(), _counts(understand=3, generate=4), was_skipped=False)
    record = window.reduced(num_rejected=2)
    assert record["loss/understand"] == 2.0
    assert record["loss/generate"] == 0.25
    assert record["loss/mean"] == pytest.approx(1.125)
    assert "loss/text" not in record
    assert record["roles/flop_share"] == 1.0
    assert window.sums["flops"] == dense_flops(plan, widths)
    assert record["data/fill_share"] == num_useful_tokens(pack) / len(pack.ids)
    assert record["data/rejected_documents"] == 2
    assert {name for name in record if name.startswith("time/")} == {f"time/{phase}" for phase in PHASES}
    assert {name for name in record if name.startswith("memory/")} == {"memory/forward_gb"}


def test_losses_of_a_step_that_was_left_out_do_not_count() -> None:
    model, pack = tiny_model(), mixed_pack()
    window = Window(CPU)
    window.add_pack(pack, TokenPlan.of(pack, Policy(), model.num_layers), Widths.of(model.backbone.config))
    window.add_step(torch.full((len(TASKS),), torch.nan), _counts(understand=3), was_skipped=True)
    assert not [name for name in window.reduced(0) if name.startswith("loss/")]
    window.add_step(_counts(understand=3.0).float(), _counts(understand=3), was_skipped=False)
    assert window.reduced(0)["loss/mean"] == 1.0
