"""A run before it runs: memory of a rank, FLOPs, communication, checkpoint and time of a step, for any world size.

Nothing is built and no process group is started: shapes come from the meta device, activations from a pass without data
(memory_plan.py), FLOPs from the token plans of real packs (flops.py), what crosses the wire from the rules of ZeRO.

How sure it is: parameters, gradients, optimizer and activations within 0.1% of real ranks on a CPU, and the sum of all
at most 11% above (benchmarks/memory_plan.py: ZeRO-2 and ZeRO-3). Once each, on two ranks: with stage 1, hpz, offload to
the CPU, or fp32 accumulation under stage 2, the sum was 11 to 15% too high (run). FLOPs are exact (tests/test_plan.py).
Time is an estimate from published peaks and the shares of them below; no GPU has been measured, so trust the order of
two settings more than the seconds. The sentences of `SURENESS` say so to the user.

Legend: W ranks, P parameters, D bytes of a weight, C of a gradient on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from uvlm.config import Config
from uvlm.deepspeed_config import read_deepspeed_json, resolve
from uvlm.flops import MODULES, Widths, dense_flops, flops
from uvlm.hardware import Hardware, this_machine
from uvlm.memory_plan import Activations, Memory, meta_model, plan_memory, shapes_of, trace
from uvlm.sample import Sample, take_sample
from uvlm.token_plan import TokenPlan
from uvlm.window import num_useful_tokens
from uvlm.zero_memory import Shapes, offload_device, persistent, weight_bytes, wire_bytes, zero_of

# Shares of a published peak that large jobs reach: a transformer's passes while nothing else is waited for (published
# bests of packed training at 7B are 0.35-0.40 of the peak in all), links under NCCL, memory.
_OF_FLOPS, _OF_LINK, _OF_MEMORY = 0.5, 0.7, 0.8
_UPDATE_TRAFFIC = 34  # bytes of memory traffic that AdamW moves for a parameter: 16 in, 14 out, and the gradient's copy
_MOMENTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of a run; policies may change over it
_LONGEST_ON_CPU = 2048  # tokens
RUNTIME = 2 * 10**9  # bytes of a GPU that CUDA, NCCL and a fragmented allocator take; assumed
SURENESS = (
    "Parameters, gradients, optimizer and activations were within 0.1% of real ranks on a CPU, the sum up to 11% high "
    "with ZeRO-2 and ZeRO-3 (benchmarks/memory_plan.py), up to 15% with stage 1, hpz or the optimizer offloaded.",
    "FLOPs are counted from the token plans of packs and equal what PyTorch counts.",
    "Times are estimates: 50% of the peak in matrix products, 70% of each link; no GPU was measured, and quantized "
    "traffic is not counted as smaller. Trust which of two settings is faster more than how fast.",
)


class Flow(NamedTuple):
    """Bytes that a rank sends (and receives) in an optimizer step: of weights among all ranks, of gradients, and of
    weights within its group of hpz."""

    gather: int
    reduce: int
    inside: int = 0

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Plan:
    """A run at one world size.

    num_rows: data.num_rows, raised where the ranks would not divide it. flops: of an optimizer step over all ranks, as
    the model needs them; executed_flops: with what recomputation does again; dense_flops: with every token everywhere.
    flops_per_token: by task, of its documents. checkpoint_bytes: of one checkpoint, all ranks together. mfu: model
    FLOP/s over the peak. tokens_per_second: of documents, all ranks. memory_limit: bytes of a GPU.
    """

    num_ranks: int
    gpus_per_node: int
    num_rows: int
    num_parameters: int
    memory: Memory
    memory_limit: int
    flops: int
    dense_flops: int
    executed_flops: int
    flops_per_token: dict[str, float]
    communication: Flow
    checkpoint_bytes: int
    step_seconds: float
    mfu: float
    tokens_per_second: float
    hardware: Hardware

    @property
    def needed(self) -> int:
        """Bytes of a GPU that the run takes, with what the runtime keeps for itself; on a CPU tensors alone."""
        return self.memory.total + (RUNTIME if self.hardware.is_gpu else 0)

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory_limit


def remedy(recompute: str) -> str:
    """What to try where a run does not fit, the cheapest first."""
    stronger = {"none": ["set recompute=selective", "recompute=full"], "selective": ["set recompute=full"], "full": []}
    words = [*stronger[recompute], "take more ranks", "set deepspeed=zero3_offload.json", "lower data.pack_tokens"]
    return f"{', '.join(words[:-1])} or {words[-1]}, as `uvlm plan` shows what each saves"


class Work(NamedTuple):
    """Of one row on average: FLOPs, those done again by each way of recomputing, tokens of documents, and by task the
    FLOPs of one of its tokens."""

    flops: float
    dense_flops: float
    again: dict[str, float]
    tokens: float
    flops_per_token: dict[str, float]


def plan_run(
    config: Config,
    num_ranks: int,
    gpus_per_node: int = 8,
    hardware: Hardware | None = None,
    gpu_memory: int | None = None,
) -> Plan:
    """The plan of one world size; `Planner` makes several for the price of one.

    Args:
        hardware: this machine's CPUs where none is given, which takes 0.2 s to measure.
        gpu_memory: bytes of a GPU, where it is not the hardware's.
    """
    return Planner(config, hardware, gpu_memory).at(num_ranks, gpus_per_node)


class Planner:
    """What is the same for all world sizes: the model's shapes, a sample of the data, a traced pass.

    ValueError where the DeepSpeed JSON is refused or a GPU model's head counts do not divide.
    """

    def __init__(
        self,
        config: Config,
        hardware: Hardware | None = None,
        gpu_memory: int | None = None,
        sample: Sample | None = None,
    ) -> None:
        self.config = config
        self.hardware = hardware
        self.gpu_memory = gpu_memory
        self.sample = sample or take_sample(config)
        self.json = read_deepspeed_json(config.deepspeed)
        resolve(self.json, config, 1)  # whatever is refused is refused here
        model = meta_model(config, self.sample.vocab_size)
        self.shapes = shapes_of(model, config)
        self.work = count_work(config, Widths.of(model.backbone.config), self.sample.packs, _MOMENTS)
        self.made = self.made_with(config)

    def made_with(self, config: Config) -> Activations:
        """Activations of a config that differs in `recompute` alone."""
        is_cpu = self.hardware is None or not self.hardware.is_gpu
        # A CPU's attention is a loop over blocks of the pack; of packs that nobody trains there it would take minutes.
        device = "cpu" if is_cpu and config.data.pack_tokens <= _LONGEST_ON_CPU else "cuda"
        return trace(config, self.sample.vocab_size, self.sample.packs, device)

    def with_json(self, config: Config, tree: dict[str, Any]) -> Planner:
        """For the same model, packs and recomputation, another DeepSpeed JSON, or another number of rows."""
        other = copy(self)
        other.config, other.json = config, tree
        return other

    def at(self, num_ranks: int, gpus_per_node: int = 8) -> Plan:
        """The plan at a world size."""
        config = self.config
        hardware = self.hardware or this_machine(num_ranks)
        num_rows = -(-config.data.num_rows // num_ranks) * num_ranks
        accumulation = num_rows // num_ranks
        data = config.data.model_copy(update={"num_rows": num_rows})
        tree = resolve(self.json, config.model_copy(update={"data": data}), num_ranks)
        memory = plan_memory(self.shapes, tree, num_ranks, accumulation, self.made)
        flow = communication(self.shapes, tree, num_ranks, accumulation)
        of_step = self.work.flops * num_rows
        executed = of_step + self.work.again[config.recompute] * num_rows
        seconds = _step_seconds(self.shapes, tree, hardware, executed, flow, num_ranks, gpus_per_node)
        size = weight_bytes(tree)
        return Plan(
            num_ranks=num_ranks,
            gpus_per_node=gpus_per_node,
            num_rows=num_rows,
            num_parameters=sum(self.shapes.all),
            memory=memory,
            memory_limit=self.gpu_memory or hardware.memory,
            flops=round(of_step),
            dense_flops=round(self.work.dense_flops * num_rows),
            executed_flops=round(executed),
            flops_per_token=self.work.flops_per_token,
            communication=flow,
            checkpoint_bytes=12 * sum(self.shapes.trained) + size * sum(self.shapes.all),
            step_seconds=seconds,
            mfu=of_step / (num_ranks * hardware.flops * seconds),
            tokens_per_second=self.work.tokens * num_rows / seconds,
            hardware=hardware,
        )


def count_work(config: Config, widths: Widths, packs: Sequence[Pack], moments: Sequence[float]) -> Work:
    """FLOPs of packs by their token plans: the mean of a pack, and of moments of the run (shares that are done)."""
    by_task, tokens_by_task = dict.fromkeys(TASKS, 0.0), dict.fromkeys(TASKS, 0)
    total, dense, again_full, again_ffn = 0, 0, 0, 0
    for pack, progress in product(packs, moments):
        plan = TokenPlan.of(pack, config.policy, config.model.num_layers, config.seed, progress)
        counted = flops(plan, widths)
        total, dense = total + counted.total, dense + dense_flops(plan, widths)
        # Recomputation ends with the last tensor that is needed, before the last of the FFN's three products.
        ffn = int(counted.forward[..., MODULES.index("ffn")].sum())
        again_full += int(counted.forward[:-1].sum()) - ffn // 3
        again_ffn += ffn - ffn // 3
        lengths = pack.cu_seqlens.diff()
        for number, task in enumerate(TASKS):
            by_task[task] += int(counted.by_task()[number])
            tokens_by_task[task] += int(lengths[pack.doc_task == number].sum())
    num_passes = len(packs) * len(moments)
    return Work(
        flops=total / num_passes,
        again={"none": 0.0, "selective": again_ffn / num_passes, "full": again_full / num_passes},
        dense_flops=dense / num_passes,
        tokens=sum(num_useful_tokens(pack) for pack in packs) / len(packs),
        flops_per_token={task: by_task[task] / tokens for task, tokens in tokens_by_task.items() if tokens},
    )


def communication(shapes: Shapes, tree: dict[str, Any], world_size: int, accumulation: int) -> Flow:
    """What a rank sends in a step, by rings: (W - 1) / W of a gather or a scatter, twice that of an all-reduce.

    Stage 3 gathers weights in each micro-step: once where all may stay from the forward to the backward pass, twice
    where they may not, the second time within the groups of hpz if there are such. It scatters gradients in each. Stage
    2 reduces them in each, stage 1 at the end of the window, and both gather updated weights once.
    """
    zero = zero_of(tree)
    share = (world_size - 1) / world_size
    size, wire = weight_bytes(tree), wire_bytes(tree)
    trained = sum(shapes.trained)
    if zero["stage"] == 3:
        whole = sum(persistent(shapes, zero))
        num_elements = sum(shapes.all) - whole
        stay = num_elements <= min(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"])
        once, reduce = size * num_elements * accumulation, round(share * wire * trained * accumulation)
        group = min(zero["zero_hpz_partition_size"], world_size)
        if group > 1:
            return Flow(round(share * (once + size * whole)), reduce, 0 if stay else round((group - 1) / group * once))
        return Flow(round(share * (once * (1 if stay else 2) + size * whole)), reduce)
    times = accumulation if zero["stage"] == 2 else 1
    return Flow(round(share * size * trained), round(2 * share * wire * trained * times))


def _step_seconds(
    shapes: Shapes,
    tree: dict[str, Any],
    hardware: Hardware,
    executed: float,
    flow: Flow,
    num_ranks: int,
    gpus_per_node: int,
) -> float:
    zero = zero_of(tree)
    compute = executed / (num_ranks * hardware.flops * _OF_FLOPS)
    link = hardware.node_bandwidth
    if num_ranks > gpus_per_node:  # what a node lacks comes in once, over the network cards of all its GPUs
        link = min(link, gpus_per_node * hardware.network_bandwidth)
    among_all = (flow.gather + flow.reduce) / link
    talk = (among_all + flow.inside / hardware.node_bandwidth) / _OF_LINK if num_ranks > 1 else 0.0
    own = sum(shapes.trained) / num_ranks
    update = own * _UPDATE_TRAFFIC / (hardware.bandwidth * _OF_MEMORY)
    if offload_device(zero, "optimizer") != "none":
        # Gradients go to the host and weights come back; there a core's memory is shared by the node's ranks.
        update = own * (6 / hardware.bus + _UPDATE_TRAFFIC / (200e9 / min(num_ranks, gpus_per_node)))
    if offload_device(zero, "param") != "none":
        talk += 2 * weight_bytes(tree) * sum(shapes.all) / num_ranks / hardware.bus
    hidden = zero["overlap_comm"] and hardware.is_gpu
    return (max(compute, talk) if hidden else compute + talk) + update
