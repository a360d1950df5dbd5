"""What `uvlm tune` tries: settings, and how one becomes another.

A setting is what may change the speed of a run and not its meaning: how the tokens of an optimizer step are cut into
packs and micro-steps, how many loader processes there are, what the backward pass computes again, and the DeepSpeed
JSON's ZeRO stage, sizes, overlap, offload and kind of Adam. The rest of the JSON stays as the user wrote it, the dtypes
of communication and accumulation above all, and the tokens of a step are held exactly. All settings are pure values;
nothing is measured here.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data_pipeline.encode import encode
from data_pipeline.schema import Rejected
from data_pipeline.sources import open_sources
from data_pipeline.vocab import Vocab
from uvlm.config import Config, parse_config
from uvlm.deepspeed_config import automatic_sizes, read_deepspeed_json, resolve

_RECOMPUTE = ("none", "selective", "full")
_SIZES = (5_000_000, 50_000_000, 500_000_000)
_BLOCK = 64  # documents that are read one after the other
_OFFLOAD = {"device": "cpu", "pin_memory": True}
# A key of one stage only, and what it is where a setting comes from a stage that has no such key.
_OF_STAGE_3 = {"stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000}
_OF_STAGES_1_2 = {"allgather_bucket_size": 500_000_000}
_SAID_FIRST = ("stage", "pack_tokens", "num_rows", "recompute", "offload_optimizer.device", "offload_param.device")
_SAID_WHEN_GONE = ("offload_optimizer.device", "offload_param.device", "torch_adam")  # the others hang on the stage
_SHARED = ("overlap_comm", "reduce_bucket_size", "offload_optimizer")


class Setting(NamedTuple):
    """A point of the search."""

    pack_tokens: int
    num_rows: int
    num_workers: int
    recompute: str
    deepspeed: str  # the user's JSON, in one canonical form

    @property
    def tree(self) -> dict[str, Any]:
        return dict(json.loads(self.deepspeed))

    @property
    def zero(self) -> dict[str, Any]:
        return dict(self.tree["zero_optimization"])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:12]

    @property
    def overrides(self) -> list[str]:
        """Keys of the YAML that belong to it, as `key=value`; without the path of the JSON."""
        return [
            f"data.pack_tokens={self.pack_tokens}",
            f"data.num_rows={self.num_rows}",
            f"data.num_workers={self.num_workers}",
            f"recompute={self.recompute}",
        ]

    def flat(self) -> dict[str, Any]:
        """Every key with its value; those of the JSON with the path to them."""
        own = self._asdict()
        del own["deepspeed"]
        return {
            **{key if key == "recompute" else f"data.{key}": value for key, value in own.items()},
            **_flat(self.tree),
        }

    def changes_from(self, other: Setting) -> list[str]:
        """How it differs from `other`, as "key: old -> new"."""
        mine, theirs = self.flat(), other.flat()
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return [
            f"{key.removeprefix('zero_optimization.')}: {_shown(theirs.get(key))} -> {_shown(mine.get(key))}"
            for key in keys
            if mine.get(key) != theirs.get(key)
        ]

    def short_from(self, other: Setting) -> str:
        """The same in a few words: the new values alone, and what is gone."""
        mine, theirs = self.flat(), other.flat()
        changed = {_last(key): value for key, value in mine.items() if theirs.get(key) != value}
        order = {key: place for place, key in enumerate(_SAID_FIRST)}
        words = [f"{key}={_brief(changed[key])}" for key in sorted(changed, key=lambda key: order.get(key, len(order)))]
        gone = {_last(key) for key in theirs if key not in mine} - {_last(key) for key in mine}
        return ", ".join([*words, *(f"no {key}" for key in sorted(gone) if key in _SAID_WHEN_GONE)])


def _last(key: str) -> str:
    """The name of a key; of an offload and its details, the offload's."""
    *parents, name = key.split(".")
    return f"{parents[-1]}.{name}" if parents and parents[-1].startswith("offload") else name


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)


def _brief(value: Any) -> str:
    is_large = isinstance(value, int) and not value % 10**6 and value > 0
    return f"{value // 10**6}M" if is_large else _shown(value)


def setting_of(config: Config, num_ranks: int) -> Setting:
    """The one that a config and its JSON are; "auto" becomes the number that it stands for."""
    tree = read_deepspeed_json(config.deepspeed)
    zero = resolve(tree, config, num_ranks)["zero_optimization"]
    tree["zero_optimization"] = {key: zero[key] for key in tree["zero_optimization"]}
    data = config.data
    return Setting(data.pack_tokens, data.num_rows, data.num_workers, config.recompute, _canonical(tree))


