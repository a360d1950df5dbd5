"""Shards behind a URL are read as those on a disk: the same documents, few requests, patient and bounded."""

import dataclasses
import functools
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import read_ahead, storage
from data_pipeline.block_cache import BlockCache
from data_pipeline.order import row_order
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.schema import Document, Rejected
from data_pipeline.shards import ShardWriter, check_shard, write_manifest
from data_pipeline.split import Split
from data_pipeline.storage import Folder
from tests.s3_server import Server, s3_server
from tests.test_schema import make_document

NUM_DOCUMENTS = 300
SHARD = 100
URL = "s3://bucket/shards"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    with ShardWriter(place, SHARD, image_tokenizer="abc") as writer:
        for i in range(NUM_DOCUMENTS):
            writer.write(make_document(f"{i:09d}", ("a", None, "b"), image_bytes={"1.png": bytes([i % 256]) * 5000}))
    return place


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Server]:
    with s3_server() as server:
        server.upload(folder, "bucket/shards")
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own retries would only take time
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.delenv("UVLM_CACHE_DIR", raising=False)
    yield running
    running.fail(0)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> ReadAhead:
    """One of this test's own."""
    read_ahead._of_process.cache_clear()
    return read_ahead.of_process()


def members(document: Document | Rejected) -> dict[str, bytes]:
    assert isinstance(document, Document), document
    return document.to_members()


def read_all(split: Split, samples: np.ndarray | range) -> list[dict[str, bytes]]:
    return [members(split.read(int(sample))) for sample in samples]


@pytest.mark.parametrize("images", [True, False])
def test_documents_behind_a_url_are_those_of_the_folder(
    server: Server, ahead: ReadAhead, folder: Path, images: bool
) -> None:
    remote, local = Split.open(URL, "abc", images=images), Split.open(folder, "abc", images=images)
    assert (len(remote), remote.manifest, str(remote.folder)) == (len(local), local.manifest, URL)
    remote.prefetch(range(50, 250))
    wanted = range(0, 300, 7)
    assert read_all(remote, wanted) == read_all(local, wanted)
    assert all(check_shard(URL, info, checksum=True) is None for info in remote.manifest.shards)


