"""Documents, codes and pictures as an attacker or a broken copy makes them: skipped, counted and named, never run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.decode_image import decode_image
from data_pipeline.encode import encode
from data_pipeline.schema import Document, Rejected
from data_pipeline.split import Split
from data_pipeline.verify import verify
from tests.hostile import (
    CODES,
    JPEG,
    PNG,
    assert_skipped,
    assert_streamed,
    assert_verify_finds,
    guarded_folder,
    record,
    write_members,
)
from tests.test_schema import npy
from tests.test_vocab import VOCAB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from guarded_folder(tmp_path, monkeypatch)


# -- the members of a document


@pytest.mark.parametrize(
    ("content", "category"),
    [
        (b"", "json cannot be read"),
        (b"[]", "json is not an object"),
        (b"null", "json is not an object"),
        (b"\xff\xfe{}", "json is not valid UTF-8"),
        (b'{"texts": ["\xe9"]}', "json is not valid UTF-8"),
        (b'{"texts": ["\\ud800"], "images": [null], "task": "text"}', "json is not valid UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "json cannot be read"),
        (b'{"meta":' + b"[" * 900 + b"]" * 900 + b"}", "json cannot be read|json is nested too deep"),
        (b'{"meta":' + b"[" * 300 + b"]" * 300 + b"}", "json is nested too deep"),
        (b'{"meta": ' + b"9" * 5000 + b"}", "json cannot be read"),
        (record(texts=["b"], images=["0.png"]), "a slot is not exactly one of text and image"),
        (record(texts=[None], images=[None]), "a slot is not exactly one of text and image"),
        (record(texts=["b"]), "texts and images are not two lists of the same length, at least one slot long"),
        (record(texts=[], images=[]), "texts and images are not two lists of the same length, at least one slot long"),
        (record(texts="ab"), "texts and images are not two lists of the same length, at least one slot long"),
        (record(texts=[None, float("nan")]), "a slot is not a string"),
        (record(loss=[float("nan"), True]), "loss is not one true or false for each slot"),
        (record(loss=[True]), "loss is not one true or false for each slot"),
        (record(images=["../../0.png", None]), "image name is not like 0.jpg"),
        (record(images=["1.png", None]), "image has neither bytes nor codes"),
        (record(task="t" * 100_000), "unknown task"),
        (record(task={}), "unknown task"),
        (record(source=1), "source is not a string or meta is not an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_json_that_is_no_document_is_skipped_with_a_short_reason(folder: Path, content: bytes, category: str) -> None:
    members = {"json": content, "0.png": PNG, "0.npy": npy(CODES)}
    refused = Document.from_members("a", members)
    assert isinstance(refused, Rejected)
    assert refused.category in category.split("|")
    assert len(refused.reason) <= 500
    write_members(folder, *((f"a.{suffix}", data) for suffix, data in members.items()))
    assert_skipped(folder, refused.category)


def test_of_two_equal_names_in_a_json_the_last_counts_for_every_reader() -> None:
    content = b'{"texts": ["a"], "texts": ["b"], "images": [null], "task": "text"}'
    document = Document.from_members("0", {"json": content})
    assert isinstance(document, Document)
    assert document.texts == ("b",)


def test_what_can_be_read_can_be_written_again_at_any_depth_of_the_stack() -> None:
    """Reading and writing JSON share one limit of nesting with Python's calls; a crafted depth would be read and then
    stop `uvlm data tokenize`."""
    content = record(texts=["x"], images=[None], meta={"deep": json.loads("[" * 60 + "]" * 60)})
    document = Document.from_members("0", {"json": content})
    assert isinstance(document, Document)

    def write_from(depth: int) -> bytes:
        return write_from(depth - 1) if depth else document.to_members()["json"]

    assert write_from(700) == document.to_members()["json"]


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("unpickled.txt"), "code ran"))


@pytest.mark.parametrize(
    ("content", "category"),
    [
        (npy(np.array([Payload()], dtype=object), allow_pickle=True), "codes are not uint16 or uint32"),
        (pickle.dumps(Payload()), "codes are not a .npy file of version 1.0"),
        (npy(CODES)[:-1], "codes hold more or fewer bytes than their shape says"),
        (npy(CODES) + b"\0", "codes hold more or fewer bytes than their shape says"),
        (npy(CODES)[:40], "codes are not a .npy file of version 1.0"),
        (b"", "codes are not a .npy file of version 1.0"),
        (npy(CODES.astype(np.int64)), "codes are not uint16 or uint32"),
        (npy(CODES.astype(np.float32)), "codes are not uint16 or uint32"),
        (npy(CODES.astype(">u2")), "codes are not uint16 or uint32"),
        (npy(CODES.reshape(1, 2, 2)), "codes are not of shape [h, w]"),
        (npy(CODES[:0]), "codes are not of shape [h, w]"),
        (npy(CODES).replace(b"(2, 2)", b"(-2,2)"), "codes are not of shape [h, w]"),
        (npy(CODES).replace(b"(2, 2)", b"(((((("), "codes have a damaged header"),
        (npy(CODES).replace(b"'<u2'", b"exit)"), "codes have a damaged header"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_codes_that_are_none_are_skipped_and_never_unpickled(folder: Path, content: bytes, category: str) -> None:
    write_members(folder, ("a.0.npy", content), ("a.0.png", PNG), ("a.json", record()))
    assert_skipped(folder, category)
    assert not list(folder.parent.rglob("unpickled.txt"))


def test_the_payload_of_these_tests_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        pickle.loads(pickle.dumps(Payload()))  # noqa: S301  what must never happen elsewhere
        (tmp_path / "unpickled.txt").unlink()  # it was there


def test_a_header_that_claims_a_trillion_codes_allocates_nothing(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (10**6, 10**6)})
    write_members(folder, ("a.0.npy", header.getvalue() + b"\0" * 64), ("a.0.png", PNG), ("a.json", record()))
    assert_skipped(folder, "codes hold more or fewer bytes than their shape says")


def test_codes_out_of_range_are_skipped_by_the_stream_and_found_by_verify(folder: Path, tokenizer: Path) -> None:
    write_members(folder, ("a.0.npy", npy(CODES + 1000)), ("a.0.png", PNG), ("a.json", record()))
    document = Split.open(folder).read(1)
    assert isinstance(document, Document)
    assert isinstance(encode(document, VOCAB), Rejected)
    assert_streamed(folder, "code out of range")
    assert_verify_finds(verify(folder, tokenizer=tokenizer), "code out of range")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder whose weights nobody needs here."""
    from tests.test_verify import make_tokenizer_folder

    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


# -- pictures


def png_of(width: int, height: int) -> bytes:
    """A grey PNG, honest or not about its rows: they are all zero and compress a thousandfold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((width + 1) * height, 1 << 26)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.jpg", b""),
        ("0.jpg", JPEG[: len(JPEG) // 2]),
        ("0.jpg", JPEG[:100]),
        ("0.png", PNG[:-20]),
        ("0.png", png_of(100_000, 100_000)),
        ("0.png", png_of(20_000, 20_000)),
        ("0.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n(unpickled.txt) (w) file\n"),
        ("0.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ],
    ids=["zero bytes", "half", "header", "cut png", "header bomb", "real bomb", "postscript", "svg"],
)
def test_a_picture_that_is_broken_or_a_bomb_is_found_and_never_half_decoded(
    folder: Path, name: str, content: bytes
) -> None:
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        decode_image(content)
    assert len(str(caught.value)) < 400
    write_members(folder, (f"a.{name}", content), ("a.0.npy", npy(CODES)), ("a.json", record(images=[name, None])))
    report = verify(folder)
    assert report.problems == {"image cannot be decoded": 1}
    assert (report.documents, report.images_decoded) == (3, 3)
