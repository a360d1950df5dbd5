"""A bounded cache of blocks of remote files on a node-local disk, for runs that read their data more than once.

Switched on by the environment, as it belongs to the machine and not to the run:

    UVLM_CACHE_DIR    a folder on a disk of the node; without it nothing is cached
    UVLM_CACHE_GB     its bound in units of 1e9 bytes, 20 if not given

A block is a file of its own: the bytes, then their CRC-32. It appears whole or not at all, so any number of processes
may share the folder; one that is damaged or short is fetched again. Any trouble with the disk (it is full, say) only
costs the caching. The oldest blocks are removed first.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SUFFIX = ".block"
CRC_BYTES = 4
# Whoever writes makes room before the first block, and each time it has written LOOK_AFTER of the bound, and then down
# to KEEP of it: with up to (1 - KEEP) / LOOK_AFTER = 64 processes on a node the bound holds at every moment.
LOOK_AFTER = 1 / 256
KEEP = 3 / 4


@dataclass
class BlockCache:
    folder: Path
    max_bytes: int
    _written: float = field(default=math.inf, compare=False)  # since room was last made: before the first block, never

    @classmethod
    def of_environment(cls) -> BlockCache | None:
        """ValueError where UVLM_CACHE_GB is no positive number or the folder cannot be made."""
        folder, gigabytes = os.environ.get("UVLM_CACHE_DIR"), os.environ.get("UVLM_CACHE_GB", "20")
        if not folder:
            return None
        try:
            max_bytes = int(float(gigabytes) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = 0
        if max_bytes <= 0:
            raise ValueError(f"UVLM_CACHE_GB={gigabytes!r} is no positive number; 20 would allow 20 GB")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"UVLM_CACHE_DIR={folder} cannot be used ({error}); name another folder") from None
        return cls(Path(folder), max_bytes)

    def read(self, name: str, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """The block `name`, from the disk if it is there and sound, otherwise from `fetch` and then kept."""
        path = self.folder / (name + SUFFIX)
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if len(content) == num_bytes + CRC_BYTES:
                block = content[:-CRC_BYTES]
                if zlib.crc32(block) == int.from_bytes(content[-CRC_BYTES:], "little"):
                    return block
        block = fetch()
        with contextlib.suppress(OSError):
            self._keep(path, block)
        return block

    def _keep(self, path: Path, block: bytes) -> None:
        num_bytes = len(block) + CRC_BYTES
        self._written += num_bytes
        if self._written > self.max_bytes * LOOK_AFTER:
            self._written = 0
            self._make_room(max(0, int(self.max_bytes * KEEP) - num_bytes))
        if num_bytes > self.max_bytes * KEEP:
            return
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp{SUFFIX}")
        try:
            with temporary.open("wb") as file:
                file.write(block)
                file.write(zlib.crc32(block).to_bytes(CRC_BYTES, "little"))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, num_bytes: int) -> None:
        """Removes the oldest blocks, and what killed processes left, until at most `num_bytes` remain."""
        blocks = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # another process makes room too
                        blocks.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in blocks)
        for _, size, place in sorted(blocks):
            if total <= num_bytes:
                break
            Path(place).unlink(missing_ok=True)
            total -= size
