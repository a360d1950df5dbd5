"""Shards are whole or not trusted, read by index, equal when made again, and readable by webdataset itself."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline import split as split_module
from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import Manifest, ShardInfo, ShardWriter, check_shard, index_path, write_manifest, write_shard
from data_pipeline.split import Split
from tests.test_schema import make_document


def write(folder: Path, num_documents: int = 5, samples_per_shard: int = 2) -> list[Document]:
    documents = [make_document(f"{i:09d}", (None, f"question {i}", " yes")) for i in range(num_documents)]
    with ShardWriter(folder, samples_per_shard, image_tokenizer="abc") as writer:
        for document in documents:
            writer.write(document)
    return documents


def read(split: Split, sample: int) -> Document:
    document = split.read(sample)
    assert isinstance(document, Document), document
    return document


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    documents = write(tmp_path)
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [document.key for document in documents]
    assert all(sample["0.png"] == documents[i].image_bytes["0.png"] for i, sample in enumerate(samples))


def test_the_index_is_that_of_energon(tmp_path: Path) -> None:
    write(tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        members = tar.getmembers()
    starts = [member.offset for i, member in enumerate(members) if i % 3 == 0]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    assert np.fromfile(tmp_path / "shard-000000.tar.idx", "<u8").tolist() == [*starts, end]


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
    monkeypatch.setattr(split_module, "NUM_OPEN_SHARDS", 2)
    documents = write(tmp_path, 6, 1)
    split = Split.open(tmp_path)
    assert [read(split, i).key for i in (*range(6), 0)] == [documents[i].key for i in (*range(6), 0)]
    assert len(split._files) == 2


def test_an_interrupted_writer_leaves_no_manifest_and_the_next_one_repairs(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 1) as writer:  # noqa: PT012  the interrupt falls inside the block
        for i in range(3):
            writer.write(make_document(str(i)))
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="started again"):
        Split.open(tmp_path)
    write(tmp_path, 2, 2)
    assert sorted(files(tmp_path)) == ["manifest.json", "shard-000000.tar", "shard-000000.tar.idx"]
    assert len(Split.open(tmp_path)) == 2


def test_a_failed_shard_leaves_the_old_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    write_shard(path, [make_document("0")])
    before = files(tmp_path)
    with pytest.raises(ValueError, match="the key '1'"):
        write_shard(path, [make_document("1"), make_document("1")])
    with pytest.raises(ValueError, match="a dot"):
        write_shard(path, [make_document("1.2")])
    with pytest.raises(ValueError, match="no documents"):
        write_shard(path, [])
    assert files(tmp_path) == before


def test_a_shard_can_be_written_again_under_its_name(tmp_path: Path) -> None:
    write(tmp_path / "a")
    infos = Split.open(tmp_path / "a").manifest.shards
    (tmp_path / "b").mkdir()
    split = Split.open(tmp_path / "a")
    again = [write_shard(tmp_path / "b" / "shard-000000.tar", [read(split, 0), read(split, 1)])]
    write_manifest(tmp_path / "b", again, "def")
    assert again == infos[:1]
    assert len(Split.open(tmp_path / "b", "def")) == 2


def test_codes_of_another_tokenizer_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"abc.*xyz.*uvlm data tokenize"):
        Split.open(tmp_path, "xyz")


def test_damage_is_found_before_the_run_starts(tmp_path: Path) -> None:
    write(tmp_path)
    info = Manifest.load(tmp_path).shards[0]
    path = tmp_path / info.name
    content, index = path.read_bytes(), index_path(path).read_bytes()
    assert check_shard(tmp_path, info, checksum=True) is None

    path.write_bytes(content[:-1] + b"x")
    assert check_shard(tmp_path, info) is None
    assert "checksum" in (check_shard(tmp_path, info, checksum=True) or "")
    path.write_bytes(content[:-1])
    assert "bytes" in (check_shard(tmp_path, info) or "")
    with pytest.raises(ValueError, match="should have"):
        Split.open(tmp_path)
    path.write_bytes(content)
    index_path(path).write_bytes(index[::-1])
    assert "index" in (check_shard(tmp_path, info) or "")
    with pytest.raises(ValueError, match="index"):
        Split.open(tmp_path).read(0)
    index_path(path).unlink()
    assert "missing" in (check_shard(tmp_path, info) or "")
    with pytest.raises(FileNotFoundError, match="missing"):
        Split.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("shards"),
        lambda record: record.update(format_version=99),
        lambda record: record["shards"][0].update(name="../other.tar"),
        lambda record: record["shards"][0].update(samples=-1),
        lambda record: record["shards"][0].update(extra=1),
    ],
)
def test_a_manifest_that_makes_no_sense_is_an_error_in_words(tmp_path: Path, change: Callable[[dict], object]) -> None:
    write(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    change(record)
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Split.open(tmp_path)


def test_a_file_that_shrinks_while_in_use_is_an_io_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "READ_RETRY_SECONDS", (0.0,))
    write(tmp_path)
    split = Split.open(tmp_path)
    os.truncate(tmp_path / "shard-000000.tar", 100)
    with pytest.raises(OSError, match="ended at byte"):
        split.read(0)


def test_a_read_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "READ_RETRY_SECONDS", (0.0,))
    documents = write(tmp_path)
    split = Split.open(tmp_path)
    real, calls = os.pread, []

    def fails_once(descriptor: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError("stale file handle")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fails_once)
    assert read(split, 0).key == documents[0].key
    assert len(calls) == 2


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
