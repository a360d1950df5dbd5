"""Shards: plain webdataset tars with an index beside each and a manifest for the folder.

    shard-000000.tar        documents, the members of one adjacent; the same documents give the same bytes
    shard-000000.tar.idx    uint64 little-endian: the offset of each sample, then the end of the last (the layout of
                            Megatron-Energon, so that its tools read our shards)
    manifest.json           shards with samples, bytes and checksum; the fingerprint of the tokenizer behind the codes

webdataset writes; `split.py` reads by index. The manifest is written last and taken away first: a folder with a
manifest is whole, any other is not trusted.

Cost (run, 8x8 codes): 0.15 to 0.4 ms to write a document.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from data_pipeline.files import replace_file
from data_pipeline.schema import Document, Rejected
from data_pipeline.storage import Folder

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_NAME = "shard-{:06d}.tar"
INDEX_SUFFIX = ".idx"
PIECE = 32 << 20  # bytes of a shard read at once for its checksum
SHARD_PATTERN = re.compile(r"shard-\d{6}\.tar(\.idx)?(\.tmp)?")


@dataclass(frozen=True)
class ShardInfo:
    name: str
    samples: int
    bytes: int
    sha256: str

    def file_sizes(self) -> dict[str, int]:
        """The bytes that the shard and its index should have, by name."""
        return {self.name: self.bytes, self.name + INDEX_SUFFIX: 8 * (self.samples + 1)}


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `image_tokenizer` is None where no codes have been made."""

    shards: list[ShardInfo]
    image_tokenizer: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hex characters over all shards: other documents, or the same in other shards, have another."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: Path | str | Folder) -> Manifest:
        """FileNotFoundError where the folder has no manifest, ValueError where it cannot be understood."""
        folder = Folder.open(folder)
        path = folder.place(MANIFEST_NAME)
        try:
            content = folder.read(MANIFEST_NAME)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST_NAME}, so it is no finished folder of shards; make it with "
                "`uvlm data convert` or `uvlm data tokenize` (an interrupted run is simply started again)"
            ) from None
        try:
            record = json.loads(content)
            version, image_tokenizer = record["format_version"], record["image_tokenizer"]
            shards = [ShardInfo(**shard) for shard in record["shards"]]
            valid = all(_is_valid(shard) for shard in shards) and isinstance(image_tokenizer, str | None)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}); make the folder again") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {version}, this program reads {FORMAT_VERSION}; convert again")
        if not valid:
            raise ValueError(f"{path} holds an entry of the wrong type; make the folder again")
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError(f"{path} names a shard twice, so its documents would be read twice; make the folder again")
        return cls(shards, image_tokenizer)


def _is_valid(shard: ShardInfo) -> bool:
    counts = (shard.samples, shard.bytes)
    return (
        isinstance(shard.name, str)
        and Path(shard.name).name == shard.name  # a manifest must not point outside its folder
        and all(type(count) is int and count > 0 for count in counts)
        and isinstance(shard.sha256, str)
    )


def write_manifest(folder: Path, shards: list[ShardInfo], image_tokenizer: str | None) -> Manifest:
    """Writes the manifest, after which the folder counts as finished."""
    manifest = Manifest(list(shards), image_tokenizer)
    record: dict[str, Any] = dataclasses.asdict(manifest)
    record.update(samples=manifest.samples, bytes=manifest.bytes)
    replace_file(Path(folder) / MANIFEST_NAME, json.dumps(record, indent=1) + "\n")
    return manifest


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


