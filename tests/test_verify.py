"""Whatever is wrong with a folder of shards is found, all of it at once; where nothing is wrong, nothing is found."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import verify as verify_module
from data_pipeline import verify_report
from data_pipeline.encode import Encoded, encode
from data_pipeline.image_tokens import Preprocessing
from data_pipeline.schema import Document
from data_pipeline.shards import MANIFEST_NAME, Manifest, ShardInfo, ShardWriter, write_manifest
from data_pipeline.verify import verify
from data_pipeline.verify_report import KEPT_PER_CATEGORY, problems, summary
from data_pipeline.vocab import Vocab
from tests.test_image_tokens import encoded, random_images
from tests.test_schema import make_document
from tests.test_vocab import make_tokenizer

NUM_CODES = 16
CODES = np.arange(4, dtype=np.uint16).reshape(2, 2)


def make_tokenizer_folder(folder: Path) -> Path:
    """A tokenizer folder of 16 codes, 2 x 2 of them a picture of 4 x 4; its weights are none, for nobody loads them."""
    (folder / "text").mkdir(parents=True)
    (folder / "image").mkdir()
    make_tokenizer().save(str(folder / "text" / "tokenizer.json"))
    config = {"model_type": "janus_vqgan", "num_embeddings": NUM_CODES, "channel_multiplier": [1, 1]}
    (folder / "image" / "config.json").write_text(json.dumps(config))
    (folder / "image" / "model.safetensors").write_bytes(b"weights")
    Preprocessing(4).save(folder / "image")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def png() -> bytes:
    from PIL import Image

    return encoded(Image.fromarray(random_images(1)[0]))


def documents(png: bytes, count: int = 10) -> list[Document]:
    return [
        make_document(f"{i:03d}", (None, *["what color is it?", " red"] * (i + 1)), image_bytes={"0.png": png})
        for i in range(count)
    ]


def write(folder: Path, made: list[Document], tokenizer: Path | None, samples_per_shard: int = 4) -> Path:
    fingerprint = Vocab.load(tokenizer).image_tokenizer if tokenizer is not None else None
    with ShardWriter(folder, samples_per_shard, image_tokenizer=fingerprint) as writer:
        for document in made:
            writer.write(document)
    return folder


@pytest.fixture
def folder(tmp_path: Path, png: bytes, tokenizer: Path) -> Path:
    return write(tmp_path / "shards", documents(png), tokenizer)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_good_folder_has_no_problems_and_is_measured(folder: Path, tokenizer: Path, num_processes: int) -> None:
    told: list[tuple[str, int, int]] = []
    report = verify(
        folder, tokenizer=tokenizer, num_processes=num_processes, progress=lambda *update: told.append(update)
    )
    assert report.is_good, problems(report)
    assert problems(report) == ""
    assert (report.shards, report.documents, report.images, report.images_decoded) == (3, 10, 10, 10)
    assert (report.images_with_bytes, report.images_with_codes) == (10, 10)
    assert report.bytes == Manifest.load(folder).bytes
    assert report.documents_by == report.images_by == {("understand", "made"): 10}
    assert told == [("verify", 4, 10), ("verify", 8, 10), ("verify", 10, 10)]


INTERRUPTED = """
import multiprocessing, os, signal, sys
from data_pipeline.verify import verify

def interrupt(*_):
    os.killpg(0, signal.SIGINT)  # as a terminal does

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    try:
        verify(sys.argv[1], num_processes=2, progress=interrupt)
    except KeyboardInterrupt:
        print(len(multiprocessing.active_children()), "left")
