"""What machines can do, as their makers publish it; of this machine, as measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import NamedTuple

import psutil
import torch


class Hardware(NamedTuple):
    """One rank's share of a machine.

    memory: bytes. flops: dense bf16 FLOP/s at the peak. bandwidth: bytes/s of its memory. node_bandwidth,
    network_bandwidth: bytes/s that it sends to others in the node and beyond. bus: bytes/s to the host's memory.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    bus: float
    is_gpu: bool = True


# Data sheets: https://www.nvidia.com/en-us/data-center/a100/ (SXM 80 GB), .../h100/ (SXM), .../h200/, and
# https://www.nvidia.com/en-us/data-center/hgx/ (B200). NVLink one way is half of what they print. The network is that
# of the maker's own nodes: a card of 200 Gbit/s a GPU for A100, of 400 Gbit/s for the others; PCIe 4 and 5 one way.
HARDWARE = {
    "a100": Hardware("A100", 80 * 10**9, 312e12, 2.04e12, 300e9, 25e9, 32e9),
    "h100": Hardware("H100", 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9, 64e9),
    "h200": Hardware("H200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
    "b200": Hardware("B200", 180 * 10**9, 2250e12, 7.7e12, 900e9, 50e9, 64e9),
}
THIS = "this"


def find_hardware(name: str) -> Hardware | None:
    """By its name in HARDWARE; None for THIS. ValueError with the names where there is none."""
    if name == THIS:
        return None
    if name.lower() not in HARDWARE:
        raise ValueError(f"there is no hardware {name!r}; use {', '.join(HARDWARE)} or {THIS}")
    return HARDWARE[name.lower()]


def this_machine(num_ranks: int = 1) -> Hardware:
    """This machine's CPUs, shared by `num_ranks`, which talk through memory, as an offloaded optimizer does."""
    flops, bandwidth = _speeds()
    cores = max(1, len(os.sched_getaffinity(0)) / num_ranks)
    shared = bandwidth / max(1, num_ranks / 2)
    memory = psutil.virtual_memory().total // num_ranks
    return Hardware("this machine", memory, cores * flops, shared, shared / 4, shared / 4, shared, False)


@cache
def _speeds() -> tuple[float, float]:
    """FLOP/s of a core in bf16 matrix products, and bytes/s of copies in memory; timed for 0.2 s."""
    size = 512
    left, right = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    # With one thread, as each of many ranks has it; cores are multiplied, caches are not.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _median_seconds(lambda: left @ right)
        block = torch.zeros(8 * 2**20)
        copy_seconds = _median_seconds(lambda: block.clone())
    finally:
        torch.set_num_threads(num_threads)
    return 2 * size**3 / seconds, 2 * block.nbytes / copy_seconds


def _median_seconds(function: Callable[[], object], seconds: float = 0.1) -> float:
    function()
    times: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 3:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return median(times)
