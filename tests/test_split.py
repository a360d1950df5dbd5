"""Samples are read by index alone, whole or refused, as they were written, in every process."""

import dataclasses
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import read_ahead, storage
from data_pipeline.schema import Document, Rejected, codes_name
from data_pipeline.shards import ShardInfo, ShardWriter, write_manifest
from data_pipeline.split import Split
from data_pipeline.storage import Folder
from data_pipeline.tar_sample import MAX_SAMPLE_BYTES
from tests.test_schema import CODES, make_document
from tests.test_shards import read, write


def split_of_tar(folder: Path, add: Callable[[tarfile.TarFile], None], tar_format: int = tarfile.PAX_FORMAT) -> Split:
    """A split whose only sample is whatever `add` puts into the tar."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        add(tar)
        end = tar.offset
    np.array([0, end], dtype="<u8").tofile(folder / "shard-000000.tar.idx")
    write_manifest(folder, [ShardInfo(path.name, 1, path.stat().st_size, "")], None)
    return Split.open(folder)


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_documents_are_read_back_by_index(tmp_path: Path) -> None:
    documents = write(tmp_path)
    split = Split.open(tmp_path, "abc")
    assert (len(split), split.shard_sizes) == (5, [2, 2, 1])
    for i in (4, 0, 3, 1, 2):
        assert read(split, i).key == documents[i].key
        assert read(split, i).to_members() == documents[i].to_members()


def test_a_split_works_after_pickling_and_after_a_fork(tmp_path: Path) -> None:
    documents = write(tmp_path)
    split = Split.open(tmp_path)
    read(split, 0)
    assert read(pickle.loads(pickle.dumps(split)), 3).key == documents[3].key  # noqa: S301  our own bytes
    child = os.fork()
    if child == 0:
        os._exit(0 if all(read(split, i).key == documents[i].key for i in range(5)) else 1)
    assert read(split, 1).key == documents[1].key
    assert os.waitpid(child, 0)[1] == 0


def test_more_shards_than_file_handles_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "NUM_OPEN_FILES", 2)
    documents = write(tmp_path, 6, 1)
    split = Split.open(tmp_path)
    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  no Path is made of these
    assert [read(split, i).key for i in (*range(6), 0)] == [documents[i].key for i in (*range(6), 0)]
    assert len(os.listdir("/proc/self/fd")) == num_open + 2  # noqa: PTH208
    del split
    assert len(os.listdir("/proc/self/fd")) == num_open  # noqa: PTH208


def test_codes_of_another_tokenizer_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"abc.*xyz.*uvlm data tokenize"):
        Split.open(tmp_path, "xyz")


def test_a_file_that_shrinks_while_in_use_is_an_io_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0,))
    write(tmp_path)
    split = Split.open(tmp_path)
    os.truncate(tmp_path / "shard-000000.tar", 100)
    with pytest.raises(OSError, match=r"shard-000000\.tar, bytes 0 to \d+, cannot be read.* ended at byte 100"):
        split.read(0)


def test_a_read_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0,))
    documents = write(tmp_path)
    split = Split.open(tmp_path)
    read(split, 1)  # the index is read
    real, calls = os.pread, []

    def fails_once(descriptor: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError("stale file handle")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fails_once)
    assert read(split, 0).key == documents[0].key
    assert len(calls) == 2


def test_a_stale_handle_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0,))
    documents = write(tmp_path)
    split = Split.open(tmp_path)
    read(split, 1)
    path, copy = tmp_path / "shard-000000.tar", tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    os.truncate(path, 0)  # what the open handle sees
    copy.replace(path)
    assert read(split, 1).key == documents[1].key


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("0.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)

    result = split_of_tar(tmp_path, add).read(0)
    assert isinstance(result, Rejected)
    assert "not an ordinary file" in result.reason


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(tmp_path: Path, tar_format: int) -> None:
    key = "k" * 300
    members = make_document(key).to_members()

    def add(tar: tarfile.TarFile) -> None:
        for suffix, content in members.items():
            add_file(tar, f"{key}.{suffix}", content)

    assert read(split_of_tar(tmp_path, add, tar_format), 0).to_members() == members


def test_members_of_two_keys_or_one_member_twice_are_refused(tmp_path: Path) -> None:
    for names, words in ((("0.json", "1.png"), "several keys"), (("0.json", "0.json"), "twice")):
        folder = tmp_path / words
        folder.mkdir()

        def add(tar: tarfile.TarFile, names: tuple[str, ...] = names) -> None:
            for name in names:
                add_file(tar, name, b"{}")

        result = split_of_tar(folder, add).read(0)
        assert isinstance(result, Rejected)
        assert words in result.reason


def test_a_damaged_header_is_refused_and_not_a_crash(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-000000.tar"
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    num_rejected = 0
    for _ in range(300):
        content = bytearray(good)
        content[int(generator.integers(512))] = int(generator.integers(256))
        path.write_bytes(content)
        num_rejected += isinstance(Split.open(tmp_path).read(0), Rejected)
    assert num_rejected > 200


def without_images(document: Document | Rejected) -> Document | Rejected:
    """As `images=False` should give it."""
    if isinstance(document, Rejected):
        return document
    kept = {name: data for name, data in document.image_bytes.items() if codes_name(name) not in document.codes}
    return dataclasses.replace(document, image_bytes=kept)


def same(a: Document | Rejected, b: Document | Rejected) -> bool:
    if isinstance(a, Rejected) or isinstance(b, Rejected):
        return a == b
    return (a.key, a.to_members()) == (b.key, b.to_members())


def large_document(key: str, **changes: Any) -> Document:
    """Two images of 20 kB, between texts."""
    document = make_document(key, ("a", None, "b", None), **changes)
    return dataclasses.replace(document, image_bytes={name: bytes(20_000) for name in document.image_bytes})


def test_without_images_only_codes_and_text_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            writer.write(large_document(str(i)))
    split = Split.open(tmp_path, images=False)
    read(split, 2)
    real, num_bytes = os.pread, []

    def counts(descriptor: int, size: int, offset: int) -> bytes:
        num_bytes.append(size)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counts)
    document = read(split, 1)
    assert sum(num_bytes) < 13_000
    assert not document.image_bytes
    assert sorted(document.codes) == ["1.npy", "3.npy"]
    assert same(document, without_images(read(Split.open(tmp_path), 1)))
    again: Split = pickle.loads(pickle.dumps(split))  # noqa: S301  our own bytes
    assert same(read(again, 1), document)


def test_a_member_that_claims_to_reach_into_the_next_sample_is_refused(tmp_path: Path) -> None:
    members = make_document("0").to_members()

    def add(tar: tarfile.TarFile) -> None:
        for suffix, content in members.items():
            add_file(tar, f"0.{suffix}", content)
        info = tarfile.TarInfo("0.txt")
        info.size = 600  # and no content
        tar.addfile(info)

    split_of_tar(tmp_path, add)
    path = tmp_path / "shard-000000.tar"
    offsets = np.fromfile(path.with_name(path.name + ".idx"), "<u8")
    path.write_bytes(path.read_bytes() + bytes(1024))
    write_manifest(tmp_path, [ShardInfo(path.name, 1, path.stat().st_size, "")], None)
    assert offsets[-1] < path.stat().st_size
    for images in (True, False):
        result = Split.open(tmp_path, images=images).read(0)
        assert isinstance(result, Rejected)
        assert result.category == "tar cannot be read"


def test_an_image_without_codes_is_read_even_where_images_are_not_wanted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(large_document("0", codes={}))
        writer.write(large_document("1", codes={"3.npy": CODES}))
        writer.write(make_document("2"))
    with_images, without = Split.open(tmp_path), Split.open(tmp_path, images=False)
    assert [list(read(without, i).image_bytes) for i in range(3)] == [["1.png", "3.png"], ["1.png"], []]
    assert all(same(read(without, i), without_images(read(with_images, i))) for i in range(3))


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")  # numpy parses a damaged header
def test_damage_is_judged_alike_with_and_without_images(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(large_document("0"))
    path = tmp_path / "shard-000000.tar"
    good = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    generator = np.random.default_rng(0)
    results = []
    for _ in range(300):
        content = bytearray(good)
        content[int(generator.choice(headers) + generator.integers(1024))] = int(generator.integers(256))
        path.write_bytes(content)
        whole, without = Split.open(tmp_path).read(0), Split.open(tmp_path, images=False).read(0)
        assert same(without, without_images(whole)), (whole, without)
        results.append(isinstance(whole, Rejected))
    assert 100 < sum(results) < 300


def test_a_sample_above_the_cap_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a hole costs nothing on a disk, and an index may claim that it is one sample."""
    write(tmp_path, 1)
    path = tmp_path / "shard-000000.tar"
    num_bytes = MAX_SAMPLE_BYTES + 512
    os.truncate(path, num_bytes)
    np.array([0, num_bytes], dtype="<u8").tofile(tmp_path / "shard-000000.tar.idx")
    write_manifest(tmp_path, [ShardInfo(path.name, 1, num_bytes, "")], None)
    splits = [Split.open(tmp_path), Split.open(tmp_path, images=False), Split.open(f"file://{tmp_path}")]
    splits[2].prefetch([0])
    monkeypatch.setattr(Folder, "read_range", just_the_index(Folder.read_range))
    for split in splits:
        result = split.read(0)
        assert isinstance(result, Rejected)
        assert result.category == "sample is too large"


def just_the_index(read_range: Callable[[Folder, str, int, int], bytes]) -> Callable[[Folder, str, int, int], bytes]:
    def checked(folder: Folder, name: str, start: int, end: int) -> bytes:
        assert name.endswith(".idx"), (name, start, end)
        return read_range(folder, name, start, end)

    return checked


def test_names_beyond_ascii_are_read(tmp_path: Path) -> None:
    members = make_document("k").to_members()

    def add(tar: tarfile.TarFile) -> None:
        for suffix, content in members.items():
            add_file(tar, f"schlüssel.{suffix}", content)

    assert read(split_of_tar(tmp_path, add, tarfile.GNU_FORMAT), 0).key == "schlüssel"


def test_a_local_folder_needs_no_prefetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "of_process", lambda: pytest.fail("something is fetched ahead"))
    documents = write(tmp_path)
    split = Split.open(str(tmp_path))
    split.prefetch(np.array([3, 0]))
    assert [read(split, i).key for i in (3, 0)] == [documents[i].key for i in (3, 0)]
