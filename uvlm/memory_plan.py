"""Memory of one rank, predicted by part before anything is built.

Weights, gradients, optimizer and buckets are arithmetic (zero_memory.py) over the shapes of a model on the meta
device. What a forward and backward pass keeps is not arithmetic but the pass itself, run on tensors without data
(`trace`): the very code that trains, with the token plan of a real pack, so token roles, recomputation and a change of
the model are in it. On a CPU it runs on fake tensors; for a GPU on the meta device, where attention keeps what
flash-attn keeps.
benchmarks/memory_plan.py holds both against real ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from data_pipeline.packing import Pack
from uvlm import attention, head
from uvlm.backbone import DTYPES, build_backbone
from uvlm.config import Config
from uvlm.live_memory import ALL, LiveMemory
from uvlm.model import UnifiedVLM
from uvlm.optim import parameter_groups
from uvlm.token_plan import TokenPlan
from uvlm.weights import freeze
from uvlm.zero_memory import Shapes, zero_memory

# Whose allocations these are, by the file that asks; all others are activations.
_PARTS = {attention.__file__: "workspace", head.__file__: "logits"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one with the most: each part at its own peak, and the peak of their sum.

    parameters: shards, or whole weights, and those that stay on every rank. gradients: what is kept of them between
    micro-steps, and the fp32 copy at a step. optimizer: the fp32 weights, Adam's moments, what an update makes.
    buffers: buckets and gathered layers. activations: of a micro-step, without logits and what attention makes
    (workspace). host: what offload has moved off the device, in the memory of the rank's node.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    workspace: int
    total: int
    host: int = 0


class Activations(NamedTuple):
    """What a micro-step makes, in bytes at the peak: of each kind by itself, and of all together."""

    activations: int
    logits: int
    workspace: int
    together: int


def plan_memory(shapes: Shapes, tree: dict[str, Any], world_size: int, accumulation: int, made: Activations) -> Memory:
    """Parts and peak of one rank.

    Args:
        shapes: of `shapes_of`. made: of `trace`.
        tree: the complete DeepSpeed config.
    """
    zero = zero_memory(shapes, tree, world_size, accumulation)
    always = zero.parameters + zero.optimizer - zero.update
    passing = zero.pass_gradients + zero.buffers + made.together
    updating = zero.step_gradients + zero.idle_buffers + zero.update
    return Memory(
        parameters=zero.parameters,
        gradients=max(zero.pass_gradients, zero.step_gradients),
        optimizer=zero.optimizer,
        buffers=zero.buffers,
        activations=made.activations,
        logits=made.logits,
        workspace=made.workspace,
        total=always + max(passing, updating),
        host=zero.host,
    )


def shapes_of(model: UnifiedVLM, config: Config) -> Shapes:
    """Numbers of elements by group of the optimizer."""
    groups = [[weight.numel() for weight in group["params"]] for group in parameter_groups(model, config.optim)]
    return Shapes(groups, [weight.numel() for weight in model.parameters() if not weight.requires_grad])


def meta_model(config: Config, vocab_size: int) -> UnifiedVLM:
    """The model of a run on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return _model(config, vocab_size)


def _model(config: Config, vocab_size: int) -> UnifiedVLM:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        backbone = build_backbone(config.model, vocab_size, DTYPES[config.dtype])
        backbone.tie_weights()
        model = UnifiedVLM(backbone, config.policy, config.recompute)
    freeze(model, config.model.freeze)
    return model


def trace(config: Config, vocab_size: int, packs: Sequence[Pack], device: str) -> Activations:
    """Run the heaviest pack's forward and backward pass without data, and see what it keeps.

    Policies may change over a run: the pack is taken as it is at the beginning, or at the end where that is heavier.

    Args:
        device: "cpu" for what a CPU makes, "cuda" for a GPU.
    """
    num_layers = config.model.num_layers
    plan, pack, progress = max(
        ((_plan(config, pack, num_layers, progress), pack, progress) for pack in packs for progress in (0.0, _END)),
        key=lambda each: (each[0].query_share, len(each[0].supervised)),
    )
    own = config.policy.own_projections(num_layers)
    if num_layers <= _ENOUGH or len(plan.spans) > 1 or any(names != own[0] for names in own):
        return _trace(config, vocab_size, pack, plan, device)
    # Layers are all alike: each takes what the last of a few takes.
    shorter = (_plan(config, pack, number, progress) for number in (_ENOUGH - 1, _ENOUGH))
    few, more = (_trace(config, vocab_size, pack, plan, device) for plan in shorter)
    return Activations(*(a + (num_layers - _ENOUGH + 1) * (b - a) for a, b in zip(few, more, strict=True)))


_ENOUGH = 4  # layers
_END = 1 - 1e-9  # progress of the last step


def _plan(config: Config, pack: Pack, num_layers: int, progress: float) -> TokenPlan:
    return TokenPlan.of(pack, config.policy, num_layers, config.seed, progress)


def _trace(config: Config, vocab_size: int, pack: Pack, plan: TokenPlan, device: str) -> Activations:
    """One pass through the layers that the plan has, which may be fewer than the model's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracing: Any
    if device == "cpu":  # there pack and plan stay real, as their numbers decide shapes
        place, tracing = torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True)
    else:
        place = tracing = torch.device("meta")
        pack, plan = pack.to(place), plan.to(place)
    with tracing:
        model = _model(config, vocab_size)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop)
        live = LiveMemory(place.type, _part)
        live.claim("weights", model.parameters())
        weights = live.now()[ALL]
        with live, live.phase("pass"):
            loss, *_ = model(pack, plan, torch.zeros(len(plan.supervised), device=place))
            loss.backward()
    peaks = live.peaks()["pass"]
    parts = {part: peaks.get(part, 0) for part in ("activations", "logits", "workspace")}
    return Activations(**parts, together=peaks[ALL] - weights)


def _drop(weight: torch.Tensor) -> None:
    """Where a gradient has arrived DeepSpeed takes it into a bucket; those are counted by arithmetic."""
    weight.grad = None


def _part(operation: str, new: list[torch.Tensor]) -> str:
    """By the file in which an operation was asked for: its own frames are on top of the stack."""
    frame: Any = sys._getframe(3)
    for _ in range(12):
        if frame is None:
            break
        if part := _PARTS.get(frame.f_code.co_filename):
            return part
        frame = frame.f_back
    return "activations"
