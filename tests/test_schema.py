"""Documents survive the way to disk and back, and what is wrong with one is told, never raised."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.schema import TASKS, Document, Rejected

CODES = np.arange(4, dtype=np.uint16).reshape(2, 2)


def make_document(key: str = "0", texts: tuple[str | None, ...] = (None, "what?", " blue"), **changes: Any) -> Document:
    """An image wherever there is no text, with codes 2x2; loss on the last slot."""
    images = tuple(f"{i}.png" if text is None else None for i, text in enumerate(texts))
    values: dict[str, Any] = {
        "task": "understand",
        "loss": tuple(i == len(texts) - 1 for i in range(len(texts))),
        "source": "made",
        "meta": {},
        "image_bytes": {image: b"png of " + key.encode() for image in images if image},
        "codes": {image.replace("png", "npy"): CODES for image in images if image},
    }
    return Document(key, texts, images, **{**values, **changes})


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def refused(key: str = "0", members: dict[str, bytes] | None = None, **changes: Any) -> str:
    """The reason why a good document with these changes is refused."""
    record: dict[str, Any] = {"texts": ["a", None], "images": [None, "0.png"], "task": "generate", **changes}
    good = {"json": json.dumps(record).encode(), "0.png": b"png"}
    result = Document.from_members(key, {**good, **(members or {})})
    assert isinstance(result, Rejected), "accepted"
    assert result.key == key
    return result.reason


def test_a_document_comes_back_from_its_members() -> None:
    document = make_document("7", meta={"id": "x", "n": [1, None]})
    again = Document.from_members("7", document.to_members())
    assert isinstance(again, Document)
    assert again.to_members() == document.to_members()
    assert (again.texts, again.images, again.loss, again.meta) == (
        document.texts,
        document.images,
        document.loss,
        document.meta,
    )
    assert again.codes["0.npy"].dtype == np.uint16
    np.testing.assert_array_equal(again.codes["0.npy"], CODES)


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(TASKS), st.booleans())
def test_any_text_survives(text: str, task: str, has_loss: bool) -> None:
    document = make_document(texts=(text,), task=task, loss=(has_loss,), source=text)
    again = Document.from_members("0", document.to_members())
    assert isinstance(again, Document)
    assert (again.texts, again.source, again.loss) == ((text,), text, (has_loss,))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("understand", (False, False, False, True)),
        ("generate", (False, True, False, False)),
        ("interleave", (False, True, True, True)),
        ("text", (True, False, True, True)),
    ],
)
def test_the_task_sets_the_default_loss(task: str, expected: tuple[bool, ...]) -> None:
    record = {"texts": ["a", None, "b", "c"], "images": [None, "0.png", None, None], "task": task}
    document = Document.from_members("0", {"json": json.dumps(record).encode(), "0.png": b""})
    assert isinstance(document, Document)
    assert document.loss == expected


def test_the_document_can_say_its_own_loss() -> None:
    record = {"texts": ["a", "b"], "images": [None, None], "task": "text", "loss": [False, True]}
    document = Document.from_members("0", {"json": json.dumps(record).encode()})
    assert isinstance(document, Document)
    assert document.loss == (False, True)


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_a_key_that_webdataset_would_cut_is_refused(key: str) -> None:
    assert "key" in refused(key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "translate"}, "unknown task"),
        ({"task": ["generate"]}, "unknown task"),
        ({"texts": ["a", "b"]}, "exactly one"),
        ({"texts": [None, None]}, "exactly one"),
        ({"texts": ["a"]}, "same length"),
        ({"texts": [], "images": []}, "same length"),
        ({"texts": "ab"}, "two lists"),
        ({"texts": [1, None]}, "not a string"),
        ({"texts": ["\ud800", None]}, "UTF-8"),
        ({"meta": {"a": "\udc00"}}, "UTF-8"),
        ({"images": [None, "1.png"]}, "neither bytes nor codes"),
        ({"images": [None, "../0.png"]}, "image name"),
        ({"images": [None, "0.npy"]}, "image name"),
        ({"images": [None, "json"]}, "image name"),
        ({"texts": [None, None], "images": ["0.png", "0.jpg"]}, "share a stem"),
        ({"loss": [True]}, "loss"),
        ({"loss": [0, 1]}, "loss"),
        ({"loss": "no"}, "loss"),
        ({"source": 3}, "source"),
        ({"meta": []}, "meta"),
    ],
)
def test_a_record_that_breaks_the_contract_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refused(**changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "not an object"),
        (b'{"texts": ["\xff"]}', "UTF-8"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        ('{"task": "text"}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_a_json_that_is_none_is_refused(content: bytes, words: str) -> None:
    assert words in refused(members={"json": content})


def test_a_sample_without_json_is_refused() -> None:
    result = Document.from_members("0", {"0.png": b""})
    assert isinstance(result, Rejected)
    assert "no json" in result.reason


def test_pickled_codes_are_refused_and_not_run() -> None:
    assert "codes" in refused(members={"0.npy": npy(np.array([[{}]], dtype=object), allow_pickle=True)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(np.zeros(4, np.uint16)), "[h, w]"),
        (npy(np.zeros((2, 2, 3), np.uint16)), "[h, w]"),
        (npy(np.zeros((0, 2), np.uint16)), "[h, w]"),
        (npy(np.zeros((2, 2), np.int64)), "uint16"),
        (npy(np.zeros((2, 2), ">u2")), "uint16"),
        (npy(np.zeros((2, 2), np.uint16))[:-1], "bytes"),
        (npy(np.zeros((2, 2), np.uint16)) + b"x", "bytes"),
        (npy(np.zeros((2, 2), np.uint16)).replace(b"(2, 2)", b"(9**9)"), "damaged header"),
        (npy(np.zeros((2, 2), np.uint16))[:20], "npy"),
        (b"", "npy"),
    ],
)
def test_codes_of_the_wrong_kind_are_refused(content: bytes, words: str) -> None:
    assert words in refused(members={"0.npy": content})


def test_a_header_that_claims_too_much_allocates_nothing() -> None:
    header = npy(np.zeros((2, 2), np.uint16))
    huge = header.replace(b"(2, 2), }              ", b"(2000000, 2000000000), }")[: len(header)]
    assert b"2000000000" in huge
    assert "codes" in refused(members={"0.npy": huge})


def test_codes_in_column_order_keep_their_values() -> None:
    codes = np.asfortranarray(np.arange(6, dtype=np.uint32).reshape(2, 3))
    record = {"texts": [None], "images": ["0.png"], "task": "generate"}
    document = Document.from_members("0", {"json": json.dumps(record).encode(), "0.npy": npy(codes)})
    assert isinstance(document, Document)
    np.testing.assert_array_equal(document.codes["0.npy"], codes)


def test_reasons_are_counted_by_what_comes_before_the_colon() -> None:
    assert Rejected("0", "unknown task: 'x'").category == "unknown task"
    assert Rejected("0", "no json member").category == "no json member"