def test_a_window_takes_one_request_for_each_contiguous_run(server: Server, ahead: ReadAhead) -> None:
    split = Split.open(URL)
    order = row_order(0, 0, 0, shard_sizes=split.shard_sizes, num_rows=2, block=32, window=64)
    for window in np.split(order, range(64, len(order), 64)):
        ordered = np.sort(window)
        is_new_run = (np.diff(ordered) != 1) | (np.diff(ordered // SHARD) != 0)
        before = server.num_requests
        split.prefetch(window)
        split.prefetch(window)  # what is under way is not asked for again
        read_all(split, window)
        assert server.num_requests - before == 1 + is_new_run.sum()
    assert ahead.num_bytes == 0
    read_all(split, order[:2])
    assert server.num_requests - before == 1 + is_new_run.sum() + 2


def test_the_next_window_is_fetched_while_this_one_is_read(server: Server, ahead: ReadAhead) -> None:
    split = Split.open(URL)
    split.prefetch(range(64))
    split.prefetch(range(64, 100))
    before = server.num_requests
    read_all(split, range(64))
    for run in list(ahead._runs.values()):
        assert run.values is not None
        run.values.result(timeout=60)
    fetched = server.num_requests
    assert fetched <= before + 2
    server.fail(1000)
    read_all(split, range(64, 100))
    assert server.num_requests == fetched


@pytest.mark.parametrize("step", [1, -1])
def test_prefetched_memory_is_bounded_and_everything_is_still_read(
    server: Server, ahead: ReadAhead, monkeypatch: pytest.MonkeyPatch, folder: Path, step: int
) -> None:
    split, local = Split.open(URL), Split.open(folder)
    before = server.num_requests
    bytes_of_sample = split.manifest.bytes // len(split)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 25 * bytes_of_sample)
    largest = 0
    for start in range(0, 300, 10):
        split.prefetch(range(start, start + 10))
        largest = max(largest, ahead.num_bytes)
    assert largest > 10 * bytes_of_sample
    for sample in range(300)[::step]:
        assert members(split.read(sample)) == members(local.read(sample))
        largest = max(largest, ahead.num_bytes)
    assert largest <= 25 * bytes_of_sample
    assert not ahead._runs
    assert not ahead._run_of
    if step == 1:  # in the order that was announced, nothing has had to give way
        assert server.num_requests - before == 30


def in_child(work: Callable[[], bool], how: str) -> bool:
    """Whether `work` came out true in a child process."""
    context: Any = multiprocessing.get_context(how)
    process = context.Process(target=_exit_with, args=(work,))
    process.start()
    process.join(60)
    process.kill()  # one that hangs
    return process.exitcode == 0


def _exit_with(work: Callable[[], bool]) -> None:
    sys.exit(0 if work() else 1)


class ReadsAll:
    def __init__(self, split: Split, folder: Path) -> None:
        self.split, self.folder = split, folder

    def __call__(self) -> bool:
        self.split.prefetch(range(40, 120))
        return read_all(self.split, range(30, 130)) == read_all(Split.open(self.folder), range(30, 130))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_split_behind_a_url_works_in_child_processes(
    server: Server, ahead: ReadAhead, folder: Path, how: str
) -> None:
    split = Split.open(URL)
    split.prefetch(range(50, 90))  # the child has neither this run nor the threads that fetch it
    assert in_child(ReadsAll(split, folder), how)
    assert ReadsAll(split, folder)()  # and the parent's connections are as they were
    assert ReadsAll(pickle.loads(pickle.dumps(split)), folder)()  # noqa: S301  our own bytes


def ends_with_a_fetch_that_hangs() -> bool:
    ahead, is_under_way = read_ahead.of_process(), threading.Event()

    def hang() -> tuple[list[int], int]:
        is_under_way.set()
        threading.Event().wait()
        return [], 0

    ahead.announce([0], hang, 1)
    return is_under_way.wait(60)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_process_ends_while_a_fetch_hangs(how: str) -> None:
    assert in_child(ends_with_a_fetch_that_hangs, how)


def test_workers_of_a_data_loader_read_through_a_url(server: Server, ahead: ReadAhead, folder: Path) -> None:
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    split = Split.open(URL)
    read_all(split, range(3))

    class Worker(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, bytes]]:
            info = get_worker_info()
            assert info is not None
            samples = range(info.id * SHARD, (info.id + 1) * SHARD)
            split.prefetch(samples)
            yield from read_all(split, samples)

    loaded = list(DataLoader(Worker(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    expected = read_all(Split.open(folder), range(2 * SHARD))
    assert sorted(map(pickle.dumps, loaded)) == sorted(map(pickle.dumps, expected))


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_failed_request_is_tried_again_and_then_an_error_that_names_shard_and_bytes(
    server: Server, ahead: ReadAhead, prefetched: bool
) -> None:
    split = Split.open(URL)
    offset = int(split._offsets(1)[5])
    before = server.num_requests
    server.fail(2)
    if prefetched:
        split.prefetch(range(105, 110))
    assert members(split.read(105))
    assert server.num_requests == before + 3

    server.fail(1000)
    if prefetched:
        split.prefetch(range(150, 200))
        split.prefetch([205])
        offset = int(split._offsets(1)[50])
    with pytest.raises(OSError, match=rf"{URL}/shard-000001.tar, bytes {offset} to \d+, cannot be read, tried 3 times"):
        split.read(150 if prefetched else 105)
    server.fail(0)
    assert members(split.read(151)) == members(split.read(151))  # as soon as the server is well again


def test_what_is_missing_or_forbidden_is_told_at_once(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/other has no manifest.*uvlm data convert"):
        Split.open("s3://bucket/other")
    with pytest.raises(FileNotFoundError, match=r"s3://nobody/x has no manifest"):
        Split.open("s3://nobody/x")
    with pytest.raises(FileNotFoundError, match=r"shards/no.tar, bytes 0 to 5, is missing; copy"):
        Folder.open(URL).read_range("no.tar", 0, 5)

    def forbidden(*_: object, **__: object) -> bytes:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(storage, "_filesystem", lambda *_: type("Filesystem", (), {"cat_file": forbidden})())
    with pytest.raises(
        PermissionError, match=r"a\.tar may not be read \(Access Denied\); check rights and credentials"
    ):
        Folder.open(URL).read("a.tar")


def test_a_file_that_is_shorter_than_it_should_be_is_an_io_error(server: Server, folder: Path) -> None:
    size = Folder.open(URL).size("manifest.json")
    assert size == (folder / "manifest.json").stat().st_size
    with pytest.raises(OSError, match=rf"manifest\.json, bytes 3 to {size + 1}, .* ended at byte {size}"):
        Folder.open(URL).read_range("manifest.json", 3, size + 1)


def test_a_mistake_of_the_program_is_not_taken_for_an_io_error(server: Server) -> None:
    with pytest.raises(TypeError):
        Folder.open(URL).read_range("shard-000000.tar", "0", 5)  # type: ignore[arg-type]


def test_a_location_that_no_installed_package_reads_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(protocol: str) -> type:
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(ValueError, match=r"nonsense://x/y cannot be read here .*nonsense"):
        Split.open("nonsense://x/y")
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"s3://a/b cannot be read here .*s3fs.*pip install 'uvlm\[s3\]'"):
        Split.open("s3://a/b")


def test_other_protocols_are_read_too(folder: Path, ahead: ReadAhead) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/some/shards/{path.name}", path.read_bytes())
    split = Split.open("memory://some/shards/")
    split.prefetch(range(10, 20))
    assert read_all(split, range(30)) == read_all(Split.open(folder), range(30))
    memory.rm("/some/shards/shard-000002.tar.idx")
    with pytest.raises(FileNotFoundError, match=r"memory://some/shards/shard-000002.tar.idx is missing"):
        Split.open("memory://some/shards")
    memory.rm("/some", recursive=True)


def test_a_second_epoch_comes_from_the_disk_cache(
    server: Server, ahead: ReadAhead, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("data_pipeline.split.BLOCK", 64)
    local = read_all(Split.open(folder), range(300))

    def epoch() -> int:
        split, before = Split.open(URL), server.num_requests
        for window in np.split(np.arange(300), range(30, 300, 30)):  # not where blocks end
            split.prefetch(window)
            assert read_all(split, window) == [local[i] for i in window]
        return server.num_requests - before

    assert epoch() == 6  # two blocks of each shard
    assert epoch() == 0
    first, second, third, *others = sorted((tmp_path / "cache").iterdir())
    assert len(others) == 3
    third.write_bytes(b"")
    first.write_bytes(first.read_bytes()[:-1])
    damaged = bytearray(second.read_bytes())
    damaged[100] ^= 1
    second.write_bytes(damaged)
    assert epoch() == 3
    assert epoch() == 0


def test_blocks_of_large_samples_hold_few(
    server: Server, ahead: ReadAhead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would otherwise read far more than itself."""
    monkeypatch.setenv("UVLM_CACHE_DIR", str(tmp_path / "cache"))
    split = Split.open(URL)
    most = 10 * split.manifest.bytes // len(split)
    monkeypatch.setattr("data_pipeline.split.MAX_RUN_BYTES", most)
    split.prefetch(range(20))
    read_all(split, range(20))
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert len(sizes) in (2, 3)
    assert max(sizes) < 1.1 * most


def test_the_disk_cache_stays_within_its_bound_and_drops_the_oldest(tmp_path: Path) -> None:
    cache, other = BlockCache(tmp_path, 100_000), BlockCache(tmp_path, 100_000)  # as of two processes
    (tmp_path / "1.2.3.tmp.block").write_bytes(bytes(1000))  # a killed process left it
    os.utime(tmp_path / "1.2.3.tmp.block", (0, 0))
    for i in range(100):
        block = bytes([i]) * 5000
        assert (cache, other)[i % 2].read(f"{i:03d}", 5000, functools.partial(bytes, block)) == block
        os.utime(tmp_path / f"{i:03d}.block", (i + 1, i + 1))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == "099.block"
    assert len(names) > 10
    assert names == [f"{i:03d}.block" for i in range(100 - len(names), 100)]
    assert cache.read("099", 5000, lambda: pytest.fail("it is there")) == bytes([99]) * 5000
    assert cache.read("big", 200_000, lambda: bytes(200_000)) == bytes(200_000)
    assert not (tmp_path / "big.block").exists()


def test_the_disk_cache_stays_within_its_bound_for_users_of_one_block_each(tmp_path: Path) -> None:
    for i in range(400):
        BlockCache(tmp_path, 100_000).read(f"{i}", 300, lambda: bytes(300))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000


def test_a_disk_that_cannot_be_written_costs_only_the_caching(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "gone", 1000)
    assert cache.read("a", 3, lambda: b"abc") == b"abc"


@pytest.mark.parametrize("gigabytes", ["0", "much", "-1", "nan"])
def test_a_bound_of_the_cache_that_is_no_size_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: str
) -> None:
    monkeypatch.setenv("UVLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UVLM_CACHE_GB", gigabytes)
    with pytest.raises(ValueError, match=r"UVLM_CACHE_GB=.*no positive number"):
        Split.open(URL)


def test_a_manifest_cannot_lead_the_cache_out_of_its_folder(
    server: Server, ahead: ReadAhead, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UVLM_CACHE_DIR", str(tmp_path / "cache"))
    split = Split.open(URL)
    shards = [dataclasses.replace(shard, sha256="../../x") for shard in split.manifest.shards]
    (tmp_path / "other").mkdir()
    hostile = Split(split.folder, write_manifest(tmp_path / "other", shards, None))
    hostile.prefetch(range(5))
    read_all(hostile, range(5))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other"]
