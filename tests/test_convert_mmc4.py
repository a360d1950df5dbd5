"""Format mmc4: images go to the sentences they are matched with; nothing that was not matched gets in.

The records follow the documented schemas:
mmc4          https://github.com/allenai/mmc4 (README, "Documents")
OpenFlamingo  https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/scripts/convert_mmc4_to_wds.py:
              a tar of json members; image_base64 is str() of bytes, and is missing where the image was
"""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.convert import convert
from data_pipeline.convert.draft import Draft
from data_pipeline.convert.mmc4 import draft
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected
from data_pipeline.split import Split

JPEG = b"\xff\xd8\xff not decoded here"


def image(name: str, **fields: Any) -> dict[str, Any]:
    return {"face_detections": None, "image_name": f"{name}.jpg", "raw_url": f"http://host/{name}.jpg", **fields}


def document(**fields: Any) -> dict[str, Any]:
    """Three sentences, three images: two at the last sentence, one at the first."""
    images = [image("a", matched_text_index=2), image("b", matched_text_index=0), image("c", matched_text_index=2)]
    return {
        "image_info": [{**info, "matched_sim": 0.27} for info in images],
        "similarity_matrix": [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.1, 0.3, 0.2]],
        "text_list": ["One.", "Two.", "Three."],
        "url": "http://host/page",
        "could_have_url_duplicate": 0,
        **fields,
    }


def without_index(*images: str) -> list[dict[str, Any]]:
    return [image(name) for name in images]


def drafted(record: dict[str, Any], **options: Any) -> Draft:
    result = draft("k", record, Options(**options))
    assert isinstance(result, Draft), result
    return result


def test_an_image_stands_before_its_sentence_and_sentences_between_images_are_one_text() -> None:
    result = drafted(document())
    assert result.texts == [None, "One. Two.", None, None, "Three."]
    assert result.images == ["http://host/b.jpg", None, "http://host/a.jpg", "http://host/c.jpg", None]
    assert (result.task, result.loss, result.meta) == ("interleave", None, {"url": "http://host/page"})


def test_local_images_are_named_where_an_image_root_is_given() -> None:
    assert drafted(document(), image_root=Path("/images")).images == ["b.jpg", None, "a.jpg", "c.jpg", None]


def test_without_indices_images_are_assigned_one_to_one_for_the_highest_total() -> None:
    # Greedily both images would take sentence 0; together 0.8 + 0.8 beats 0.9 + 0.1
    similarity = [[0.9, 0.8, 0.0], [0.8, 0.1, 0.0]]
    result = drafted(document(image_info=without_index("a", "b"), similarity_matrix=similarity))
    assert result.texts == [None, "One.", None, "Two. Three."]
    assert result.images == ["http://host/b.jpg", None, "http://host/a.jpg", None]


def test_images_without_a_match_are_left_out() -> None:
    images = [image("a"), image("b", matched_text_index=0), image("c", matched_text_index=None)]
    assert drafted(document(image_info=images)).images == ["http://host/b.jpg", None]
    more_images_than_sentences = {"text_list": ["One."], "similarity_matrix": [[0.1], [0.2]]}
    result = drafted(document(image_info=without_index("a", "b"), **more_images_than_sentences))
    assert result.images == ["http://host/b.jpg", None]


def test_an_empty_sentence_keeps_the_place_of_its_image() -> None:
    result = drafted(document(text_list=["One.", "Two.", " "]))
    assert result.texts == [None, "One. Two.", None, None]


def test_a_url_that_is_no_unicode_costs_no_document() -> None:
    assert drafted(document(url="\ud800")).meta == {}


@pytest.mark.parametrize("with_index", [True, False])
def test_a_tar_of_openflamingo_gives_its_inline_images_alone(with_index: bool) -> None:
    infos = document()["image_info"] if with_index else without_index("a", "b", "c")
    infos[0]["image_base64"] = str(base64.b64encode(JPEG))  # b'...', as the script writes it
    infos[1]["image_base64"] = base64.b64encode(JPEG[:5]).decode()
    assert infos[0]["image_base64"].startswith("b'")
    result = drafted({"json": json.dumps(document(image_info=infos)).encode()})
    assert result.images == [JPEG[:5], None, JPEG, None]
    assert result.texts == [None, "One. Two.", None, "Three."]


def test_the_row_of_an_image_that_is_not_inline_takes_part_in_no_assignment() -> None:
    infos = without_index("a", "b")
    infos[1]["image_base64"] = base64.b64encode(JPEG).decode()
    similarity = [[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]]
    result = drafted(document(image_info=infos, similarity_matrix=similarity))
    assert (result.texts, result.images) == (["One. Two.", None, "Three."], [None, JPEG, None])


