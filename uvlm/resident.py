"""How much of the machine's memory this process has taken, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def peak_resident_bytes() -> int:
    """Most bytes at once since this program began: getrusage would also tell those of the program before an exec."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
