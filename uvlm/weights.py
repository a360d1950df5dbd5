"""What each weight starts from: drawn, or read from a folder of safetensors; and how weights get into such a folder.
One module, or one file, at a time, so that under ZeRO-3 no process ever holds the whole model.

Inside `deepspeed.zero.Init` a module's weights are spread over the ranks as soon as it is made, and whatever draws them
afterwards sees empty tensors: the model keeps torch's defaults, and the first loss is 248 instead of ln V = 7.6 (run).
So values are given here, after construction: the weights of one module are gathered, rank 0 writes them, and they are
spread again. What is drawn depends on (seed, name of the module) alone, so it is the same on any number of ranks.

Cost (run, two ranks on two cores): 1.5 s for 100M drawn weights.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from uvlm.model import UnifiedVLM

IMAGE_PROJECTIONS = "image_projections.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
# Given weights, a context in which they are whole; its value says whether this process is the one that writes them.
Gathered = Callable[[Sequence[nn.Parameter]], AbstractContextManager[bool]]


@contextlib.contextmanager
def _here(parameters: Sequence[nn.Parameter]) -> Iterator[bool]:
    """All weights are whole and this process's own."""
    yield True


class Weights:
    """The weights of a Hugging Face folder by name, read one at a time. Only safetensors are read."""

    def __init__(self, folder: Path) -> None:
        """ValueError where the folder holds none, or they cannot be read."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        with self._sentence():
            for path in self._paths():
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # a file is no mapping
                        self._files[name] = path
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def _paths(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            # Only files of this folder, whatever the index says.
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        own_projections = self.folder / IMAGE_PROJECTIONS
        return [self.folder / name for name in names] + [own_projections] * own_projections.exists()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        with self._sentence(), safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    @contextlib.contextmanager
    def _sentence(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"model.init_from={self.folder} cannot be read; it needs the weights of its config.json as safetensors "
                f"({reason})"
            ) from error


def write_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor | None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """model.safetensors, or several of at most `max_shard_bytes` and their index: one at a time is in memory.

    Args:
        shapes: by name, what is to be written.
        read: gives one tensor; it is called once for each name, in an order that `shapes` alone decides. Where it gives
            None, in ranks that only help with reading, nothing is written.
    """
    empty = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_bytes)
    is_writer = False
    for file_name, names in split.filename_to_tensors.items():
        tensors = {name: read(name) for name in names}
        shard = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items() if tensor is not None}
        is_writer = bool(shard)
        if is_writer:
            save_file(shard, folder / file_name, {"format": "pt"})
    if is_writer and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


class Filled(NamedTuple):
    """What was done: tensors read, tensors drawn, words that a folder's vocabulary did not have, image projections
    that were read and that began as copies."""

    num_read: int = 0
    num_drawn: int = 0
    num_new_words: int = 0
    num_projections_read: int = 0
    num_projections_copied: int = 0

    def sentence(self, folder: Path | None) -> str:
        """What is carried over and what is not."""
        if folder is None:
            return f"{self.num_drawn} weights drawn anew"
        parts = [f"{self.num_read} weights read from {folder}"]
        if self.num_new_words:
            parts.append(
                f"{self.num_new_words:,} new words at the end of its vocabulary, drawn around the mean of the old"
            )
        if self.num_projections_read:
            parts.append(f"{self.num_projections_read} weights of image projections read")
        if self.num_projections_copied:
            parts.append(
                f"{self.num_projections_copied} weights of image projections begin as copies of the shared ones"
            )
        return "; ".join([*parts, "optimizer, schedule and place in the data begin anew"])


def check_weights(model: UnifiedVLM, weights: Weights) -> None:
    """ValueError where a folder lacks weights of a model (which may be on the meta device), has others of their names,
    or has image projections that the model's policy does not have."""
    backbone: nn.Module = model.backbone
    vocabulary = _vocabulary(model.backbone)
    missing = [name for name, _ in backbone.named_parameters() if name not in weights]
    if missing:  # they would be drawn at random
        raise ValueError(
            f"model.init_from={weights.folder} lacks {len(missing)} of its weights: {sorted(missing)[0]}, ...; "
            "save it again with its weights and config.json from one model"
        )
    for name, parameter in backbone.named_parameters():
        found, expected = weights.shape(name), tuple(parameter.shape)
        if found != expected and not (name in vocabulary and found[0] < expected[0] and found[1:] == expected[1:]):
            raise ValueError(
                f"model.init_from={weights.folder} cannot be read; it needs the weights of its config.json: {name} has "
                f"shape {found}, by config.json it is {expected}"
            )
    own = {name: tuple(p.shape) for name, p in model.image_projections.named_parameters()}
    others = {name: weights.shape(name) for name in weights if _is_projection(name)}
    if others and others != own:
        raise ValueError(
            f"model.init_from={weights.folder} has image projections of its own, which are not those of this policy; "
            f"give the policy it was trained with, or remove its {IMAGE_PROJECTIONS}"
        )


