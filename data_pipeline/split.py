"""A finished folder of shards, read by sample index.

By index, because an exact resume needs random access and webdataset has no state.
Cost (run, files in the page cache, 8x8 codes): `Split.read` 32 us for 24 texts, 25 us for one.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import Manifest, index_path, load_index
from data_pipeline.tar_sample import read_sample

NUM_OPEN_SHARDS = 64  # file handles a split keeps in one process
READ_RETRY_SECONDS = (0.5, 2.0)


class Split:
    """A finished folder of shards, read by global sample index. Works after a fork and after pickling."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._files: OrderedDict[int, tuple[IO[bytes], np.ndarray]] = OrderedDict()
        self.folder, self.manifest = folder, manifest
        self.shard_sizes: list[int] = [shard.samples for shard in manifest.shards]
        self._ends = np.cumsum(self.shard_sizes, dtype=np.int64)

    @classmethod
    def open(cls, folder: Path | str, image_tokenizer: str | None = None) -> Split:
        """Reads the manifest and checks that every shard is there with the size it should have.

        FileNotFoundError or ValueError names what is missing or wrong. Where `image_tokenizer` is given, codes of any
        other tokenizer are refused.
        """
        manifest = Manifest.load(folder := Path(folder))
        if image_tokenizer is not None and manifest.image_tokenizer != image_tokenizer:
            found = f"codes of image tokenizer {manifest.image_tokenizer}" if manifest.image_tokenizer else "no codes"
            raise ValueError(
                f"{folder} holds {found}, but {image_tokenizer} is wanted; make them with `uvlm data tokenize`"
            )
        for info in manifest.shards:
            path = folder / info.name
            for needed, size in ((path, info.bytes), (index_path(path), 8 * (info.samples + 1))):
                if not needed.is_file():
                    raise FileNotFoundError(f"{needed} is missing; copy the folder again or make it again")
                if needed.stat().st_size != size:
                    raise ValueError(
                        f"{needed} has {needed.stat().st_size} bytes and should have {size}; make the folder again"
                    )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])  # type: ignore[misc]  # the constructor checks and derives

    def __del__(self) -> None:
        for file, _ in self._files.values():
            file.close()

    def read(self, sample: int) -> Document | Rejected:
        """Reads a document. I/O errors are tried again, then raised; bad content comes back as Rejected."""
        assert 0 <= sample < len(self), f"sample {sample} of {len(self)}"
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        within = sample - int(self._ends[shard]) + self.shard_sizes[shard]
        for seconds in READ_RETRY_SECONDS:
            try:
                content = self._read_bytes(shard, within)
                break
            except OSError:
                if shard in self._files:  # a stale handle of a network file system is opened anew
                    self._files.pop(shard)[0].close()
                time.sleep(seconds)
        else:
            content = self._read_bytes(shard, within)
        return read_sample(f"{self.manifest.shards[shard].name}[{within}]", content)

    def _read_bytes(self, shard: int, within: int) -> bytes:
        if shard not in self._files:
            info = self.manifest.shards[shard]
            path = self.folder / info.name
            offsets = load_index(path, info)
            self._files[shard] = (path.open("rb", buffering=0), offsets)
            if len(self._files) > NUM_OPEN_SHARDS:
                self._files.popitem(last=False)[1][0].close()
        else:
            self._files.move_to_end(shard)
        file, offsets = self._files[shard]
        start, end = offsets[within : within + 2].tolist()
        content = os.pread(file.fileno(), end - start, start)  # keeps no position, so forked workers may share it
        if len(content) != end - start:
            raise OSError(f"{file.name} ended at byte {start + len(content)}; it should reach {end}")
        return content
