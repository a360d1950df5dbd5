"""The run's configuration: YAML, checked, with `key=value` overrides last.

Each section stands beside the code it configures; this file joins them. An unknown key is an error that names the
nearest known one. The YAML owns batch sizes, clipping, dtype, learning rate, betas, weight decay and schedule; the
DeepSpeed JSON named by `deepspeed` owns the optimizer's type and everything about ZeRO, offload and communication.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator

from data_pipeline.schema import TASKS
from data_pipeline.sources import OverLong, Source
from uvlm.backbone import ModelConfig
from uvlm.folders import is_run_folder
from uvlm.life import LifeConfig
from uvlm.model import Recompute
from uvlm.optim import OptimConfig
from uvlm.policies import AnyImagePolicy, ImagePolicy, Policy, expand
from uvlm.policies.ratio import FORMS, Linear
from uvlm.strict import Strict

_POLICIES: dict[str, type[ImagePolicy]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(AnyImagePolicy)[0])
}
SHIPPED = Path(__file__).parent / "configs"


# Relative to where the command is run; absolute from then on, so that a run folder works from anywhere.
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
DeepSpeedJson = Annotated[Path, AfterValidator(lambda path: path.absolute() if path.is_file() else path)]


# A folder, or a URL such as s3://bucket/shards.
Location = Annotated[str, AfterValidator(lambda place: place if "://" in place else str(Path(place).absolute()))]


class SourceConfig(Strict):
    path: Location = Field(description="folder or URL of tokenized shards with a manifest.json")
    name: str = Field(default="", description="name in logs; the folder's name where none is given")
    weight: float | dict[int, float] = Field(
        default=1.0, description="share of documents, relative to the other sources; {0: 1.0, 1000: 0.5} changes it"
    )
    over_long: OverLong = Field(default="drop", description="drop documents longer than a pack, or split them")

    def source(self) -> Source:
        weight = tuple(sorted(self.weight.items())) if isinstance(self.weight, dict) else self.weight
        return Source(self.name or PurePosixPath(self.path).name, self.path, weight, self.over_long)


class DataConfig(Strict):
    tokenizer: AbsolutePath = Field(description="folder made by `uvlm tokenizer train`")
    train: list[SourceConfig] = Field(min_length=1)
    valid: list[SourceConfig] = Field(default=[], description="held-out shards for the validation loss")
    pack_tokens: int = Field(gt=0, description="T, tokens of one pack; fixed for a run")
    num_rows: int = Field(gt=0, description="G, packs of one optimizer step over all ranks; fixed for a run")
    num_workers: int = Field(default=0, ge=0, description="loader processes of each rank")
    max_rejected_share: float = Field(default=0.05, ge=0, le=1, description="share of bad documents that stops the run")


class LossConfig(Strict):
    weights: dict[str, float] = Field(default={}, description="weight of each task's mean loss; 1.0 if none is given")
    z_loss: float = Field(
        default=0.0, ge=0, description="weight of a token's squared log of the softmax's denominator, such as 1e-4"
    )

    @field_validator("weights")
    @classmethod
    def _tasks_exist(cls, weights: dict[str, float]) -> dict[str, float]:
        for task in set(weights) - set(TASKS):
            raise ValueError(f"there is no task {task!r}; use {', '.join(TASKS)}")
        return weights


class CheckpointConfig(Strict):
    every: int = Field(gt=0, description="steps between checkpoints; one more is written at the end")
    keep: int = Field(default=2, gt=0, description="newest checkpoints that stay")
    keep_every: int = Field(default=0, ge=0, description="those of every so many steps stay for good; 0 keeps none")
    background: bool = Field(
        default=True, description="training goes on while a copy in host memory is written; false needs no such memory"
    )
    fall_back: bool = Field(
        default=False, description="start from an older checkpoint where the newest is damaged, instead of refusing"
    )

    @field_validator("keep_every")
    @classmethod
    def _is_written(cls, keep_every: int, info: ValidationInfo) -> int:
        every = info.data.get("every", 1)
        if keep_every % every:
            raise ValueError(f"no multiple of checkpoint.every={every}; use {-(-keep_every // every) * every}")
        return keep_every


class ValidationConfig(Strict):
    every: int = Field(default=0, ge=0, description="steps between validations; 0 turns them off")
    steps: int = Field(default=4, gt=0, description="global batches of held-out packs")
    prompts: list[str] = Field(default=[], description="captions whose generated images go to TensorBoard")
    max_share: float = Field(default=0.05, gt=0, le=1, description="of a run's time; beyond it validations are put off")

    @field_validator("prompts")
    @classmethod
    def _prompts_say_something(cls, prompts: list[str]) -> list[str]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty; write a caption such as 'a red circle'")
        return prompts


class Config(Strict):
    run: AbsolutePath = Field(description="run folder; point at the same folder to go on")
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    data: DataConfig
    policy: Policy = Policy()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16",
        description="of weights and activations; the optimizer keeps fp32. fp16 scales its loss by itself",
    )
    recompute: Recompute = Field(
        default="none", description="activations that the backward pass computes again to save memory"
    )
    deepspeed: DeepSpeedJson = Field(default=Path("zero3.json"), description="a path, or a name in ds_configs/")
    checkpoint: CheckpointConfig
    life: LifeConfig = LifeConfig()
    validation: ValidationConfig = ValidationConfig()
    log_every: int = Field(default=10, gt=0, description="steps between records in TensorBoard and metrics.jsonl")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a config.

    Args:
        path: a YAML file, a run folder (which may have moved), or the name of a shipped YAML such as `demo`.
        overrides: `dotted.key=value`, the value in YAML; they win over the file.

    Raises:
        ValueError: one sentence per mistake, each naming the key and a remedy.
    """
    folder = path.absolute() if is_run_folder(path) else None
    if folder:
        path = folder / "config.yaml"
    shipped = SHIPPED / f"{path}.yaml"
    if not path.is_file() and shipped.is_file():
        path = shipped
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ValueError(
            f"there is no config {path}; give the path of a YAML file or a run folder, or one of the shipped: {names}"
        )
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except RecursionError:
        raise ValueError(f"{path} is no config: it is nested too deeply; see uvlm/configs/demo.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no mapping of keys to values; see uvlm/configs/demo.yaml")
    if folder:
        _move(tree, folder)
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def _move(tree: dict[str, Any], folder: Path) -> None:
    """Where a run folder lies now is its `run`, and where its DeepSpeed JSON lies."""
    before, json_path = Path(str(tree.get("run"))), Path(str(tree.get("deepspeed")))
    tree["run"] = str(folder)
    if json_path.is_relative_to(before):
        tree["deepspeed"] = str(folder / json_path.relative_to(before))


