"""Shards as an attacker or a broken copy makes them: refused in one sentence, or skipped and counted.

Never a partial document, never code that runs, never a write outside (or inside) the folder that is read. Each broken
document lies between two good ones, and every test asks all who read it: `Split`, `verify` and the stream of a row.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import MANIFEST_NAME, Manifest, ShardInfo, ShardWriter, write_manifest
from data_pipeline.split import Split
from data_pipeline.verify import verify
from data_pipeline.verify_report import problems
from tests.hostile import (
    CODES,
    INDEX,
    JPEG,
    PNG,
    SHARD,
    add_document,
    add_file,
    assert_skipped,
    assert_verify_finds,
    good,
    guarded_folder,
    name_shard,
    record,
    same_tokens,
    write_members,
    write_shard,
)
from tests.test_schema import npy
from tests.test_vocab import VOCAB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from guarded_folder(tmp_path, monkeypatch)


# -- tars


def test_good_shards_are_good(folder: Path) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    report = verify(folder)
    assert problems(report) == ""
    assert report.documents == 3


@pytest.mark.parametrize("name", ["../../x.json", "/x.json", "a/../../../x.json", "..json", "../.json"])
def test_a_member_path_that_climbs_out_or_is_absolute_is_refused(folder: Path, name: str) -> None:
    write_members(folder, (name, record()))
    assert_skipped(folder, "key is empty or holds a dot or a slash")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_refused(folder: Path, kind: bytes) -> None:
    def add(tar: tarfile.TarFile) -> None:
        add_file(tar, "a.json", record(texts=["x"], images=[None]))
        info = tarfile.TarInfo("a.0.png")
        info.type, info.linkname = kind, "../../../secret"
        tar.addfile(info)

    write_shard(folder, add)
    assert "not an ordinary file" in assert_skipped(folder, "tar cannot be read")


def test_a_dotted_key_is_cut_at_its_first_dot_and_so_lacks_its_json(folder: Path) -> None:
    write_members(folder, ("photo.v2.0.png", PNG), ("photo.v2.json", record()))
    assert_skipped(folder, "no json member")


@pytest.mark.parametrize(
    ("json_name", "image_name", "category"),
    [("a.JSON", "a.0.png", "no json member"), ("a.json", "a.0.PNG", "image has neither bytes nor codes")],
)
def test_suffixes_in_capitals_are_other_members(folder: Path, json_name: str, image_name: str, category: str) -> None:
    write_members(folder, (image_name, PNG), (json_name, record()))
    assert_skipped(folder, category)


def test_members_that_stand_apart_make_no_document(folder: Path) -> None:
    write_members(folder, ("a.0.png", PNG), ("b.json", record(texts=["x"], images=[None])), ("a.json", record()))
    assert_skipped(folder, "sample holds no member or members of several keys", found="key comes twice")


def test_a_member_that_comes_twice_is_refused(folder: Path) -> None:
    write_members(folder, ("a.0.png", PNG), ("a.json", record()), ("a.0.png", JPEG))
    assert_skipped(folder, "a member comes twice")


def test_a_damaged_header_is_not_taken_for_the_end_of_a_document(folder: Path) -> None:
    """tarfile does: without the last member, the codes, this would be a good document that lacks them."""
    write_members(folder, ("a.json", record()), ("a.0.png", PNG), ("a.0.npy", npy(CODES)))
    content = bytearray((folder / SHARD).read_bytes())
    content[content.index(b"a.0.npy")] ^= 1
    (folder / SHARD).write_bytes(content)
    name_shard(folder, samples=3)
    assert_skipped(folder, "tar cannot be read")
    assert_verify_finds(verify(folder), "tar is damaged")


def test_a_name_that_is_no_utf8_never_becomes_a_key(folder: Path) -> None:
    """tarfile makes half surrogate pairs of such bytes, and they break the first log they are written to."""
    write_shard(
        folder, lambda tar: add_file(tar, "caf\udce9.json", record(texts=["x"], images=[None])), tarfile.GNU_FORMAT
    )
    assert_skipped(folder, "member name is not valid UTF-8").encode()


@pytest.mark.parametrize("size", [1 << 62, -512, 1 << 33])
def test_a_member_that_claims_an_impossible_size_is_refused(folder: Path, size: int) -> None:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("a.json")
        info.size = abs(size)
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = struct.pack(">I", 0x80000000 if size > 0 else 0xFFFFFFFF) + struct.pack(">q", size)
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
        assert tar.fileobj is not None
        tar.fileobj.write(bytes(header))
        tar.offset += len(header)

    write_shard(folder, add)
    assert_skipped(folder, "tar cannot be read")
    assert_verify_finds(verify(folder), "tar is damaged")


def test_a_tar_shorter_than_its_manifest_is_refused_at_once(folder: Path) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    os.truncate(folder / SHARD, 2000)
    with pytest.raises(ValueError, match=r"has 2,?000 bytes"):
        Split.open(folder)
    assert_verify_finds(verify(folder), "manifest does not fit")
    assert_verify_finds(verify(folder), "tar is damaged")


def test_a_tar_cut_in_a_member_whose_manifest_agrees_gives_no_partial_document(folder: Path) -> None:
    write_members(folder, ("a.0.npy", npy(CODES)), ("a.0.png", PNG), ("a.json", record()))
    offsets = np.fromfile(folder / INDEX, "<u8")
    size = int(offsets[2]) - 512 - 300  # inside the last member of the last document that is left
    os.truncate(folder / SHARD, size)
    np.array([*offsets[:2], size], "<u8").tofile(folder / INDEX)
    name_shard(folder, samples=2)
    split = Split.open(folder)
    assert isinstance(split.read(0), Document)
    assert isinstance(split.read(1), Rejected)
    assert_verify_finds(verify(folder), "tar is damaged")
    offsets[:3].tofile(folder / INDEX)  # an index that points beyond the cut
    with pytest.raises(ValueError, match="index"):
        Split.open(folder).read(1)


def test_a_shard_that_is_cut_while_a_run_reads_it_is_an_io_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    split = Split.open(folder)
    os.truncate(folder / SHARD, 3000)
    with pytest.raises(OSError, match=SHARD):
        split.read(2)


def test_an_empty_shard_is_refused(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\0" * 1024)
    np.array([0], "<u8").tofile(folder / INDEX)
    for samples in (0, 1):
        name_shard(folder, samples=samples)
        with pytest.raises(ValueError, match=r"wrong type|should have"):
            Split.open(folder)
    assert_verify_finds(verify(folder), "manifest does not fit")
    (folder / SHARD).write_bytes(b"")
    name_shard(folder, samples=1, bytes=1024)
    assert_verify_finds(verify(folder), "tar is damaged")


# -- index and manifest


def shift(offsets: np.ndarray) -> np.ndarray:
    return offsets + np.uint64(512)


@pytest.mark.parametrize(
    ("change", "is_seen_at_once"),
    [
        (shift, True),
        (lambda offsets: offsets[::-1], True),
        (lambda offsets: offsets[[0, 2, 1, 3]], True),
        (lambda offsets: offsets[[0, 1, 1, 3]], True),
        (lambda offsets: offsets * np.uint64(100), True),
        (lambda offsets: offsets | np.uint64(1 << 63), True),
        (lambda offsets: offsets[:-1], True),
        (lambda offsets: offsets[:0], True),
        (lambda offsets: offsets + np.array([0, 512, 0, 0], "<u8"), False),
        (lambda offsets: offsets - np.array([0, 1, 0, 0], "<u8"), False),
        (lambda offsets: offsets - np.array([0, 0, 1024, 0], "<u8"), False),
    ],
)
def test_an_index_that_disagrees_is_refused_or_gives_only_whole_documents(
    folder: Path, change: Callable[[np.ndarray], np.ndarray], is_seen_at_once: bool
) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    offsets = np.fromfile(folder / INDEX, "<u8")
    change(offsets).astype("<u8").tofile(folder / INDEX)
    if is_seen_at_once:
        with pytest.raises(ValueError, match="idx"):
            Split.open(folder).read(0)
    else:
        split = Split.open(folder)
        documents = [split.read(sample) for sample in range(3)]
        assert any(isinstance(document, Rejected) for document in documents)
        for document, key in zip(documents, ("good0", "middle", "good1"), strict=True):
            assert isinstance(document, Rejected) or same_tokens(document, good(key))
    assert_verify_finds(verify(folder), "index does not fit")


SHARD_ENTRY = {"name": SHARD, "samples": 3, "bytes": 10240, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[" * 100_000,
        b'{"format_version": 1}',
        {"shards": [SHARD_ENTRY, SHARD_ENTRY]},
        {"shards": [{**SHARD_ENTRY, "name": "../x.tar"}]},
        {"shards": [{**SHARD_ENTRY, "name": "/etc/passwd"}]},
        {"shards": [{**SHARD_ENTRY, "samples": -1}]},
        {"shards": [{**SHARD_ENTRY, "bytes": -5}]},
        {"shards": [{**SHARD_ENTRY, "samples": True}]},
        {"shards": [{**SHARD_ENTRY, "samples": 1.5}]},
        {"shards": [{**SHARD_ENTRY, "more": 1}]},
        {"shards": ["x"]},
        {"shards": 3},
        {"image_tokenizer": 3},
        {"format_version": 99},
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_manifest_that_makes_no_sense_is_one_sentence(folder: Path, content: Any) -> None:
    if isinstance(content, dict):
        whole = {"format_version": 1, "image_tokenizer": VOCAB.image_tokenizer, "shards": [SHARD_ENTRY], **content}
        content = json.dumps(whole).encode()
    (folder / MANIFEST_NAME).write_bytes(content)
    for read in (Manifest.load, Split.open, verify):
        with pytest.raises(ValueError, match=MANIFEST_NAME) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"samples": 4}, {"samples": 10**30}, {"bytes": 10**30}, {"name": ""}, {"name": ".."}]
)
def test_a_manifest_that_does_not_fit_the_files_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    name_shard(folder, **{"samples": 3, **changes})
    with pytest.raises((ValueError, FileNotFoundError)):
        Split.open(folder)
    assert not verify(folder).is_good


def test_a_manifest_of_very_many_shards_is_read(folder: Path) -> None:
    shards = [ShardInfo(f"shard-{i:06d}.tar", 1000, 10**9, "0" * 64) for i in range(20_000)]
    write_manifest(folder, shards, None)
    with pytest.raises(FileNotFoundError, match=r"shard-000000\.tar is missing"):
        Split.open(folder)


def test_a_wrong_checksum_is_found(folder: Path) -> None:
    write_shard(folder, lambda tar: add_document(tar, good("middle")))
    name_shard(folder, samples=3, sha256="0" * 64)
    assert_verify_finds(verify(folder), "checksum differs")


# -- chance


@pytest.fixture(scope="module")
def good_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with ShardWriter(folder, image_tokenizer=VOCAB.image_tokenizer) as writer:
        for number in range(3):
            writer.write(good(f"{number}"))
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_whole_document_or_a_refusal_and_nothing_else(
    good_shard: Path, folder: Path, data: st.DataObject
) -> None:
    """A flip inside a text gives another text, which only the checksum sees; whatever is given back is a document that
    could have been written so, with all members that its json names."""
    for path in good_shard.iterdir():
        shutil.copyfile(path, folder / path.name)
    content = bytearray((folder / SHARD).read_bytes())
    original = bytes(content)
    end = int(np.fromfile(folder / INDEX, "<u8")[-1])
    flips = st.tuples(st.integers(0, end - 1), st.integers(1, 255))
    for position, bits in data.draw(st.lists(flips, min_size=1, max_size=8)):
        content[position] ^= bits
    (folder / SHARD).write_bytes(content)
    split, split_without_images = Split.open(folder), Split.open(folder, images=False)
    for sample in range(3):
        document, lean = split.read(sample), split_without_images.read(sample)
        if isinstance(document, Rejected):
            assert lean == document
            continue
        assert isinstance(lean, Document)
        assert lean.to_members().items() <= document.to_members().items()
        again = Document.from_members(document.key, document.to_members())
        assert isinstance(again, Document)
        assert again.to_members() == document.to_members()
        # Two flips in a name can cancel in the header's checksum; then a member is one that no slot names.
        assert document.codes or document.image_bytes or "0.png" not in document.images
    report = verify(folder, images=0)
    assert ("checksum differs" in report.problems) == (bytes(content) != original)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_the_index_or_the_manifest_are_refused_or_change_nothing(
    good_shard: Path, folder: Path, data: st.DataObject
) -> None:
    for path in good_shard.iterdir():
        shutil.copyfile(path, folder / path.name)
    path = folder / data.draw(st.sampled_from([INDEX, MANIFEST_NAME]))
    content = bytearray(path.read_bytes())
    for position, bits in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=4)
    ):
        content[position] ^= bits
    path.write_bytes(content)
    try:
        split = Split.open(folder)
        documents = [split.read(sample) for sample in range(len(split))]
    except (ValueError, OSError):
        return
    for number, document in enumerate(documents):
        assert isinstance(document, Rejected) or same_tokens(document, good(f"{number}"))
