"""The shipped DeepSpeed files: who owns which key, and that DeepSpeed itself knows every key in them.

DeepSpeed accepts unknown top-level keys without a word, so the top level is held against a list; below
`zero_optimization` its own pydantic model refuses unknown ones. test_engine resolves them, test_train trains.
"""

import copy
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
MAY_BE_AUTO = {"reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}
# What the JSON may own. Batch sizes, clipping, dtype and schedule are the YAML's.
TOP_LEVEL = {"optimizer", "zero_optimization", "communication_data_type", "data_types"}
# Implementation switches of an optimizer; learning rate, betas and weight decay are the YAML's.
OPTIMIZER_SWITCHES = {"torch_adam", "adam_w_mode", "foreach", "fp32_optimizer_states"}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def keys_of(config: dict, prefix: str = "") -> dict[str, object]:
    """Every key with its value, nested ones as `outer.inner`."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat[prefix + key] = value
        if isinstance(value, dict):
            flat |= keys_of(value, prefix + key + ".")
    return flat


def test_the_four_files_are_there() -> None:
    assert [path.name for path in FILES] == ["zero2.json", "zero3.json", "zero3_hpz.json", "zero3_offload.json"]


@every_file
def test_a_file_holds_nothing_that_the_yaml_owns(path: Path) -> None:
    config = json.loads(path.read_text())
    assert set(config) <= TOP_LEVEL
    assert set(config["optimizer"]) <= {"type", "params"}
    assert set(config["optimizer"].get("params", {})) <= OPTIMIZER_SWITCHES


@every_file
def test_auto_stands_only_where_the_engine_resolves_it(path: Path) -> None:
    keys = keys_of(json.loads(path.read_text()))
    assert {key.rpartition(".")[2] for key, value in keys.items() if value == "auto"} <= MAY_BE_AUTO


@every_file
def test_deepspeed_knows_every_zero_key_and_reads_it_as_written(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    written = json.loads(path.read_text())["zero_optimization"]
    config = {key: value for key, value in written.items() if value != "auto"}
    read = DeepSpeedZeroConfig(strict=True, **copy.deepcopy(config)).model_dump(by_alias=True)
    for key, value in config.items():
        seen = {inner: read[key][inner] for inner in value} if isinstance(value, dict) else read[key]
        assert seen == value, key


@every_file
def test_the_readme_explains_every_key(path: Path) -> None:
    explained = set(re.findall(r"`([a-z0-9_.]+)`", (FOLDER / "README.md").read_text()))
    assert set(keys_of(json.loads(path.read_text()))) - {"optimizer", "zero_optimization", "data_types"} <= {
        f"{section}{key}" for key in explained for section in ("", "zero_optimization.", "optimizer.")
    }


def test_the_readme_explains_every_file() -> None:
    assert set(re.findall(r"`([a-z0-9_]+\.json)`", (FOLDER / "README.md").read_text())) == {path.name for path in FILES}
