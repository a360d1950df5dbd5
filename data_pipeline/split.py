"""A finished folder of shards, on a disk or behind a URL, read by sample index.

By index, because an exact resume needs random access and webdataset has no state. Behind a URL a request costs tens of
milliseconds however little it reads, so there `prefetch` is told what will be read next: samples that lie together in a
shard come by one request, in the background, and `read` takes them from memory (read_ahead.py, block_cache.py).

Cost of a document of five slots, two of them 63 kB JPEGs with 16x16 codes (run, one core): 38 us from the page cache,
27 us with `images=False`, 20 us from shards that hold no images. From an S3 server 50 ms away, prefetched 1,024 samples
ahead, 100 us from shards without images; with images the bandwidth decides (220 us at 590 MB/s).
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import read_ahead
from data_pipeline.block_cache import BlockCache
from data_pipeline.order import BLOCK
from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import Manifest, ShardInfo, load_index
from data_pipeline.storage import Folder
from data_pipeline.tar_sample import MAX_SAMPLE_BYTES, Members, read_members, too_large

NUM_INDEXES = 1024  # indexes of shards that a split keeps in one process, 8 bytes a sample
MAX_RUN_BYTES = 32 << 20  # about as much is asked for at once


class Split:
    """A finished folder of shards, read by global sample index. Works after a fork and after pickling."""

    def __init__(self, folder: Folder, manifest: Manifest, images: bool = True) -> None:
        """`open` checks first."""
        self.folder, self.manifest, self.images = folder, manifest, images
        self.shard_sizes: list[int] = [shard.samples for shard in manifest.shards]
        self._ends = list(accumulate(self.shard_sizes))
        shards = manifest.shards
        self._offsets = functools.lru_cache(maxsize=NUM_INDEXES)(lambda shard: load_index(folder, shards[shard]))
        self._identity = hash((folder.location, manifest.fingerprint, images))
        self._cache = BlockCache.of_environment() if folder.is_remote else None

    @classmethod
    def open(cls, location: Path | str, image_tokenizer: str | None = None, *, images: bool = True) -> Split:
        """Reads the manifest and checks that every shard is there with the size it should have.

        FileNotFoundError or ValueError names what is missing or wrong. Where `image_tokenizer` is given, codes of any
        other tokenizer are refused. With `images=False`, documents come without the bytes of images that have codes,
        which saves reading them.
        """
        folder = Folder.open(location)
        manifest = Manifest.load(folder)
        if image_tokenizer is not None and manifest.image_tokenizer != image_tokenizer:
            found = f"codes of image tokenizer {manifest.image_tokenizer}" if manifest.image_tokenizer else "no codes"
            raise ValueError(
                f"{folder} holds {found}, but {image_tokenizer} is wanted; make them with `uvlm data tokenize`"
            )
        sizes = folder.sizes()
        for info in manifest.shards:
            for name, size in info.file_sizes().items():
                if name not in sizes:
                    raise FileNotFoundError(f"{folder.place(name)} is missing; copy the folder again or make it again")
                if sizes[name] != size:
                    raise ValueError(
                        f"{folder.place(name)} has {sizes[name]} bytes and should have {size}; make the folder again"
                    )
        return cls(folder, manifest, images)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.manifest, self.images)

    def read(self, sample: int) -> Document | Rejected:
        """Reads a document. I/O errors are tried again, then raised; bad content comes back as Rejected."""
        members = read_ahead.of_process().take((self._identity, sample)) if self.folder.is_remote else None
        if members is None:
            members = self._members(sample)
        return members if isinstance(members, Rejected) else Document.from_members(*members)

    def prefetch(self, samples: np.ndarray | Sequence[int]) -> None:
        """A hint that these samples, int [n] in any order, will be read soon. Starts to fetch them and returns at once;
        nothing happens for a local folder, where the operating system is as fast."""
        if not self.folder.is_remote:
            return
        ahead = read_ahead.of_process()
        wanted = sorted({int(sample) for sample in samples})
        assert not wanted or 0 <= wanted[0] <= wanted[-1] < len(self), (wanted[0], wanted[-1], len(self))
        wanted = [sample for sample in wanted if (self._identity, sample) not in ahead]
        start = 0
        while start < len(wanted):
            shard, within = self._place(wanted[start])
            info = self.manifest.shards[shard]
            most = min(info.samples - within, _most_at_once(info))
            length = 1
            while length < min(most, len(wanted) - start) and wanted[start + length] == wanted[start] + length:
                length += 1
            keys = [(self._identity, sample) for sample in wanted[start : start + length]]
            load = functools.partial(self._load_run, shard, within, within + length)
            ahead.announce(keys, load, length * _bytes_of_sample(info))
            start += length

    def _place(self, sample: int) -> tuple[int, int]:
        """Shard and position in it."""
        assert 0 <= sample < len(self), f"sample {sample} of {len(self)}"
        shard = bisect_right(self._ends, sample)
        return shard, sample - self._ends[shard] + self.shard_sizes[shard]

    def _members(self, sample: int) -> Members | Rejected:
        """Read by itself."""
        shard, within = self._place(sample)
        name, offset = self.manifest.shards[shard].name, self._offsets(shard).item
        start, end = offset(within), offset(within + 1)
        if self.folder.is_remote:  # one request, whatever is in it
            refused = too_large(f"{name}[{within}]", end - start)
            if refused is not None:
                return refused
            content = self.folder.read_range(name, start, end)
            return self._members_in(content, 0, end - start, f"{name}[{within}]")
        read_range = self.folder.read_range
        return read_members(
            f"{name}[{within}]", end - start, lambda a, b: read_range(name, start + a, start + b), self.images
        )

    def _members_in(self, content: bytes, start: int, end: int, place: str) -> Members | Rejected:
        return read_members(place, end - start, lambda a, b: content[start + a : start + b], self.images)

    def _load_run(self, shard: int, first: int, last: int) -> tuple[list[Members | Rejected], int]:
        """Members of the samples [first, last) of a shard, and the bytes they take."""
        info = self.manifest.shards[shard]
        ends = self._offsets(shard)[first : last + 1] - self._offsets(shard)[first]
        content = self._run_bytes(info, self._offsets(shard), first, last)
        samples = [
            self._members_in(content, start, end, f"{info.name}[{first + i}]")
            for i, (start, end) in enumerate(pairwise(ends.tolist()))
        ]
        return samples, sum(len(data) for sample in samples if isinstance(sample, tuple) for data in sample[1].values())

    def _run_bytes(self, info: ShardInfo, offsets: np.ndarray, first: int, last: int) -> bytes:
        """By one request; with a disk cache by whole blocks, those that order.py deals out, so that every epoch finds
        the same ones again."""
        if self._cache is None:
            return self._run_range(info.name, offsets.item(first), offsets.item(last))
        pieces = []
        length = min(BLOCK, _most_at_once(info))
        for block in range(first - first % length, last, length):
            block_end = min(block + length, info.samples)
            start, end = offsets.item(block), offsets.item(block_end)
            # A hash, as a manifest is untrusted: what it calls a checksum might be a path.
            key = hashlib.sha256(f"{info.sha256} {info.name} {info.bytes} {start} {end}".encode()).hexdigest()
            fetch = functools.partial(self._run_range, info.name, start, end)
            content = self._cache.read(key, end - start, fetch)
            pieces.append(content[offsets[max(first, block)] - start : offsets[min(last, block_end)] - start])
        return b"".join(pieces)

    def _run_range(self, name: str, start: int, end: int) -> bytes:
        if end - start > MAX_SAMPLE_BYTES:  # a run is cut by the average size of samples, and one may be far above it
            raise OSError(f"{name}: bytes {start} to {end} are too many at once, so that their samples are read singly")
        return self.folder.read_range(name, start, end)


def _bytes_of_sample(info: ShardInfo) -> int:
    """On average: the index may not be here yet."""
    return -(-info.bytes // info.samples)


def _most_at_once(info: ShardInfo) -> int:
    """The samples of a shard that are asked for by one request."""
    return max(1, MAX_RUN_BYTES // _bytes_of_sample(info))