def config_of(setting: Setting, config: Config, json_path: Path, run: Path | None = None) -> Config:
    """`config` with a setting in it, whose JSON stands at `json_path`. With `run` it is one to be measured in that
    scratch folder: without validation, and nothing that a clock of the user's job decides."""
    tree = config.model_dump(mode="json")
    tree["data"] |= {"pack_tokens": setting.pack_tokens, "num_rows": setting.num_rows}
    tree["data"]["num_workers"] = setting.num_workers
    tree |= {"recompute": setting.recompute, "deepspeed": str(json_path)}
    if run:
        tree |= {"run": str(run), "validation": {"every": 0}}
        tree["life"]["hours"] = None
    return parse_config(tree)


def _canonical(tree: dict[str, Any]) -> str:
    return json.dumps(tree, sort_keys=True)


@dataclass(frozen=True)
class Space:
    """All settings that may be tried beside the start.

    Attributes:
        start: what the user has. num_ranks: of the world.
        min_pack_tokens: no pack may be smaller: it would leave out documents that the start takes.
        max_pack_tokens: no pack may be larger.
        hidden_size: of the model; "auto" sizes follow from it.
        num_cores: of each rank; loader processes need some.
        can_build: DeepSpeed's own Adam can be compiled here.
        nodes_share: groups of ranks inside a node are a choice (more than one node).
    """

    start: Setting
    num_ranks: int
    min_pack_tokens: int
    max_pack_tokens: int
    hidden_size: int
    num_cores: int = 1
    can_build: bool = False
    nodes_share: bool = False

    def shipped(self) -> list[Setting]:
        """The shipped JSONs' ZeRO sections in the user's JSON, without recomputation: with the largest packs, then with
        the start's."""
        names = ["zero3.json", "zero2.json", *["zero3_hpz.json"] * self.nodes_share, "zero3_offload.json"]
        automatic = automatic_sizes(self.hidden_size)
        plain = []
        for name in names:
            zero = dict(read_deepspeed_json(Path(name))["zero_optimization"])
            zero = {key: automatic[key] if value == "auto" else value for key, value in zero.items()}
            plain.append(self._fitted(self.start._replace(recompute="none"), zero))
        largest = [max([own, *self.alternatives("packs", own)], key=lambda one: one.pack_tokens) for own in plain]
        return _distinct([*largest, *plain], [self.start])

    def alternatives(self, key: str, setting: Setting) -> list[Setting]:
        """The settings that differ from one in this key alone (and in what hangs on it)."""
        zero = setting.zero
        stage = zero["stage"]
        if key == "packs":
            return [self._cut(setting, num_rows) for num_rows in self._row_counts() if num_rows != setting.num_rows]
        if key == "recompute":
            return [setting._replace(recompute=value) for value in _RECOMPUTE if value != setting.recompute]
        if key == "num_workers":
            rows = setting.num_rows // self.num_ranks
            values = [n for n in (0, 1, 2, 4) if n < max(2, self.num_cores) and (not n or rows % n == 0)]
            return [setting._replace(num_workers=n) for n in values if n != setting.num_workers]
        if key == "stage":
            return [self._at_stage(setting, value) for value in (1, 2, 3) if value != stage]
        if key == "torch_adam":
            return self._other_adam(setting)
        if key == "offload_param" and stage != 3:
            return []
        if (key in _OF_STAGE_3 and stage != 3) or (key in _OF_STAGES_1_2 and stage == 3):
            return []
        return [self._fitted(setting, {**zero, key: value}) for value in self._values(key) if value != zero.get(key)]

    keys = (
        "packs",
        "recompute",
        "stage",
        "offload_optimizer",
        "overlap_comm",
        "reduce_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "allgather_bucket_size",
        "offload_param",
        "torch_adam",
        "num_workers",
    )

    def moves(self, setting: Setting) -> list[Setting]:
        """Every setting one key away."""
        found = [other for key in self.keys for other in self.alternatives(key, setting)]
        return _distinct(found, [setting])

    def samples(self, count: int, seed: int) -> list[Setting]:
        """Up to `count` settings several keys away from the start or a shipped one, the same for the same seed."""
        random, bases = Random(seed), [self.start, *self.shipped()]
        found: list[Setting] = []
        for _ in range(4 * count):
            setting = random.choice(bases)
            for key in self.keys:
                others = self.alternatives(key, setting)
                if others and random.random() < 0.4:
                    setting = random.choice(others)
            found.append(setting)
        return _distinct(found, bases)[:count]

    def _values(self, key: str) -> Sequence[Any]:
        if key in ("offload_optimizer", "offload_param"):
            return [None, _OFFLOAD]
        if key == "overlap_comm":
            return [False, True]
        automatic = automatic_sizes(self.hidden_size).get(key)
        values = [10_000, 100_000, 1_000_000] if key == "stage3_param_persistence_threshold" else list(_SIZES)
        if key == "stage3_prefetch_bucket_size":
            values = values[:2]
        return sorted({*values, *([automatic] if automatic else [])})

    def _row_counts(self) -> list[int]:
        """Rows of a step that cut its tokens into equal packs of an allowed size: by powers of two, or one a rank."""
        tokens, start = self.start.pack_tokens * self.start.num_rows, self.start.num_rows
        counts = {self.num_ranks, *(start << n for n in range(1, 6)), *(start >> n for n in range(1, 6))}
        return sorted(
            count
            for count in counts
            if count and count % self.num_ranks == 0 and tokens % count == 0
            if self.min_pack_tokens <= tokens // count <= self.max_pack_tokens
        )

    def _cut(self, setting: Setting, num_rows: int) -> Setting:
        pack_tokens = self.start.pack_tokens * self.start.num_rows // num_rows
        workers = setting.num_workers and math.gcd(setting.num_workers, num_rows // self.num_ranks)
        return setting._replace(pack_tokens=pack_tokens, num_rows=num_rows, num_workers=workers)

    def _at_stage(self, setting: Setting, stage: int) -> Setting:
        """Only the keys that every stage has are taken along, and those of the new stage begin as they are shipped."""
        shared = {key: value for key, value in setting.zero.items() if key in _SHARED}
        return self._fitted(setting, {"stage": stage, **(_OF_STAGE_3 if stage == 3 else _OF_STAGES_1_2), **shared})

    def _fitted(self, setting: Setting, zero: dict[str, Any]) -> Setting:
        """`setting` with this ZeRO section; keys that are None are left out. Either Adam runs with offload."""
        zero = {key: value for key, value in zero.items() if value is not None}
        return setting._replace(deepspeed=_canonical({**setting.tree, "zero_optimization": zero}))

    def _other_adam(self, setting: Setting) -> list[Setting]:
        tree = setting.tree
        optimizer = {"type": "AdamW", **tree.get("optimizer", {})}
        params = dict(optimizer.get("params", {}))
        is_torch = bool(params.pop("torch_adam", False))
        if optimizer["type"] not in ("Adam", "AdamW") or (is_torch and not self.can_build):
            return []
        if not is_torch:
            params["torch_adam"] = True
        other = {**tree, "optimizer": {**optimizer, "params": params}}
        return [setting._replace(deepspeed=_canonical(other))]


def _distinct(settings: Sequence[Setting], known: Sequence[Setting]) -> list[Setting]:
    return [setting for setting in dict.fromkeys(settings) if setting not in known]


class Lengths(NamedTuple):
    """What documents look like beside the start's packs."""

    longest: int  # tokens, of those that the start takes whole
    num_longer: int  # documents that are longer than a pack of the start
    num_read: int
    is_all: bool  # every document was read


def read_lengths(config: Config, seconds: float = 10.0) -> Lengths:
    """Lengths of the training documents, in blocks drawn at random until the time is over."""
    vocab = Vocab.load(config.data.tokenizer)
    opened = open_sources([source.source() for source in config.data.train], vocab)
    blocks = [(item.split, first) for item in opened for first in range(0, len(item.split), _BLOCK)]
    Random(config.seed).shuffle(blocks)
    deadline, longest, num_longer, num_read = time.monotonic() + seconds, 0, 0, 0
    num_blocks = 0
    for split, first in blocks:
        if num_blocks and time.monotonic() > deadline:
            break
        num_blocks += 1
        for sample in range(first, min(first + _BLOCK, len(split))):
            document = split.read(sample)
            encoded = document if isinstance(document, Rejected) else encode(document, vocab)
            if isinstance(encoded, Rejected):
                continue
            num_read += 1
            if len(encoded) > config.data.pack_tokens:
                num_longer += 1
            else:
                longest = max(longest, len(encoded))
    return Lengths(longest, num_longer, num_read, num_blocks == len(blocks))