class _HashingFile:
    """The checksum is made while writing, so that a shard is not read a second time."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.num_bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.num_bytes += len(content)
        return self.file.write(content)


class _OpenShard:
    """One shard in the making, under a temporary name until `close`."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # imports torch, which reading does without

        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.file = self.temporary.open("wb")
        self.hashing = _HashingFile(self.file)
        self.tar = TarWriter(self.hashing, encoder=False, compress=False, mtime=0, user="uvlm", group="uvlm")
        self.offsets: list[int] = []
        self.keys: set[str] = set()

    def add(self, document: Document) -> None:
        members = document.to_members()
        checked = Document.from_members(document.key, members)
        if isinstance(checked, Rejected):
            raise ValueError(f"document {document.key!r} cannot be written to {self.path}: {checked.reason}")
        if document.key in self.keys:
            raise ValueError(f"two documents of {self.path} have the key {document.key!r}; give each its own")
        self.keys.add(document.key)
        self.offsets.append(self.tar.tarstream.offset)
        self.tar.write({"__key__": document.key, **members})

    def close(self) -> ShardInfo:
        self.offsets.append(self.tar.tarstream.offset)
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)
        replace_file(index_path(self.path), np.array(self.offsets, dtype="<u8").tobytes())
        return ShardInfo(self.path.name, len(self.keys), self.hashing.num_bytes, self.hashing.sha256.hexdigest())

    def abort(self) -> None:
        self.temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the disk may be full, and the first error is the one to tell
            self.tar.close()
            self.file.close()


def write_shard(path: Path, documents: Iterable[Document]) -> ShardInfo:
    """Writes one shard and its index; nothing of that name is left or changed where it fails.

    ValueError for a document that could not be read back, for a repeated key and for no documents at all.
    """
    shard = _OpenShard(path)
    try:
        for document in documents:
            shard.add(document)
        if not shard.keys:
            raise ValueError(f"{path} would hold no documents")
        return shard.close()
    except BaseException:
        shard.abort()
        raise


class ShardWriter:
    """Writes documents to numbered shards; index and manifest at the end of the `with` block.

    An exception inside the block leaves no manifest, so the folder stays unfinished. Shards that an earlier,
    interrupted run left are overwritten, and what is left over of them is removed at the end.
    """

    def __init__(self, folder: Path | str, samples_per_shard: int = 1000, image_tokenizer: str | None = None) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1")
        self.folder, self.samples_per_shard, self.image_tokenizer = Path(folder), samples_per_shard, image_tokenizer
        self.shards: list[ShardInfo] = []
        self._open: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        return self

    def write(self, document: Document) -> None:
        """ValueError for a document that could not be read back."""
        if self._open is None:
            self._open = _OpenShard(self.folder / SHARD_NAME.format(len(self.shards)))
        self._open.add(document)
        if len(self._open.keys) == self.samples_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._open is not None
        self.shards.append(self._open.close())
        self._open = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if self._open is not None:
                self._open.abort()
            return
        if self._open is not None:
            self._close_shard()
        names = {shard.name for shard in self.shards}
        for path in self.folder.iterdir():
            if SHARD_PATTERN.fullmatch(path.name) and path.name.removesuffix(".idx") not in names:
                path.unlink()
        write_manifest(self.folder, self.shards, self.image_tokenizer)


def load_index(folder: Folder, info: ShardInfo) -> np.ndarray:
    """Offsets, int64 [samples + 1]; ValueError where they cannot belong to the shard."""
    name = info.name + INDEX_SUFFIX
    offsets = np.frombuffer(folder.read_range(name, 0, 8 * (info.samples + 1)), dtype="<u8").astype(np.int64)
    if offsets[-1] > info.bytes or offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        raise ValueError(f"index {folder.place(name)} does not fit its shard; make the folder again")
    return offsets


def check_shard(folder: Path | str | Folder, info: ShardInfo, *, checksum: bool = False) -> str | None:
    """What is wrong with a shard in one sentence, or None. `checksum=True` reads the whole file."""
    folder = Folder.open(folder)
    path = folder.place(info.name)
    try:
        for name, num_bytes in info.file_sizes().items():
            found = folder.size(name)
            if found != num_bytes:
                return f"{folder.place(name)} has {found} bytes, its manifest says {num_bytes}"
        load_index(folder, info)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if checksum:
        sha256 = hashlib.sha256()
        for start in range(0, info.bytes, PIECE):
            sha256.update(folder.read_range(info.name, start, min(start + PIECE, info.bytes)))
        if sha256.hexdigest() != info.sha256:
            return f"{path} does not have the checksum of its manifest"
    return None