NO_NUMBERS = "similarity_matrix holds something else than numbers"
NOT_FINITE = "similarity_matrix holds something else than finite numbers"
SHAPE = "similarity_matrix is not of shape [images, sentences]"
NO_INDICES: tuple[Any, ...] = (3, -1, True, 0.0, "0", [])
INDEX = "matched_text_index is not the index of a sentence"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "text_list is not a list of sentences"),
        (document(text_list=[]), "text_list is not a list of sentences"),
        (document(text_list=["a", None, "c"]), "text_list is not a list of sentences"),
        (document(text_list=[" "] * 3), "document has no text"),
        (document(image_info=None), "image_info is not a list of objects"),
        (document(image_info=[None]), "image_info is not a list of objects"),
        (document(image_info=[]), "no image is matched to a sentence"),
        *[(document(image_info=[image("a", matched_text_index=j)]), INDEX) for j in NO_INDICES],
        *[
            (document(image_info=without_index("a"), similarity_matrix=matrix), reason)
            for matrix, reason in [
                (None, SHAPE),
                ([], SHAPE),
                ([[0.1, 0.2]], SHAPE),
                ([[0.1, 0.2, 0.3], [0.1]], SHAPE),
                (["abc"], SHAPE),
                ([[0.1, "0.2", 0.3]], NO_NUMBERS),
                ([[0.1, True, 0.3]], NO_NUMBERS),
                ([[0.1, float("nan"), 0.3]], NOT_FINITE),
                ([[0.1, float("inf"), 0.3]], NOT_FINITE),
                ([[0.1, 10**400, 0.3]], NOT_FINITE),
            ]
        ],
        (document(image_info=[{"matched_text_index": 0}]), "an image has no raw_url"),
        (document(image_info=[{"matched_text_index": 0, "raw_url": ["x"]}]), "an image has no raw_url"),
        *[
            (
                document(image_info=[image("a", matched_text_index=0, image_base64=data)]),
                "image_base64 cannot be decoded",
            )
            for data in ("%%%%", "YWJj%%%%", "a", "", "b''", 7, "é")
        ],
        ({"json": b"{"}, "record is not JSON"),
        ({"json": b'"\xff"'}, "record is not JSON"),
        ({"json": b"[" * 100_000}, "record is not JSON"),
        ({"json": b"[]"}, "record is not a JSON object"),
    ],
)
def test_what_is_not_a_document_is_refused(record: dict[str, Any], reason: str) -> None:
    result = draft("k", record, Options())
    assert isinstance(result, Rejected)
    assert result.category == reason


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("image_name", "raw_url", "matched_text_index", "image_base64")


def mostly(sound: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Three times of four what belongs there, so that the checks behind the first one are reached."""
    return st.one_of(sound, sound, sound, JSON_VALUES)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "text_list": mostly(st.lists(mostly(st.text(max_size=3)), min_size=1, max_size=2)),
            "image_info": mostly(
                st.lists(
                    mostly(
                        st.dictionaries(
                            st.sampled_from(FIELDS), st.text(max_size=4) | st.integers(-1, 2) | JSON_VALUES, max_size=4
                        )
                    ),
                    max_size=2,
                )
            ),
            "similarity_matrix": mostly(st.lists(mostly(st.lists(mostly(st.floats(0, 1)), max_size=2)), max_size=2)),
            "url": JSON_VALUES,
        },
    ),
    st.booleans(),
)
def test_any_content_yields_a_sound_draft_or_a_rejection(record: dict[str, Any], is_local: bool) -> None:
    result = draft("k", record, Options(image_root=Path("x")) if is_local else Options())
    if isinstance(result, Draft):
        for text, reference in zip(result.texts, result.images, strict=True):
            assert (text is None) != (reference is None)
            assert isinstance(text, str | None)
            assert isinstance(reference, str | bytes | None)


def test_a_tar_of_openflamingo_becomes_shards(tmp_path: Path) -> None:
    infos = [image("a", matched_text_index=2, image_base64=str(base64.b64encode(JPEG))), image("gone")]
    with tarfile.open(tmp_path / "000000000.tar", "w") as tar:
        for name, content in (("0f", json.dumps(document(image_info=infos))), ("1f", "{")):
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    report = convert("mmc4", tmp_path / "000000000.tar", tmp_path / "out")
    assert (report.documents_in, report.documents_out, report.rejected) == (2, 1, {"record is not JSON": 1})
    result = Split.open(tmp_path / "out").read(0)
    assert isinstance(result, Document)
    assert result.texts == ("One. Two.", None, "Three.")
    assert (result.loss, result.image_bytes) == ((False, True, True), {"0.jpg": JPEG})
