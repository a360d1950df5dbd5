"""What DeepSpeed's ZeRO keeps of a model on one rank: arithmetic over shapes and the JSON, no tensor is made.

The rules were read from DeepSpeed 0.19.8 (runtime/zero/stage3.py, stage_1_and_2.py, partition_parameters.py and
partitioned_param_coordinator.py); benchmarks/memory_plan.py holds them against real ranks.

Legend: W ranks, P parameters, n of them on a rank, D bytes of a weight, G of a gradient that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from uvlm import deepspeed_schema as schema

_MASTER_AND_MOMENTS = 12  # bytes of a parameter: the fp32 copy and Adam's two moments
_UPDATE = 8  # bytes of a parameter of a group that PyTorch's AdamW makes on the way: a root and its quotient
_BYTES = {"bf16": 2, "bfp16": 2, "fp16": 2, "fp32": 4}


class Shapes(NamedTuple):
    """Numbers of elements: of the trained weights by group of the optimizer, in its order, and of the frozen ones."""

    groups: Sequence[Sequence[int]]
    frozen: Sequence[int]

    @property
    def trained(self) -> list[int]:
        return [numel for group in self.groups for numel in group]

    @property
    def all(self) -> list[int]:
        return [*self.trained, *self.frozen]


class ZeroMemory(NamedTuple):
    """Bytes of one rank, the one with the most, while it trains; each part at its own peak.

    pass_gradients, step_gradients: what is kept of gradients at the end of a backward pass, and at a step, where the
        optimizer's own dtype is a copy. update: the share of `optimizer` that lives only at a step.
    idle_buffers: the share of `buffers` that lives at a step too. host: what offload has moved to the node.
    """

    parameters: int
    pass_gradients: int
    step_gradients: int
    optimizer: int
    update: int
    buffers: int
    idle_buffers: int
    host: int


def zero_memory(shapes: Shapes, tree: dict[str, Any], world_size: int, accumulation: int) -> ZeroMemory:
    """Memory of a rank.

    Args:
        tree: a complete DeepSpeed config.
        accumulation: micro-steps of an optimizer step.
    """
    zero = zero_of(tree)
    rule = _stage_3 if zero["stage"] == 3 else _stages_1_and_2
    return rule(shapes, tree, zero, world_size, accumulation)


def zero_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The ZeRO section of a complete config, with DeepSpeed's own values of what it leaves out."""
    prefix = "zero_optimization"
    zero = {name: schema.default(f"{prefix}.{name}") for name in schema.known_keys(prefix)} | tree[prefix]
    if zero["overlap_comm"] is None:
        zero["overlap_comm"] = zero["stage"] == 3
    return zero


def bucket_bytes(tree: dict[str, Any]) -> int:
    """Of the buffers in which gradients are collected: one under stage 3, in the dtype of the wire; under 1 and 2 in
    that of the weights, and two where communication overlaps."""
    zero = zero_of(tree)
    if not zero["contiguous_gradients"]:
        return 0
    if zero["stage"] == 3:
        return wire_bytes(tree) * int(zero["reduce_bucket_size"])
    return weight_bytes(tree) * int(zero["reduce_bucket_size"]) * (2 if zero["overlap_comm"] else 1)


def weight_bytes(tree: dict[str, Any]) -> int:
    """D, by the dtype of training."""
    return 2 if tree["bf16"]["enabled"] or tree["fp16"]["enabled"] else 4


def wire_bytes(tree: dict[str, Any]) -> int:
    """Bytes of a gradient on the wire."""
    return _BYTES.get(tree.get("communication_data_type") or "", weight_bytes(tree))


def _kept_bytes(tree: dict[str, Any]) -> int:
    """G."""
    return _BYTES.get(tree.get("data_types", {}).get("grad_accum_dtype") or "", weight_bytes(tree))


def offload_device(zero: dict[str, Any], what: str) -> str:
    """Where offload puts the "optimizer" or the "param"s: none, cpu or nvme."""
    return str((zero.get(f"offload_{what}") or {}).get("device", "none"))


def persistent(shapes: Shapes, zero: dict[str, Any]) -> list[int]:
    """Weights that stage 3 keeps whole on every rank, as far as they fit into what it allows for all together."""
    whole: list[int] = []
    for numel in shapes.all:
        fits = sum(whole) + numel <= zero["stage3_model_persistence_threshold"]
        if fits and numel <= zero["stage3_param_persistence_threshold"]:
            whole.append(numel)
    return whole