"""


def test_an_interrupt_ends_all_processes_without_a_word(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(verify_module.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, str(script), str(folder)],
        start_new_session=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0 left\n", "")


def test_an_extended_header_of_any_size_is_not_taken_into_memory(folder: Path) -> None:
    name = "shard-000000.tar"
    header = tarfile.TarInfo("0.json")
    header.size, header.type = verify_module.MAX_HEADER_BYTES + 1, tarfile.XHDTYPE
    (folder / name).write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(folder / name, 2 * verify_module.MAX_HEADER_BYTES)
    report = verify(folder)
    assert "extended header claims" in problems(report)


def test_a_sample_above_the_cap_is_a_finding_and_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tar_sample.MAX_SAMPLE_BYTES", 1000)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    report = verify(folder)
    assert report.problems == {"sample is too large": 10}


def test_lengths_are_those_that_the_model_gets(folder: Path, tokenizer: Path, png: bytes) -> None:
    vocab = Vocab.load(tokenizer)
    encodings = [encode(document, vocab) for document in documents(png)]
    lengths = sorted(len(encoding) for encoding in encodings if isinstance(encoding, Encoded))
    report = verify(folder, tokenizer=tokenizer)
    assert sorted(report.lengths["understand"].elements()) == lengths
    assert report.longest == (lengths[-1], "009")
    rows = [line.split() for line in summary(report).splitlines()]
    assert ["understand", f"{sum(lengths):,}", f"{lengths[4]}", f"{lengths[9]}", f"{lengths[9]}"] in rows


def test_a_folder_without_codes_and_one_without_images_are_good_too(
    tmp_path: Path, png: bytes, tokenizer: Path
) -> None:
    plain = [make_document(f"{i}", image_bytes={"0.png": png}, codes={}) for i in range(3)]
    bare = [make_document(f"{i}", image_bytes={}) for i in range(3)]
    for name, made, with_codes in (("plain", plain, None), ("bare", bare, tokenizer)):
        report = verify(write(tmp_path / name, made, with_codes), tokenizer=tokenizer)
        assert problems(report) == ""
        assert report.documents == 3
        assert report.images_decoded == (3 if name == "plain" else 0)


@pytest.mark.parametrize(("images", "num_decoded"), [(None, 10), (0, 0), (1, 1), (3, 3), (10, 10), (99, 10)])
def test_a_sample_of_images_is_exactly_as_large_as_asked(folder: Path, images: int | None, num_decoded: int) -> None:
    assert verify(folder, images=images).images_decoded == num_decoded


def test_a_sample_of_images_is_spread_over_the_whole_folder(tmp_path: Path, png: bytes) -> None:
    made = [make_document(f"{i}", image_bytes={"0.png": b"broken"}, codes={}) for i in range(12)]
    report = verify(write(tmp_path / "shards", made, None), images=3)
    assert [finding.shard[-5] for finding in report.findings] == ["0", "1", "2"]


def append(content: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(path.read_bytes() + content)


def make_fifo(path: Path) -> None:
    """Opened like a file, it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "category"),
    [
        ("shard-000001.tar", Path.unlink, "file is missing"),
        ("shard-000001.tar.idx", Path.unlink, "file is missing"),
        ("shard-000001.tar", make_fifo, "file is missing"),
        ("shard-000001.tar", append(b"\0" * 512), "manifest does not fit"),
        ("shard-000001.tar", append(b"x" * 512), "tar is damaged"),
        ("shard-000001.tar", flip, "checksum differs"),
        ("shard-000001.tar.idx", append(b"\0" * 8), "index does not fit"),
        ("shard-000009.tar", Path.touch, "file not in the manifest"),
        ("shard-000001.tar.tmp", Path.touch, "file not in the manifest"),
        ("shard-000001.tar.idx.tmp", Path.touch, "file not in the manifest"),
    ],
)
def test_files_that_are_not_as_the_manifest_says_are_found(
    folder: Path, name: str, change: Callable[[Path], object], category: str
) -> None:
    change(folder / name)
    report = verify(folder, images=0)
    assert category in report.problems
    assert any(finding.shard in name for finding in report.findings)
    assert report.shards == 3
    assert report.documents >= 6  # those of the other shards


def test_nothing_stops_it_and_everything_is_in_the_list(folder: Path, tokenizer: Path) -> None:
    (folder / "shard-000000.tar").unlink()
    flip(folder / "shard-000001.tar")
    (folder / "shard-000002.tar.idx").write_bytes(b"x" * 24)
    (folder / "extra.tar").touch()
    report = verify(folder, tokenizer=tokenizer)
    assert {(finding.shard, finding.category) for finding in report.findings} >= {
        ("shard-000000.tar", "file is missing"),
        ("shard-000001.tar", "checksum differs"),
        ("shard-000002.tar", "index does not fit"),
        ("extra.tar", "file not in the manifest"),
    }
    text = problems(report)
    assert all(f"{count:,} x {category}" in text for category, count in report.problems.items())


def test_a_folder_that_is_not_finished_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=MANIFEST_NAME):
        verify(tmp_path / "nothing")
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(FileNotFoundError, match="finished"):
        verify(folder)


def test_documents_behind_a_damaged_header_are_still_checked(tmp_path: Path, png: bytes) -> None:
    made = [make_document(f"{i}", image_bytes={"0.png": png if i < 3 else b"broken"}, codes={}) for i in range(4)]
    folder = write(tmp_path / "shards", made, None)
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"1.json")] ^= 1
    path.write_bytes(content)
    report = verify(folder)
    assert report.problems == {
        "checksum differs": 1,
        "tar is damaged": 1,
        "tar cannot be read": 1,
        "image cannot be decoded": 1,
    }
    assert [finding.place for finding in report.findings][2:] == ["1", "3"]


