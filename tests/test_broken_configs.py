"""Each broken config is refused with the key and a remedy, before anything starts; the shipped ones pass in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import BROKEN, Broken
from uvlm.check import check, look
from uvlm.config import load_config
from uvlm.deepspeed_refused import REFUSED
from uvlm.deepspeed_schema import default, known_keys
from uvlm.finding import Finding, errors

SHIPPED = ("zero2.json", "zero3.json", "zero3_hpz.json", "zero3_offload.json")


def findings_of(config: Path, folder: Path, text: str, **told: Any) -> list[Finding]:
    path = folder / "mine.json"
    path.write_text(text)
    resolved = load_config(config, [f"deepspeed={path}", f"run={folder / 'run'}"])
    return look(resolved, 2, **told).findings


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_config_is_refused_with_its_key_and_a_remedy(config: Path, tmp_path: Path, broken: Broken) -> None:
    path = tmp_path / "mine.json"
    path.write_text(broken.text)
    resolved = load_config(config, [f"deepspeed={path}", f"run={tmp_path / 'run'}", *broken.overrides])
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  the message is compared below, without a pattern
        check(resolved, broken.world_size)
    for word in broken.words:
        assert word in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_there_are_more_than_thirty_and_each_is_its_own() -> None:
    assert len(BROKEN) >= 30
    assert len({broken.name for broken in BROKEN}) == len(BROKEN)
    assert all(broken.reference == "run" or broken.reference.startswith("https://github.com/") for broken in BROKEN)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    ("world_size", "told"),
    [
        (1, {}),
        (2, {}),
        (4, {"on_gpus": True, "ranks_per_node": 4, "gpu_memory": 40e9}),
        (4, {"on_gpus": True, "ranks_per_node": 8, "gpu_memory": 80e9}),
    ],
)
def test_the_shipped_files_pass_without_a_warning(
    config: Path, tmp_path: Path, name: str, world_size: int, told: dict[str, Any]
) -> None:
    overrides = [f"deepspeed={name}", f"run={tmp_path / 'run'}"]
    assert look(load_config(config, overrides), world_size, **told).findings == []


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ('"overlap_com": true', "zero_optimization.overlap_comm"),
        ('"comunication_data_type": "fp32"', "communication_data_type"),
        ('"reduce_bucket_sizes": 5', "zero_optimization.reduce_bucket_size"),
    ],
)
def test_a_typo_is_told_with_the_key_that_was_meant(config: Path, tmp_path: Path, typo: str, meant: str) -> None:
    found = findings_of(config, tmp_path, f'{{{typo}, "zero_optimization": {{"stage": 3}}}}')
    assert f"the nearest known one is {meant!r}" in found[0].sentence


def test_groups_that_cross_nodes_are_told_and_no_remedy_contradicts_another(config: Path, tmp_path: Path) -> None:
    def told(hpz: int, ranks_per_node: int) -> list[str]:
        text = f'{{"zero_optimization": {{"stage": 3, "zero_hpz_partition_size": {hpz}}}}}'
        path = tmp_path / "mine.json"
        path.write_text(text)
        resolved = load_config(config, [f"deepspeed={path}", f"run={tmp_path / 'run'}", "data.num_rows=8"])
        return [one.level for one in look(resolved, 8, on_gpus=True, ranks_per_node=ranks_per_node).findings]

    assert told(8, 4) == ["warning"]
    assert told(3, 8) == ["error"]
    assert told(8, 8) == told(4, 8) == []


def test_one_fault_hides_no_other(config: Path, tmp_path: Path) -> None:
    text = """{"optimizer": {"type": "OneBitAdam"}, "typo": 1, "bf16": {},
               "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8", "offload_param": {"device": "cpu"}}}"""
    path = tmp_path / "mine.json"
    path.write_text(text)
    overrides = [f"deepspeed={path}", f"run={tmp_path / 'run'}", "data.tokenizer=nowhere", "policy.full_tail=0.001"]
    found = {finding.key for finding in look(load_config(config, overrides), 3).findings}
    assert found >= {
        "optimizer.type",
        "typo",
        "bf16",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.offload_param",
        "data.tokenizer",
        "data.num_rows",
        "policy.full_tail",
    }


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ('"stage": 2, "stage3_prefetch_bucket_size": 1000', "zero_optimization.stage3_prefetch_bucket_size"),
        ('"stage": 3, "allgather_bucket_size": 1000', "zero_optimization.allgather_bucket_size"),
        ('"stage": 3, "round_robin_gradients": true', "zero_optimization.round_robin_gradients"),
        (
            '"stage": 3, "stage3_param_persistence_threshold": 1e9',
            "zero_optimization.stage3_param_persistence_threshold",
        ),
        (
            '"stage": 3, "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e7',
            "zero_optimization.stage3_prefetch_bucket_size",
        ),
        (
            '"stage": 3, "stage3_gather_16bit_weights_on_model_save": true',
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        ),
        ('"stage": 3, "offload_optimizer": {"device": "cpu"}', "optimizer.params.torch_adam"),
        ('"stage": 3, "zero_quantized_gradients": true', "zero_optimization.zero_quantized_gradients"),
    ],
)
def test_what_works_but_costs_or_does_nothing_is_a_warning(config: Path, tmp_path: Path, zero: str, key: str) -> None:
    text = f'{{"optimizer": {{"type": "AdamW", "params": {{"torch_adam": true}}}}, "zero_optimization": {{{zero}}}}}'
    found = findings_of(config, tmp_path, text)
    assert [(finding.level, finding.key) for finding in found] == [("warning", key)]
    assert found[0].sentence.startswith(key)
    assert found[0].reference


def test_buckets_much_larger_than_the_model_are_told_in_gigabytes_where_the_gpu_is_small(
    config: Path, tmp_path: Path
) -> None:
    text = '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e9, "overlap_comm": true}}'
    (found,) = findings_of(config, tmp_path, text, on_gpus=True, gpu_memory=80e9)
    assert found.level == "warning"
    assert "reduce_bucket_size=5,000,000,000 takes 10.0 GB of each GPU" in found.sentence
    assert findings_of(config, tmp_path, text, on_gpus=False) == []


def test_a_whole_number_in_powers_of_ten_is_one(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}')
    tree = check(load_config(config, [f"deepspeed={path}", f"run={tmp_path / 'run'}"]), 2)
    assert tree["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert isinstance(tree["zero_optimization"]["reduce_bucket_size"], int)


def test_ranks_and_rows_that_fit_are_named_with_nodes(config: Path) -> None:
    found = errors(look(load_config(config, ["data.num_rows=48"]), 40, on_gpus=True, ranks_per_node=8).findings)
    assert found[0].sentence == (
        "data.num_rows=48 does not divide over 40 ranks; start 12 or 16 or 24 or 48 ranks, or set "
        "data.num_rows=80 or 40; of 8 ranks a node, 2 or 3 or 6 nodes fit"
    )


def test_what_is_refused_is_what_the_installed_deepspeed_knows() -> None:
    """A key that DeepSpeed has dropped would be told as a typo; the list would be of no use."""
    for key in REFUSED:
        section, _, name = key.rpartition(".")
        assert name in known_keys(section), key


def test_defaults_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, value in DeepSpeedZeroConfig(stage=3).model_dump(by_alias=True).items():
        if isinstance(value, dict) or name in ("stage", "overlap_comm"):
            continue
        assert default(f"zero_optimization.{name}") == value, name
