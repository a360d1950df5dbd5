"""Shards with one bad document between two good ones, and what every reader must make of them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.encode import encode
from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import MANIFEST_NAME, ShardInfo, write_manifest
from data_pipeline.sources import Source, open_sources
from data_pipeline.split import Split
from data_pipeline.stream import RowStream
from data_pipeline.verify import verify
from data_pipeline.verify_report import VerifyReport, problems
from tests.test_schema import make_document
from tests.test_vocab import VOCAB

SHARD = "shard-000000.tar"
INDEX = SHARD + ".idx"
CODES = np.arange(4, dtype=np.uint16).reshape(2, 2)


def encoded_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded_image(Image.new("RGB", (4, 4), "red"))
JPEG = encoded_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


def good(key: str) -> Document:
    return make_document(key, image_bytes={"0.png": PNG})


def record(**changes: Any) -> bytes:
    return json.dumps({"texts": [None, "b"], "images": ["0.png", None], "task": "understand", **changes}).encode()


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def add_document(tar: tarfile.TarFile, document: Document) -> None:
    for suffix, content in sorted(document.to_members().items()):
        add_file(tar, f"{document.key}.{suffix}", content)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file under `folder`: inode, time of change and content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def guarded_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, for a fixture; fails where anything but a shard was written next to it.

    The folder of shards lies deep enough for "../../" to stay inside tmp_path, where a new file would be seen.
    """
    folder = tmp_path / "outer" / "inner" / "shards"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    yield folder
    allowed = {folder / SHARD, folder / INDEX, folder / MANIFEST_NAME}
    assert {path for path in tmp_path.rglob("*") if not path.is_dir()} - allowed == set()


def write_shard(folder: Path, add: Callable[[tarfile.TarFile], Any], tar_format: int = tarfile.PAX_FORMAT) -> None:
    """A good document, whatever `add` puts into the tar, a good document; index and manifest are right."""
    path = folder / SHARD
    offsets = [0]
    with tarfile.open(path, "w", format=tar_format) as tar:
        for step in (lambda tar: add_document(tar, good("good0")), add, lambda tar: add_document(tar, good("good1"))):
            step(tar)
            offsets.append(tar.offset)
    np.array(offsets, dtype="<u8").tofile(folder / INDEX)
    name_shard(folder, samples=3)


def name_shard(folder: Path, samples: int, **changes: Any) -> None:
    """A manifest that fits the shard as it lies there."""
    content = (folder / SHARD).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    info = ShardInfo(**{"name": SHARD, "samples": samples, "bytes": len(content), "sha256": sha256, **changes})
    write_manifest(folder, [info], VOCAB.image_tokenizer)


def write_members(folder: Path, *members: tuple[str, bytes]) -> None:
    def add(tar: tarfile.TarFile) -> None:
        for name, content in members:
            add_file(tar, name, content)

    write_shard(folder, add)


def assert_skipped(folder: Path, category: str, found: str | None = None) -> str:
    """Every reader gives the two good documents, counts the third under `category` and writes nothing; its reason."""
    before = tree(folder)
    split = Split.open(folder)
    documents = [split.read(sample) for sample in range(3)]
    for sample, key in ((0, "good0"), (2, "good1")):
        document = documents[sample]
        assert isinstance(document, Document)
        assert document.to_members() == good(key).to_members()
    refused = documents[1]
    assert isinstance(refused, Rejected), refused
    assert refused.category == category, refused.reason
    assert Split.open(folder, images=False).read(1) == refused  # images are stepped over unread there
    assert_verify_finds(verify(folder), found or category)
    assert_streamed(folder, category)
    assert tree(folder) == before
    return refused.reason


def assert_streamed(folder: Path, category: str) -> None:
    """Packs hold the good documents alone, and the state counts the others."""
    stream = RowStream(open_sources([Source("made", folder)], VOCAB), VOCAB, row=0, num_rows=1, pack_tokens=64)
    seen = set()
    for _ in range(3):
        pack, state = next(stream)
        seen |= {key for key in pack.doc_id if key}
    assert {key.partition("/")[0] for key in seen} == {"good0", "good1"}
    assert set(state["rejected"]) == {category}


def assert_verify_finds(report: VerifyReport, category: str) -> None:
    assert category in report.problems, report.problems
    sentences = [str(finding) for finding in report.findings]
    assert all(sentence.isprintable() and len(sentence) < 500 for sentence in sentences)
    assert not report.is_good
    assert category in problems(report)


def same_tokens(document: Document, wanted: Document) -> bool:
    """Equal as the model sees them, and in key; a document that has codes may lack the bytes of its image."""
    one, other = encode(document, VOCAB), encode(wanted, VOCAB)
    assert not isinstance(one, Rejected)
    assert not isinstance(other, Rejected)
    return (one.doc_id, one.ids.tolist(), one.labels.tolist()) == (
        other.doc_id,
        other.ids.tolist(),
        other.labels.tolist(),
    )
