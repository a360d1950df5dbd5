"""`uvlm tune`: what it may try, in which order it measures, that nothing which happens to a trial ends the search.

Where the search itself is tested, a stand-in answers in place of real ranks: a rate for each setting. Real ones are in
tests/test_tune_trial.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from uvlm import tune as tuning
from uvlm.config import load_config
from uvlm.deepspeed_config import resolve
from uvlm.tune_report import report, verdict, write_report
from uvlm.tune_search import LAST, NUM_REPEATS, Forecast, Gain, Journal, Record, Search, Tools, gain
from uvlm.tune_space import Lengths, Setting, Space, config_of, read_lengths, setting_of
from uvlm.tune_trial import Outcome, Place

ZERO = {
    "stage": 3,
    "overlap_comm": False,
    "reduce_bucket_size": 10_000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "offload_optimizer": {"device": "cpu"},
}
TREE = {
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": ZERO,
}
START = Setting(256, 8, 0, "full", json.dumps(TREE, sort_keys=True))
SPACE = Space(START, 2, min_pack_tokens=200, max_pack_tokens=4096, hidden_size=64, num_cores=2, can_build=True)
MAY_CHANGE = {"data.pack_tokens", "data.num_rows", "data.num_workers", "recompute", "optimizer.params.torch_adam"}


def test_every_setting_keeps_the_tokens_of_a_step_and_all_keys_that_are_not_searched() -> None:
    settings = [*SPACE.shipped(), *SPACE.samples(200, seed=0)]
    settings += [move for setting in settings[:20] for move in SPACE.moves(setting)]
    assert len(settings) > 200
    for setting in settings:
        assert setting.pack_tokens * setting.num_rows == 256 * 8
        assert 200 <= setting.pack_tokens <= 4096
        assert setting.num_rows % 2 == 0
        assert setting.num_workers == 0 or (setting.num_rows // 2) % setting.num_workers == 0
        mine, start = setting.flat(), START.flat()
        changed = {key for key in mine.keys() | start.keys() if mine.get(key) != start.get(key)}
        assert {key for key in changed - MAY_CHANGE if not key.startswith("zero_optimization.")} == set()


def test_the_search_reaches_every_size_of_packs_stage_and_kind_of_offload() -> None:
    settings = SPACE.samples(200, seed=0)
    assert {setting.pack_tokens for setting in settings} == {256, 512, 1024}
    assert {setting.zero["stage"] for setting in settings} == {1, 2, 3}
    assert {setting.recompute for setting in settings} == {"none", "selective", "full"}
    assert {"offload_param" in setting.zero for setting in settings} == {True, False}
    assert {"torch_adam" in setting.deepspeed for setting in settings} == {True, False}


def test_a_setting_has_the_keys_of_its_own_stage_only() -> None:
    for setting in [*SPACE.shipped(), *SPACE.samples(200, seed=1)]:
        is_3 = setting.zero["stage"] == 3
        assert is_3 == any(key.startswith("stage3_") for key in setting.zero)
        assert is_3 or "offload_param" not in setting.zero


def test_a_move_changes_one_key_and_what_hangs_on_it() -> None:
    for setting in SPACE.moves(START):
        keys = {line.split(":")[0].split(".")[0] for line in setting.changes_from(START)}
        if "stage" not in keys and "data" not in keys:
            assert len(keys) == 1, keys


def test_the_same_seed_draws_the_same_settings_and_another_seed_others() -> None:
    assert SPACE.samples(20, seed=3) == SPACE.samples(20, seed=3) != SPACE.samples(20, seed=4)
    assert len(set(SPACE.samples(40, seed=3))) == 40


def test_packs_stay_where_no_other_size_is_allowed() -> None:
    space = replace(SPACE, min_pack_tokens=256, max_pack_tokens=300)
    assert {setting.pack_tokens for setting in [*space.shipped(), *space.samples(50, seed=0)]} == {256}
    notes = tuning._warnings(load_config(Path("demo")), space, Lengths(256, 0, 9, is_all=True))
    assert any("2,048 tokens of a step can be held by data.pack_tokens=256 alone" in note for note in notes)


def test_auto_in_the_json_is_the_number_that_it_stands_for(tmp_path: Path) -> None:
    written = {**TREE, "zero_optimization": {**ZERO, "reduce_bucket_size": "auto"}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(written))
    config = load_config(Path("demo")).model_copy(update={"deepspeed": path})
    hidden = config.model.hidden_size
    assert setting_of(config, 1).zero["reduce_bucket_size"] == hidden * hidden


def test_a_config_with_a_setting_in_it_trains_the_same_but_for_the_setting(tmp_path: Path) -> None:
    config = load_config(Path("demo"))
    setting = START._replace(pack_tokens=512, num_rows=4, recompute="selective")
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(setting.tree))
    made = config_of(setting, config, path)
    assert (made.data.pack_tokens, made.data.num_rows, made.recompute) == (512, 4, "selective")
    assert setting_of(made, 2) == setting
    assert resolve(setting.tree, made, 2)["gradient_accumulation_steps"] == 2
    same = {"data", "recompute", "deepspeed"}
    assert made.model_dump(exclude=same) == config.model_dump(exclude=same)


def test_lengths_of_documents_say_how_small_a_pack_may_be(config: Path) -> None:
    lengths = read_lengths(load_config(config))
    assert lengths.is_all
    assert lengths.num_read == 192
    assert lengths.num_longer == 0
    shorter = read_lengths(load_config(config, [f"data.pack_tokens={lengths.longest - 1}"]))
    assert 0 < shorter.longest < lengths.longest
    assert shorter.num_longer > 0
    assert not read_lengths(load_config(config), seconds=-1).is_all


def test_where_not_all_documents_were_read_no_smaller_pack_is_tried(config: Path) -> None:
    loaded = load_config(config)
    start, place = setting_of(loaded, 2), Place(2)
    known, unknown = Lengths(30, 0, 192, is_all=True), Lengths(30, 0, 64, is_all=False)
    assert tuning._space(loaded, start, known, place).min_pack_tokens == 30
    assert tuning._space(loaded, start, unknown, place).min_pack_tokens == loaded.data.pack_tokens
    assert any("only 64 documents were read" in line for line in tuning._warnings(loaded, SPACE, unknown))
    longer = tuning._warnings(loaded, SPACE, Lengths(30, 5, 192, is_all=True))
    assert any("5 of 192 documents are longer" in line for line in longer)


# ---- the search, with a stand-in for real ranks


class StandIn:
    """Answers for real ranks: each trial takes 10 s of a clock that only it moves, and `rate` says how fast it was."""

    def __init__(self, rate: Callable[[Setting, int], float | str] | None = None) -> None:
        self.now, self.measured = 0.0, list[Setting]()
        self.rate = rate or (lambda setting, number: speed(setting))
        self.stop_at: int | None = None

    def __call__(self, setting: Setting, number: int, seconds: float, deadline: float) -> Outcome:
        if number == self.stop_at:
            raise KeyboardInterrupt
        self.now += 10
        self.measured.append(setting)
        rate = self.rate(setting, number)
        if isinstance(rate, str):
            return Outcome(rate, seconds=10.0)
        return Outcome(None, [rate] * 5, [1.0] * 5, [10**9], 0, "stand-in", 8 * 10**9, 10.0)

    def search(self, folder: Path, budget: float = 600, **tools: Callable[..., object]) -> Search:
        journal = Journal(folder / "trials.jsonl", lambda: self.now)
        return Search(SPACE, journal, Tools(self, **tools), budget)  # type: ignore[arg-type]


def speed(setting: Setting) -> float:
    """Of a made-up machine: offload and recomputation cost, large packs and stage 2 pay."""
    rate = 1000.0 * {256: 1.0, 512: 1.5, 1024: 2.0}[setting.pack_tokens]
    rate *= {"none": 1.3, "selective": 1.1, "full": 1.0}[setting.recompute]
    rate *= {1: 1.1, 2: 1.2, 3: 1.0}[setting.zero["stage"]]
    return rate * (0.5 if "offload_optimizer" in setting.zero else 1.0)


def test_the_search_finds_what_is_fast_within_its_budget(tmp_path: Path) -> None:
    stand_in = StandIn()
    search = stand_in.search(tmp_path)
    winner, found = search.run()
    assert speed(winner) >= 0.9 * max(map(speed, SPACE.samples(200, seed=9)))
    assert found is not None
    assert {found.ratio, found.low, found.high} == {speed(winner) / speed(START)}
    assert stand_in.now <= 600 + 40
    assert search.journal.records[0].setting == START


def test_each_rung_measures_the_start_and_the_best_so_far_again(tmp_path: Path) -> None:
    search = StandIn().search(tmp_path, budget=1200)
    search.run()
    rungs = dict.fromkeys(record.rung for record in search.journal.records)
    assert len(rungs) >= 3
    best = None
    for rung in rungs:
        own = [record for record in search.journal.records if record.rung == rung]
        assert START in [record.setting for record in own]
        assert best is None or best in [record.setting for record in own]
        best = max(own, key=lambda record: record.rate).setting


@pytest.mark.parametrize("budget", [60, 600, 3000])
def test_in_the_last_rung_all_take_turns_and_never_fewer_than_five(tmp_path: Path, budget: float) -> None:
    search = StandIn().search(tmp_path, budget)
    search.run()
    last = [record for record in search.journal.records if record.rung == LAST]
    members = {record.setting for record in last}
    assert START in members
    assert len(members) >= 2
    turns = [[record.setting for record in last if record.repeat == turn] for turn in range(1 + last[-1].repeat)]
    assert len(turns) >= NUM_REPEATS
    assert all(len(turn) == len(members) and set(turn) == members for turn in turns)
    assert len({turn[0] for turn in turns}) > 1  # nobody is always the first
    assert [record.setting for record in last] == [setting for turn in turns for setting in turn]


def test_a_short_budget_tries_fewer_settings(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "long").mkdir()
    short, long = StandIn(), StandIn()
    short.search(tmp_path / "short", 200).run()
    long.search(tmp_path / "long", 2000).run()
    assert 3 <= len(set(short.measured)) < len(set(long.measured))


def test_a_machine_that_slows_down_does_not_change_the_gain(tmp_path: Path) -> None:
    stand_in = StandIn(lambda setting, number: speed(setting) / (1 + number / 10))
    winner, found = stand_in.search(tmp_path).run()
    assert found is not None
    assert found.ratio == pytest.approx(speed(winner) / speed(START), rel=0.05)


def test_where_nothing_is_faster_the_start_is_kept(tmp_path: Path) -> None:
    search = StandIn(lambda setting, number: 1000.0 if setting == START else 900.0).search(tmp_path)
    winner, found = search.run()
    assert (winner, found) == (START, None)
    assert "keep it" in verdict(search, winner, found)


def test_a_trial_that_fails_is_told_and_not_tried_again_and_the_search_goes_on(tmp_path: Path) -> None:
    def rate(setting: Setting, number: int) -> float | str:
        return "hung: no result" if setting.zero["stage"] == 2 else speed(setting)

    stand_in = StandIn(rate)
    search = stand_in.search(tmp_path)
    winner, found = search.run()
    failed = [setting for setting in stand_in.measured if setting.zero["stage"] == 2]
    assert failed
    assert len(set(failed)) == len(failed)
    assert winner.zero["stage"] != 2
    assert found is not None
    assert "| failed | hung: no result |" in report(search, winner, found, [], {})


def test_a_start_that_cannot_run_gives_way_to_what_can(tmp_path: Path) -> None:
    search = StandIn(lambda setting, number: "out of memory" if setting == START else speed(setting)).search(tmp_path)
    winner, found = search.run()
    assert winner != START
    assert found is None
    assert "cannot run (out of memory)" in verdict(search, winner, found)
    assert [record.setting for record in search.journal.records].count(START) == 1


def test_one_accident_of_the_start_does_not_end_the_comparison(tmp_path: Path) -> None:
    starts: list[int] = []

    def rate(setting: Setting, number: int) -> float | str:
        starts.extend([number] * (setting == START))
        return "killed" if setting == START and len(starts) == 2 else speed(setting)

    search = StandIn(rate).search(tmp_path)
    winner, found = search.run()
    assert found is not None
    assert found.ratio == speed(winner) / speed(START)
    assert "times as fast" in verdict(search, winner, found)


def test_where_nothing_runs_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no setting could be measured; the start: no GPU"):
        StandIn(lambda setting, number: "no GPU").search(tmp_path).run()


def test_what_plan_says_is_too_large_is_not_tried_but_listed(tmp_path: Path) -> None:
    stand_in = StandIn()
    search = stand_in.search(tmp_path, forecast=lambda one, first: Forecast(one.pack_tokens * 1e7, 1.0))
    winner, found = search.run()
    assert {setting.pack_tokens for setting in stand_in.measured} == {256, 512}  # 10.24 GB of 8
    assert {setting.pack_tokens for setting in search.not_tried} == {1024}
    assert "needs 10.24 GB a rank by prediction; there are 8.00 GB" in report(search, winner, found, [], {})


def test_the_memory_that_the_user_names_counts_instead(tmp_path: Path) -> None:
    stand_in = StandIn()
    search = stand_in.search(tmp_path, forecast=lambda one, first: Forecast(one.pack_tokens * 1e7, 1.0))
    search.memory = 3e9
    search.run()
    assert {setting.pack_tokens for setting in stand_in.measured} == {256}
    search.memory = 0.5e9  # less than the trials measure
    assert "more than --gpu-memory" in str(search._judged(START, 99, 1.0).failure)


def test_what_plan_thinks_fast_is_tried_first(tmp_path: Path) -> None:
    stand_in = StandIn()
    search = stand_in.search(tmp_path, forecast=lambda one, first: Forecast(1.0, 2.0 - (one.recompute == "selective")))
    search.run()
    first = [record.setting for record in search.journal.records if record.rung == "0"]
    assert {setting.recompute for setting in first[3:8]} == {"selective"}  # behind the start and two shipped files


def test_what_plan_was_not_asked_about_comes_last(tmp_path: Path) -> None:
    ask = lambda one, first: Forecast(1.0, 1.0) if one.zero["stage"] == 1 else None  # noqa: E731
    search = StandIn().search(tmp_path, forecast=ask)
    ordered = search._ordered(SPACE.samples(40, seed=0))
    known = [setting.zero["stage"] == 1 for setting in ordered]
    assert 5 < sum(known) < 35
    assert known == sorted(known, reverse=True)


def test_what_train_would_refuse_costs_no_trial(tmp_path: Path) -> None:
    stand_in = StandIn()
    refuse = lambda one: "the checkpoint has other packs" if one.pack_tokens != 256 else None  # noqa: E731
    search = stand_in.search(tmp_path, refusal=refuse)
    winner, found = search.run()
    assert {setting.pack_tokens for setting in stand_in.measured} == {256}
    assert "- refused: the checkpoint has other packs: " in report(search, winner, found, [], {})


def test_packs_that_leave_out_what_the_start_takes_are_rejected(tmp_path: Path) -> None:
    search = StandIn().search(tmp_path)
    search._first = Outcome()
    small = START._replace(pack_tokens=128, num_rows=16)
    search.tools.run = lambda *arguments: Outcome(None, [1.0], [1.0], [1], num_too_long=3)
    assert "3 documents of the first steps, which the start takes" in str(search._judged(small, 0, 1.0).failure)
    assert search._judged(START, 0, 1.0).failure is None


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = StandIn().search(tmp_path / "whole")
    result = whole.run()
    for stop_at in (1, 7, 20):
        broken = StandIn()
        broken.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            broken.search(tmp_path / "parts").run()
    with (tmp_path / "parts" / "trials.jsonl").open("a") as file:
        file.write('{"number": 20, "rung"')  # the machine went down in the middle of a line
    last = StandIn()
    search = last.search(tmp_path / "parts")
    assert search.run() == result
    assert search.journal.records == whole.journal.records == Journal(tmp_path / "parts" / "trials.jsonl").records
    assert len(last.measured) == len(whole.journal.records) - 20


def test_a_search_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    lengths = Lengths(9, 0, 9, is_all=True)
    assert tuning._begun(tmp_path, {"recompute": "full", "ranks": 2}, lambda: lengths) == lengths
    assert tuning._begun(tmp_path, {"recompute": "full", "ranks": 2}, lambda: Lengths(1, 1, 1, False)) == lengths
    with pytest.raises(ValueError, match=r"recompute='full' then, 'none' now.*give --out another folder"):
        tuning._begun(tmp_path, {"recompute": "none", "ranks": 2}, lambda: lengths)


def test_what_a_search_depends_on_names_json_world_and_code(config: Path) -> None:
    loaded = load_config(config)
    start = setting_of(loaded, 2)
    known = tuning._identity(loaded, start, Place(2))
    assert known == tuning._identity(loaded, start, Place(2))
    assert known != tuning._identity(loaded, start, Place(4))
    assert known != tuning._identity(loaded, start._replace(deepspeed=START.deepspeed), Place(2))
    assert known != tuning._identity(load_config(config, ["optim.steps=99"]), start, Place(2))
    assert known["uvlm (its files)"]


def test_turns_that_do_not_agree_are_called_a_tie(tmp_path: Path) -> None:
    search = StandIn().search(tmp_path)
    winner, found = search.run()
    assert found is not None
    assert "tie" not in verdict(search, winner, found)
    assert "tie" in verdict(search, winner, found._replace(low=0.95))


def test_the_gain_pairs_the_trials_of_a_turn() -> None:
    other = SPACE.shipped()[0]
    speeds = [(100.0, 200.0), (50.0, 150.0), (10.0, 15.0)]
    records: list[Record] = []
    for repeat, pair in enumerate(speeds):
        for setting, rate in zip((START, other), pair, strict=True):
            records.append(Record(len(records), LAST, repeat, setting, Outcome(None, [rate]), 0.0))
    records.append(Record(6, LAST, 3, other, Outcome(None, [9.0]), 0.0))  # the start failed in this turn
    assert gain(records, other, START) == Gain(2.0, 1.5, 3.0, 3)


def test_the_report_has_every_trial_and_a_picture(tmp_path: Path) -> None:
    search = StandIn(lambda setting, number: "a | b" if number == 3 else speed(setting)).search(tmp_path)
    winner, found = search.run()
    write_report(tmp_path, search, winner, found, ["look here"], {"torch": "2"})
    text = (tmp_path / "report.md").read_text()
    assert found is not None
    assert f"{found.ratio:.2f} times as fast" in text
    assert all(f"\n| {number} |" in text for number in range(len(search.journal.records)))
    assert all(f"- `{change}`" in text for change in winner.changes_from(START))
    assert "a \\| b" in text
    assert "- look here" in text
    assert "which documents share a pack" in text
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tune.png").stat().st_size > 10_000
