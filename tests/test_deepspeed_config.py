"""The DeepSpeed config of a run: the YAML and the JSON each own their keys, and a clash names both values."""

import json
from pathlib import Path
from typing import Any

import pytest

from uvlm.config import Config, load_config
from uvlm.deepspeed_config import read_deepspeed_json, resolve
from uvlm.engine import compiler_missing


@pytest.fixture
def config() -> Config:
    return load_config(Path("demo"), ["data.num_rows=8"])


@pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_hpz.json", "zero3_offload.json"])
def test_the_shipped_files_are_found_by_name_and_resolve(config: Config, name: str) -> None:
    resolved = resolve(read_deepspeed_json(Path(name)), config, world_size=2)
    assert resolved["train_micro_batch_size_per_gpu"] == 1
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == config.optim.gradient_clipping
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["optimizer"]["params"]["lr"] == config.optim.learning_rate
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_yaml_says_in_which_precision(dtype: str) -> None:
    config = load_config(Path("demo"), [f"dtype={dtype}"])
    resolved = resolve(read_deepspeed_json(Path("zero3.json")), config, world_size=1)
    assert [name for name in ("bf16", "fp16") if resolved[name]["enabled"]] == [dtype] * (dtype != "fp32")


def test_auto_is_the_usual_function_of_the_hidden_size(config: Config) -> None:
    zero = resolve(read_deepspeed_json(Path("zero3_offload.json")), config, 1)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 256 * 256
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 256 * 256)
    assert zero["stage3_param_persistence_threshold"] == 2560


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"gradient_clipping": 0.5}, "sets gradient_clipping=0.5, the YAML owns it as optim.gradient_clipping=1.0"),
        ({"train_batch_size": 8}, "sets train_batch_size=8, the YAML owns it as data.num_rows=8"),
        ({"bf16": {"enabled": False}}, "the YAML owns it as dtype='bf16'"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
            "sets optimizer.params.lr=1, the YAML owns it as optim.",
        ),
        ({"bfloat16": {"enabled": True}}, "the YAML owns it as dtype='bf16'"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, 'sub_group_size: "auto" is not allowed here'),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}},
            'offload_param.device: "auto" is not allowed',
        ),
        (
            {"zero_optimization": {"stage": 3}, "communication_data_type": "auto"},
            'communication_data_type: "auto" is not allowed here',
        ),
        ({"zero_optimization": []}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0 is not supported; use 1, 2 or 3"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "sets checkpoint.writer, but uvlm writes and converts"),
        ({"checkpoint": {"load_universal": True}}, "sets checkpoint.load_universal, but uvlm writes and converts"),
        ({}, "zero_optimization.stage is missing; use 1, 2 or 3"),
    ],
)
def test_a_key_of_the_yaml_in_the_json_is_refused_with_both_values(
    config: Config, tree: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below, without a pattern
        resolve(tree, config, 1)
    assert sentence in str(error.value)


def test_resolving_leaves_the_users_tree_alone(config: Config) -> None:
    tree = read_deepspeed_json(Path("zero3_offload.json"))
    before = json.dumps(tree)
    resolve(tree, config, 1)
    assert json.dumps(tree) == before


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "there is no DeepSpeed JSON"), ("{", "not valid JSON"), ("[]", "no JSON object")]
)
def test_a_file_that_is_no_deepspeed_json_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_deepspeed_json(path)


def test_a_mistyped_path_never_becomes_a_shipped_file() -> None:
    with pytest.raises(ValueError, match="there is no DeepSpeed JSON"):
        read_deepspeed_json(Path("my/typo/zero3.json"))


def test_a_missing_compiler_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = compiler_missing()
    assert sentence is not None
    assert "apt-get install g++" in sentence