@pytest.mark.parametrize(
    ("codes", "category"),
    [
        (CODES + np.uint16(NUM_CODES), "code out of range"),
        (CODES.astype(np.uint32), "codes of another dtype"),
        (np.zeros((3, 2), np.uint16), "codes of another shape"),
    ],
)
def test_codes_that_the_tokenizer_cannot_have_made_are_found(
    tmp_path: Path, tokenizer: Path, png: bytes, codes: np.ndarray, category: str
) -> None:
    made = [*documents(png, 2), make_document("bad", image_bytes={"0.png": png}, codes={"0.npy": codes})]
    report = verify(write(tmp_path / "shards", made, tokenizer), tokenizer=tokenizer)
    assert report.problems == {category: 1}
    assert report.findings[0].place == "bad"
    assert verify(tmp_path / "shards").is_good  # without the tokenizer nobody can know


def test_codes_of_another_or_an_unknown_tokenizer_are_found(folder: Path, tokenizer: Path) -> None:
    shards = Manifest.load(folder).shards
    write_manifest(folder, shards, "0123456789abcdef")
    assert verify(folder, tokenizer=tokenizer).problems == {"codes of another image tokenizer": 1}
    write_manifest(folder, shards, None)
    assert verify(folder, tokenizer=tokenizer).problems == {"codes of an unknown tokenizer": 10}


def test_an_image_without_codes_in_a_folder_with_codes_is_found(tmp_path: Path, tokenizer: Path, png: bytes) -> None:
    made = [*documents(png, 2), make_document("bad", image_bytes={"0.png": png}, codes={})]
    assert verify(write(tmp_path / "shards", made, tokenizer)).problems == {"image has no codes": 1}


def test_findings_and_sources_stay_few_however_many_documents_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_report, "NUM_SOURCES", 5)
    count = 3 * KEPT_PER_CATEGORY
    made = [
        make_document(f"{i}", image_bytes={"0.png": b"broken"}, codes={}, source=f"source {i}" * 50)
        for i in range(count)
    ]
    report = verify(write(tmp_path / "shards", made, None, samples_per_shard=count // 2))
    assert report.problems == {"image cannot be decoded": count}
    assert len(report.findings) == KEPT_PER_CATEGORY
    assert len(report.documents_by) == 6
    assert report.documents_by[("understand", "(others)")] == count - 5
    assert f"... and {2 * KEPT_PER_CATEGORY} more" in problems(report)
    assert len(summary(report)) < 2000


def test_names_from_a_shard_cannot_act_on_the_terminal(tmp_path: Path, png: bytes) -> None:
    made = make_document("\x1b[2Jkey", image_bytes={"0.png": b"broken"}, codes={}, source="\x1b]0;title\x07")
    report = verify(write(tmp_path / "shards", [made], None))
    assert "\\x1b[2Jkey" in problems(report)
    assert "\x1b" not in problems(report) + summary(report)


def test_a_remote_folder_is_checked_as_a_local_one(folder: Path, tokenizer: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/verify-test", recursive=True)
    local, remote = verify(folder, tokenizer=tokenizer), verify("memory://verify-test", tokenizer=tokenizer)
    assert problems(remote) == ""
    assert summary(remote) == summary(local)
    memory.pipe_file("/verify-test/shard-000001.tar", b"\0" * 10)
    assert "manifest does not fit" in verify("memory://verify-test").problems


def test_a_shard_that_the_disk_cannot_read_is_a_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, length: int, offset: int) -> bytes:
        raise OSError("Input/output error")

    monkeypatch.setattr(verify_module.os, "pread", broken)
    report = verify(folder)
    assert report.problems == {"file cannot be read": 3}
    assert "Input/output error" in problems(report)


def test_a_manifest_with_the_wrong_count_is_found(folder: Path) -> None:
    first, *rest = Manifest.load(folder).shards
    write_manifest(folder, [ShardInfo(first.name, 3, first.bytes, first.sha256), *rest], None)
    assert "manifest does not fit" in verify(folder, images=0).problems


def test_a_shard_that_was_cut_between_two_documents_is_found_though_its_manifest_agrees(
    tmp_path: Path, png: bytes
) -> None:
    folder = write(tmp_path / "shards", documents(png, 2), None)
    path, index = folder / "shard-000000.tar", folder / "shard-000000.tar.idx"
    offsets = np.fromfile(index, "<u8")[:2]
    os.truncate(path, int(offsets[1]))
    offsets.tofile(index)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(folder, [ShardInfo(path.name, 1, int(offsets[1]), sha256)], None)
    assert verify(folder).problems == {"tar is damaged": 1, "codes of an unknown tokenizer": 1}


@pytest.mark.parametrize("entries", [[4096, 4096], [4096, 1 << 62], [1 << 62, 4096]])
def test_behind_a_damaged_header_no_index_is_followed_out_of_the_shard(
    tmp_path: Path, png: bytes, entries: list[int]
) -> None:
    folder = write(tmp_path / "shards", documents(png, 3), None)
    path, index = folder / "shard-000000.tar", folder / "shard-000000.tar.idx"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    np.array([0, 1024, *entries], "<u8").tofile(index)
    assert {"tar is damaged", "index does not fit"} <= set(verify(folder).problems)
