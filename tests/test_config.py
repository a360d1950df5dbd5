"""The YAML: every mistake is one sentence that names the key and a remedy."""

from pathlib import Path

import pytest
import yaml

from data_pipeline.sources import Source
from uvlm.config import Config, dump_config, load_config
from uvlm.optim import OptimConfig, learning_rate


def test_the_shipped_demo_config_survives_dump_and_load(tmp_path: Path) -> None:
    config = load_config(Path("demo"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_sources_may_be_urls_with_weights_that_change(tmp_path: Path) -> None:
    source = "{path: 's3://bucket/shards/', weight: {0: 1.0, 1000: 0.5}, over_long: split}"
    config = load_config(Path("demo"), [f"data.train=[{source}]"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for each in (config, load_config(tmp_path / "config.yaml")):
        expected = Source("shards", "s3://bucket/shards/", ((0, 1.0), (1000, 0.5)), "split")
        assert [item.source() for item in each.data.train] == [expected]


def test_overrides_win_and_are_yaml() -> None:
    config = load_config(Path("demo"), ["optim.steps=7", "policy={name: route, first_layer: 1, last_layer: 2}"])
    assert config.optim.steps == 7
    assert config.policy.input.name == config.policy.target.name == "route"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat'; the nearest known one is 'optim.learning_rate'"),
        ("modle=1", "unknown key 'modle'; the nearest known one is 'model'"),
        ("policy.kep=1", "unknown key 'policy.kep'; the nearest known one is 'policy."),
        (
            "policy={input: {name: route, kep: 1}}",
            "unknown key 'policy.input.kep'; the nearest known one is 'policy.input.keep'",
        ),
        ("policy={name: freeze, frist_layer: 1}", "the nearest known one is 'policy.first_layer'"),
        ("data.train=[{path: a, wieght: 2}]", "the nearest known one is 'data.train.0.weight'"),
        ("optim.steps=0", "optim.steps=0: input should be greater than 0"),
        ("optim.learning_rate=.inf", "optim.learning_rate=inf: input should be a finite number"),
        ("loss.weights.generate=.nan", "loss.weights.generate=nan: input should be a finite number"),
        ("model.head_dim=15", "model.head_dim=15: input should be a multiple of 2"),
        ("data.train=[{path: a, weight: much}]", "data.train.0.weight='much': input should be a valid number"),
        ("policy={name: rout}", "policy.name must be one of dense, ffn_skip, freeze, himix, hmgen, pyramid, route"),
        (
            "policy={name: route, first_layer: 1, last_layer: 9}",
            "policy.last_layer=9 is outside a model of 4 layers",
        ),
        ("policy={name: route, first_layer: 1, last_layer: 2, keep: 1.5}", "policy.keep=1.5: input should be less"),
        ("loss.weights={undrstand: 1}", "there is no task 'undrstand'"),
        ("optim.steps", "is not of the form key=value"),
        ("optim=3", "optim=3 is no section of keys and values"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_key(override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below, without a pattern
        load_config(Path("demo"), [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load(dump_config(load_config(Path("demo"))))
    del tree["optim"]["steps"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"the key 'optim.steps' is missing; .* optim.steps=VALUE"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(("text", "sentence"), [("a: [", "not valid YAML"), ("- 1", "no mapping")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_config(tmp_path / "c.yaml")


def test_a_folder_of_that_name_does_not_hide_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("demo")).model.family == "qwen3"


def test_a_run_folder_is_its_config_wherever_it_lies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_config(Path("demo"), [f"run={run}", "optim.steps=7"])
    (run / "mine.json").write_text("{}")
    config = config.model_copy(update={"deepspeed": run / "mine.json"})
    (run / "config.yaml").write_text(dump_config(config))
    (run / "environment.txt").touch()
    assert load_config(run) == config
    moved = run.rename(tmp_path / "moved")
    again = load_config(moved, ["optim.steps=8"])
    assert (again.run, again.deepspeed, again.optim.steps) == (moved, moved / "mine.json", 8)
    assert load_config(moved, ["run=other"]).run == Path("other").absolute()


def test_a_config_that_does_not_exist_names_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match="one of the shipped: 1b, 7b, demo, small"):
        load_config(Path("dmeo"))


def test_yaml_never_runs_code(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: !!python/object/apply:os.system ['touch pwned']")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_paths_are_absolute_so_that_a_run_folder_works_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config: Config = load_config(Path("demo"), ["run=here"])
    assert config.run == tmp_path / "here"


def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_share() -> None:
    config = OptimConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config, 100) == pytest.approx(0.1)