def fill(model: UnifiedVLM, seed: int, weights: Weights | None = None, gathered: Gathered = _here) -> Filled:
    """Give every weight of a model the value it starts from.

    Args:
        seed: of what is drawn.
        weights: a folder that `check_weights` has found to fit; all weights are drawn where there is none.
        gathered: how weights become whole; every rank goes through the same modules in the same order.
    """
    counts = dict.fromkeys(Filled._fields, 0)
    with torch.no_grad():
        _fill_backbone(model.backbone, seed, weights, gathered, counts)
        _fill_projections(model, weights, gathered, counts)
    return Filled(**counts)


def _fill_backbone(
    backbone: PreTrainedModel, seed: int, weights: Weights | None, gathered: Gathered, counts: dict[str, int]
) -> None:
    seen: set[int] = set()  # tied weights come by twice
    for module_name, module in backbone.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if not own:
            continue
        with gathered(list(own.values())) as is_writer:
            if is_writer and weights is None:
                _draw(backbone, module, f"{seed} {module_name}")
            elif is_writer and weights is not None:
                for name, parameter in own.items():
                    old = weights.read(f"{module_name}.{name}")
                    parameter[: len(old)].copy_(old)
                    if num_new := len(parameter) - len(old):
                        parameter[len(old) :].copy_(_new_words(old, num_new, f"{seed} {module_name}"))
                        counts["num_new_words"] = num_new
        counts["num_drawn" if weights is None else "num_read"] += len(own)


def _fill_projections(model: UnifiedVLM, weights: Weights | None, gathered: Gathered, counts: dict[str, int]) -> None:
    for number, projections in enumerate(model.image_projections):
        attention = model.backbone.model.layers[number].self_attn
        for key, module in projections.items():  # type: ignore[operator]  # a ModuleDict
            shared = dict(getattr(attention, f"{key[-1]}_proj").named_parameters())
            for name, parameter in module.named_parameters():
                full_name = f"{number}.{key}.{name}"
                is_read = weights is not None and full_name in weights
                with gathered([parameter, shared[name]]) as is_writer:
                    if is_writer:
                        parameter.copy_(weights.read(full_name) if weights and is_read else shared[name])
                counts["num_projections_read" if is_read else "num_projections_copied"] += 1


def _draw(backbone: PreTrainedModel, module: nn.Module, name: str) -> None:
    """The first values of a module's weights, as its family in `transformers` draws them, from (seed, name) alone."""
    with _generator(name, next(module.parameters(recurse=False)).device):
        backbone._init_weights(module)


def _new_words(old_VD: torch.Tensor, num_new: int, name: str) -> torch.Tensor:
    """Rows of a normal distribution around the mean of the old ones with 1e-9 of their covariance, as `transformers`
    enlarges a vocabulary (https://nlp.stanford.edu/~johnhew/vocab-expansion.html says why); here without a matrix
    factorisation: if z is standard normal, centred.T @ z / sqrt(V) has the covariance of the old rows."""
    old_VD = old_VD.float()
    mean_D = old_VD.mean(dim=0)
    with _generator(name, old_VD.device):
        z_NV = torch.randn(num_new, len(old_VD))
    return mean_D + (1e-9 / len(old_VD)) ** 0.5 * (z_NV @ (old_VD - mean_D))


@contextlib.contextmanager
def _generator(name: str, device: torch.device) -> Iterator[None]:
    """torch's global generators, seeded by a name; as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
        yield


def _vocabulary(backbone: Any) -> set[str]:
    """Names of the weights with a row for each word."""
    tables = {id(backbone.get_input_embeddings().weight), id(backbone.get_output_embeddings().weight)}
    return {name for name, parameter in backbone.named_parameters() if id(parameter) in tables}


def _is_projection(name: str) -> bool:
    return name.partition(".")[0].isdigit()


def freeze(model: UnifiedVLM, patterns: Sequence[str]) -> int:
    """Take the weights that match a pattern of `fnmatch` out of training; returns how many numbers these are.

    Names are those of the exported model and, for image projections, `image_projections.LAYER.KIND_PROJECTION.weight`.

    ValueError where a pattern matches nothing, with the nearest name.
    """
    named = {name.removeprefix("backbone."): parameter for name, parameter in model.named_parameters()}
    for pattern in patterns:
        if not (matching := fnmatch.filter(named, pattern)):
            nearest = difflib.get_close_matches(pattern, named, n=1, cutoff=0.0)
            raise ValueError(f"model.freeze: no weight has the name {pattern!r}; the nearest is {nearest[0]!r}")
        for name in matching:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"model.freeze={list(patterns)} leaves nothing to train; take a pattern out")
    return sum(getattr(p, "ds_numel", p.numel()) for p in named.values() if not p.requires_grad)
