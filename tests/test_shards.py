"""Shards are whole or not trusted, equal when made again, and readable by webdataset itself."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.schema import Document
from data_pipeline.shards import Manifest, ShardWriter, check_shard, index_path, write_manifest, write_shard
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