def _stage_3(
    shapes: Shapes, tree: dict[str, Any], zero: dict[str, Any], world_size: int, accumulation: int
) -> ZeroMemory:
    size, kept, wire = weight_bytes(tree), _kept_bytes(tree), wire_bytes(tree)
    shard = sum(-(-numel // world_size) for numel in shapes.all)
    own = sum(-(-numel // world_size) for numel in shapes.trained)
    groups = [sum(-(-numel // world_size) for numel in group) for group in shapes.groups]
    largest = min(max(groups), max(zero["sub_group_size"], max(-(-numel // world_size) for numel in shapes.trained)))
    # Of one rank the shard is the whole; of many, a whole weight has each rank's share, which is rounded up.
    whole = sum(-(-numel // world_size) * world_size for numel in persistent(shapes, zero)) if world_size > 1 else 0
    # With the shipped reuse distance a weight of a model below a billion parameters stays from its first use to its
    # last; above, until so many are live. A gather has its result beside the parts it is put together from.
    gathered = min(sum(shapes.all) - whole, max(zero["stage3_max_live_parameters"], max(shapes.all)))
    part = min(gathered, max(zero["stage3_prefetch_bucket_size"], max(shapes.all))) if world_size > 1 else 0
    bucket = bucket_bytes(tree)
    # A bucket is sent as a copy in the order of ranks; a gradient larger than the bucket goes alone, in its own dtype.
    full = max(min(zero["reduce_bucket_size"], sum(shapes.trained)), max(shapes.trained))
    buffers = size * (gathered + part) + bucket + wire * full * (1 + (world_size > 1) / world_size)
    parameters, optimizer, gradients = size * (shard + whole), _MASTER_AND_MOMENTS * own, kept * own
    update, at_step = _UPDATE * largest, gradients + (4 + (kept if kept != 4 else 0)) * largest
    if zero["zero_hpz_partition_size"] > 1:
        parameters += size * sum(shapes.all) // min(zero["zero_hpz_partition_size"], world_size)
    host = 0
    if (device := offload_device(zero, "optimizer")) != "none":
        moved = (zero["offload_optimizer"] or {}).get("ratio", 1.0)  # the rest is updated on the device
        host = int(gradients + moved * 4 * own)  # the fp32 gradients of the CPU's Adam stay
        host += int(moved * optimizer) if device == "cpu" else 0
        optimizer, update = int((1 - moved) * optimizer), int((1 - moved) * update)
        gradients, at_step = 0, int((1 - moved) * 4 * largest)
    if (device := offload_device(zero, "param")) != "none":
        host += size * shard if device == "cpu" else 0
        parameters -= size * shard
    return ZeroMemory(
        parameters=parameters,
        pass_gradients=gradients,
        step_gradients=at_step,
        optimizer=optimizer + update,
        update=update,
        buffers=int(buffers),
        idle_buffers=bucket,
        host=host,
    )


def _stages_1_and_2(
    shapes: Shapes, tree: dict[str, Any], zero: dict[str, Any], world_size: int, accumulation: int
) -> ZeroMemory:
    size, kept, wire = weight_bytes(tree), _kept_bytes(tree), wire_bytes(tree)
    alignment = 2 * world_size  # elements: DeepSpeed aligns partitions to 4 bytes for NCCL
    padded = [-(-sum(group) // alignment) * alignment for group in shapes.groups]
    partitions = [numel // world_size for numel in padded]
    own, largest = sum(partitions), max(partitions)
    touched = max(
        sum(_touched(group, partition, rank) for group, partition in zip(shapes.groups, partitions, strict=True))
        for rank in range(world_size)
    )
    if zero["stage"] == 1:
        touched = sum(shapes.trained)  # gradients stay whole
    # Those of the window so far, and those of the micro-step that are added to them.
    gradients = size * touched * (2 if accumulation > 1 else 1) + (kept * own if kept != size else 0)
    update, at_step = _UPDATE * largest, size * touched + (4 + (size if size != 4 else 0)) * largest
    # A gradient is whole until it has been copied into a bucket; sums over ranks in another dtype are a copy.
    full = min(zero["reduce_bucket_size"], sum(shapes.trained))
    buffers = bucket_bytes(tree) + size * max(shapes.trained) + (wire * full if wire != size else 0)
    optimizer = _MASTER_AND_MOMENTS * own
    host = 0
    if offload_device(zero, "optimizer") != "none":
        host = optimizer + 4 * own + size * own
        # Stage 1 reduces at the end of the window alone, and keeps whole gradients on the device until then.
        gradients = gradients if zero["stage"] == 1 else 0
        optimizer = update = at_step = 0
    parameters = size * (sum(padded) + sum(shapes.frozen))
    return ZeroMemory(
        parameters=parameters,
        pass_gradients=gradients,
        step_gradients=at_step,
        optimizer=optimizer + update,
        update=update,
        buffers=int(buffers),
        idle_buffers=0,
        host=host,
    )


def _touched(group: Sequence[int], partition: int, rank: int) -> int:
    """Elements of all weights of a group of which a rank's partition holds at least one."""
    stops = accumulate(group)
    first, last = partition * rank, partition * (rank + 1)
    return sum(numel for numel, stop in zip(group, stops, strict=True) if stop > first and stop - numel < last)
