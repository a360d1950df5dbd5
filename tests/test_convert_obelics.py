"""Format obelics: two parallel lists become slots; what is not exactly one of text and image is refused.

The records follow the documented schemas:
OBELICS     https://huggingface.co/datasets/HuggingFaceM4/OBELICS (Data Fields)
OmniCorpus  https://huggingface.co/datasets/OpenGVLab/OmniCorpus-CC-210M (general_metadata and metadata are structs)
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.convert import convert
from data_pipeline.convert.draft import Draft
from data_pipeline.convert.obelics import check_columns, draft
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected
from data_pipeline.split import Split

OBELICS = {
    "images": ["https://cdn.host/images/urus.jpg", None],
    "metadata": json.dumps([{"document_url": "https://lamborghinichat.com/forum/", "alt_text": "an offer"}, None]),
    "general_metadata": json.dumps({"url": "https://lamborghinichat.com/forum/", "warc_record_offset": 308567562}),
    "texts": [None, "The mega-deal comes from QG.\n\nIt is valued at $9.2 billion."],
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["bytes", "path", "url", "id"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def drafted(record: dict[str, Any], **options: Any) -> Draft:
    result = draft("k", record, Options(**options))
    assert isinstance(result, Draft), result
    return result


def category(record: dict[str, Any]) -> str:
    result = draft("k", record, Options())
    assert isinstance(result, Rejected), result
    return result.category


def test_a_document_as_published_keeps_its_order_and_its_url() -> None:
    result = drafted(OBELICS)
    assert (result.texts, result.images) == (OBELICS["texts"], OBELICS["images"])
    assert (result.task, result.loss) == ("interleave", None)
    assert result.meta == {"url": "https://lamborghinichat.com/forum/"}


def test_a_struct_of_metadata_and_the_other_spelling_of_the_lists_are_read() -> None:
    lists = {"text_list": ["a", None], "image_list": [None, "1.png"]}
    struct = {"general_metadata": {"url": "https://host/", "id": "9", "fluency_prob": 0.9}, "metadata": [{"bytes": 9}]}
    result = drafted({"texts": None, **lists, **struct})
    assert (result.texts, result.images) == (["a", None], [None, "1.png"])
    assert result.meta == {"url": "https://host/", "id": "9"}


def test_columns_can_be_named() -> None:
    result = drafted({**OBELICS, "t": ["b", None], "i": [None, "x"]}, text_column="t", image_column="i")
    assert (result.texts, result.images) == (["b", None], [None, "x"])


def test_a_table_without_the_lists_is_an_error_that_names_its_columns() -> None:
    check_columns(["image_list", "text_list", "metadata"], Options())
    with pytest.raises(ValueError, match=r"no image column among its columns \(texts, url\)"):
        check_columns(["texts", "url"], Options())
    with pytest.raises(ValueError, match="no column 't'"):
        check_columns(["texts", "images"], Options(text_column="t"))


def test_images_may_be_bytes_and_structs() -> None:
    structs = [b"inline", {"bytes": b"parquet", "path": "b.png"}, {"bytes": None, "path": "a.png"}, {"path": "c.png"}]
    result = drafted({"texts": ["a", None, None, None, None], "images": [None, *structs]})
    assert result.images == [None, b"inline", b"parquet", "a.png", "c.png"]


def test_empty_slots_are_left_out() -> None:
    empty_image = {"bytes": None, "path": None}
    result = drafted({"texts": ["", "a", None, " \n", None, "b"], "images": [None, "", "x", "y", empty_image, None]})
    assert (result.texts, result.images) == (["a", None, None, "b"], [None, "x", "y", None])


def test_a_document_without_an_image_has_loss_on_its_first_text() -> None:
    assert drafted({"texts": ["a", None], "images": [None, None]}).task == "text"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "texts and images are not two lists"),
        ({"texts": "abc", "images": [None]}, "texts and images are not two lists"),
        ({"texts": ["a", "b"], "images": [None]}, "texts and images differ in length"),
        ({"texts": ["a"], "images": ["x"]}, "a slot holds both a text and an image"),
        ({"texts": [True], "images": [None]}, "a text is not a string"),
        ({"texts": ["a", None], "images": [None, 7]}, "an image is not a path, URL, bytes or image struct"),
        ({"texts": ["a", None], "images": [None, {}]}, "an image is not a path, URL, bytes or image struct"),
        ({"texts": ["a", None], "images": [None, {"url": "x"}]}, "an image is not a path, URL, bytes or image struct"),
        ({"texts": ["a", None], "images": [None, {"path": 7}]}, "an image is not a path, URL, bytes or image struct"),
        ({"texts": [None], "images": ["x"]}, "document has no text"),
        ({"texts": [], "images": []}, "document has no text"),
    ],
)
def test_what_is_not_a_document_is_refused(record: dict[str, Any], reason: str) -> None:
    assert category(record) == reason


@pytest.mark.parametrize("general", ["{", "[" * 100_000, "7", 7, [1], {"url": 1.5, "id": True}, {"url": "\ud800"}])
def test_unreadable_metadata_costs_no_document(general: Any) -> None:
    assert drafted({**OBELICS, "general_metadata": general}).meta == {}


@settings(max_examples=300)
@given(st.lists(st.tuples(JSON_VALUES, JSON_VALUES), max_size=3), JSON_VALUES, st.booleans())
def test_any_content_yields_a_sound_draft_or_a_rejection(pairs: list[Any], other: Any, whole: bool) -> None:
    lists = {"texts": [text for text, _ in pairs], "images": [image for _, image in pairs]}
    result = draft("k", lists | {"general_metadata": other} if whole else {"texts": other, "images": other}, Options())
    if isinstance(result, Draft):
        for text, image in zip(result.texts, result.images, strict=True):
            assert (text is None) != (image is None)
            assert isinstance(text, str | None)
            assert isinstance(image, str | bytes | None)


def test_a_parquet_file_becomes_shards(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n not decoded here"
    (tmp_path / "a.png").write_bytes(png)
    rows = [
        {**OBELICS, "images": ["a.png", None]},
        {**OBELICS, "images": ["a.png"]},
        {**OBELICS, "images": ["missing.png", None]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    report = convert("obelics", tmp_path / "train.parquet", tmp_path / "out")
    assert (report.documents_in, report.documents_out) == (3, 1)
    assert report.rejected == {"texts and images differ in length": 1, "image is missing": 1}
    document = Split.open(tmp_path / "out").read(0)
    assert isinstance(document, Document)
    assert document.texts == tuple(OBELICS["texts"])
    assert (document.task, document.loss, document.image_bytes) == ("interleave", (False, True), {"0.png": png})