def parse_config(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values; ValueError with one sentence per mistake."""
    is_for_both = isinstance(policy := tree.get("policy"), dict) and "name" in policy
    if is_for_both:
        tree = {**tree, "policy": expand(tree["policy"])}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        sentences = [_sentence(tree, dict(item), is_for_both) for item in error.errors()]
        if is_for_both:  # the user wrote it once
            sentences = [s.replace("policy.input.", "policy.").replace("policy.target.", "policy.") for s in sentences]
        raise ValueError("; ".join(dict.fromkeys(sentences))) from None
    was_one = is_for_both and config.policy.input == config.policy.target
    config.policy.check(config.model.num_layers, was_one)
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"the override {override!r} is not of the form key=value, such as optim.steps=100")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"the override {override!r} reaches into {parent!r}, which is no section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"the value of the override {override!r} is not valid YAML") from None


def _sentence(tree: dict[str, Any], error: dict[str, Any], is_for_both: bool) -> str:
    """One pydantic error as a sentence with a remedy."""
    path = list(error["loc"])
    # pydantic names the chosen branch of a union too: of a policy, of a ratio, of a weight.
    branches = {*_POLICIES, *FORMS, "[key]"} if path[:1] == ["policy"] else {"float", "dict[int,float]"}
    path = [part for part in path if part not in branches]
    name = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1], tree)
        if is_for_both and len(path) == 3 and path[0] == "policy":
            known += ["input_projections", "target_projections", "full_tail"]
        if path[:-1] == ["policy"]:
            known = ["name", *known]
        nearest = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
        return f"unknown key {name!r}; the nearest known one is {'.'.join([*map(str, path[:-1]), *nearest])!r}"
    if error["type"] == "missing":
        is_in_list = any(isinstance(part, int) for part in path)  # where no override reaches
        return f"the key {name!r} is missing; add it to the YAML" + ("" if is_in_list else f" or give {name}=VALUE")
    if error["type"].startswith("union_tag"):
        return f"{name}.name must be one of {', '.join(_POLICIES)}"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{name}={error['input']!r} is no section of keys and values; write {name}={{KEY: VALUE, ...}}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: Sequence[Any], tree: Any) -> list[str]:
    """Keys of the section at `path`, found by walking the models beside the tree."""
    model: Any = Config
    for part in path:
        tree = tree[part]
        if isinstance(part, int):
            continue
        if part in ("input", "target"):
            model = _POLICIES[tree["name"]]
            continue
        if model in _POLICIES.values():
            return list(Linear.model_fields)  # of policies only a ratio has keys of its own
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return list(model.model_fields)
