"""A document as a picture: whatever it holds, it is drawn, and what is drawn is what the model reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from data_pipeline import show as show_module
from data_pipeline.image_tokens import ImageTokenizer, psnr
from data_pipeline.schema import Document
from data_pipeline.show import LOSS, LOSS_EDGE, WIDTH, parse_document, show, token_pieces
from tests.test_image_tokens import SIZE, encoded, make_folder, random_images
from tests.test_schema import make_document
from tests.test_verify import write
from tests.test_vocab import VOCAB, make_tokenizer

PICTURES = random_images(2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_folder(folder / "image")
    (folder / "text").mkdir()
    make_tokenizer().save(str(folder / "text" / "tokenizer.json"))
    return folder


def picture_document(tokenizer: Path | None, key: str = "cat", **changes: object) -> Document:
    png = encoded(Image.fromarray(PICTURES[0]))
    codes = {}
    if tokenizer is not None:
        codes = {"1.npy": ImageTokenizer.load(tokenizer / "image").encode(PICTURES[:1])[0]}
    values = {"task": "generate", "loss": (False, True), "image_bytes": {"1.png": png}, "codes": codes, **changes}
    return make_document(key, ("a red circle", None), **values)


def drawn(tmp_path: Path, document: Document, tokenizer: Path | None = None, **options: object) -> np.ndarray:
    """uint8 [H, WIDTH, 3] of the page."""
    has_codes = bool(document.codes)
    folder = write(tmp_path / "shards", [document], tokenizer if has_codes else None)
    assert show(folder, 0, tmp_path / "page.png", tokenizer=tokenizer, **options) == document.key  # type: ignore[arg-type]
    with Image.open(tmp_path / "page.png") as page:
        assert page.format == "PNG"
        pixels = np.asarray(page.convert("RGB"))
    assert pixels.shape[1] == WIDTH
    assert pixels.shape[0] < show_module.MAX_HEIGHT + 1600
    return pixels


def num_pixels(page: np.ndarray, color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((page == wanted).all(axis=2).sum())


def contains(page: np.ndarray, picture: np.ndarray, factor: int) -> bool:
    """Whether the picture, each pixel `factor` wide and high, stands somewhere on the page."""
    large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    corners = np.argwhere((page == large[0, 0]).all(axis=2))
    sides = [page[y : y + len(large), x : x + large.shape[1]] for y, x in corners.tolist()]
    return any(side.shape == large.shape and (side == large).all() for side in sides)


def test_the_original_and_what_its_codes_decode_to_stand_side_by_side(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = picture_document(tokenizer)
    written: list[str] = []
    monkeypatch.setattr(
        show_module,
        "_shortened",
        lambda text, length: written.append(text) or text,  # type: ignore[func-returns-value]
    )
    page = drawn(tmp_path, document, tokenizer, pack_tokens=64)
    decoded = ImageTokenizer.load(tokenizer / "image").decode(document.codes["1.npy"][None])
    factor = show_module.PICTURE // SIZE
    assert contains(page, PICTURES[0], factor)
    assert contains(page, decoded[0], factor)
    assert f"original 1.png, {SIZE} x {SIZE} pixels" in written
    assert f"decoded from 4 x 4 codes, {psnr(PICTURES[:1], decoded)[0]:.1f} dB" in written


def test_what_carries_loss_is_marked_and_nothing_else(tmp_path: Path) -> None:
    amounts = {}
    for name, loss in (("none", (False, False)), ("text", (True, False)), ("image", (False, True))):
        page = drawn(tmp_path / name, picture_document(None, loss=loss))
        amounts[name] = (num_pixels(page, LOSS), num_pixels(page, LOSS_EDGE))
    legend = amounts["none"]
    assert amounts["text"][0] > legend[0] + 500
    assert amounts["text"][1] == legend[1]
    assert amounts["image"][0] == legend[0]
    assert amounts["image"][1] > legend[1] + 2000


def test_a_document_is_named_by_its_number_or_its_key(tmp_path: Path) -> None:
    made = [picture_document(None, key) for key in ("a", "b", "0007")]
    folder = write(tmp_path / "shards", made, None, samples_per_shard=2)
    out = tmp_path / "page.png"
    assert [show(folder, name, out) for name in (2, "b", "0007")] == ["0007", "b", "0007"]
    assert [parse_document(text) for text in ("0", "12", "0007", "b", "-1")] == [0, 12, "0007", "b", "-1"]
    for wrong in (3, -1, "c"):
        out.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"no document"):
            show(folder, wrong, out)
        assert not out.exists()


def test_codes_of_another_tokenizer_are_not_shown(tmp_path: Path, tokenizer: Path) -> None:
    other = tmp_path / "other"
    make_folder(other / "image", seed=1)
    (other / "text").mkdir()
    make_tokenizer().save(str(other / "text" / "tokenizer.json"))
    folder = write(tmp_path / "shards", [picture_document(tokenizer)], tokenizer)
    with pytest.raises(ValueError, match="holds codes of image tokenizer"):
        show(folder, 0, tmp_path / "page.png", tokenizer=other)


def test_a_document_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", [picture_document(None)], None)
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"task": "generate"', b'"task": "denerate"'))
    for name in (0, "cat"):
        with pytest.raises(ValueError, match="cannot be used: unknown task"):
            show(folder, name, tmp_path / "page.png")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_bytes": {}},
        {"image_bytes": {"1.png": b"broken"}},
        {"codes": {}},
        {"codes": {"1.npy": np.full((4, 4), 999, np.uint16)}},
        {"codes": {"1.npy": np.zeros((9, 2), np.uint16)}},
        {"image_bytes": {"1.png": encoded(Image.new("RGB", (3000, 2), "red"))}},
        {"image_bytes": {"1.png": encoded(Image.new("RGB", (1, 700), "red"))}},
        {"source": "s" * 300, "key": "k" * 90},
        {"source": ""},
    ],
)
def test_whatever_an_image_lacks_the_rest_is_drawn(tmp_path: Path, tokenizer: Path, changes: dict[str, object]) -> None:
    changes = dict(changes)
    key = str(changes.pop("key", "cat"))
    document = picture_document(tokenizer, key, **changes)
    if document.image_bytes or document.codes:
        drawn(tmp_path / "with", document, tokenizer)
        drawn(tmp_path / "without", document)


TEXTS = [
    "",
    "   ",
    "\n\n\tline\r\nend\n",
    "word " * 3000,
    "x" * 5000,
    "\n" * 5000,
    "汉字 и кириллица, العربية, हिन्दी, 👩‍👩‍👧‍👦, e\u0301, \x00\x1b[31m \u202eback",
    "<|image|> <|end|> typed",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_any_text_is_drawn(tmp_path: Path, tokenizer: Path, text: str, with_tokenizer: bool) -> None:
    document = make_document("0", (text, text), task="text", loss=(False, True), image_bytes={}, codes={})
    drawn(tmp_path, document, tokenizer if with_tokenizer else None, pack_tokens=16)


def test_control_characters_are_drawn_as_spaces(tmp_path: Path) -> None:
    made = [make_document("0", (text,), loss=(True,), image_bytes={}, codes={}) for text in ("a\tb\x07c", "a b c")]
    assert (drawn(tmp_path / "a", made[0]) == drawn(tmp_path / "b", made[1])).all()


def test_a_long_document_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    line = show_module._Page._line

    def tell(page: show_module._Page, text: str) -> Image.Image:
        told.append(text)
        return line(page, text)

    monkeypatch.setattr(show_module._Page, "_line", tell)
    document = make_document("0", ("one line",) * 5000, task="text", loss=(True,) * 5000, image_bytes={}, codes={})
    page = drawn(tmp_path, document)
    assert len(told) == 1
    assert told[0].startswith("... 4,9")
    assert told[0].endswith(" more slots")
    assert page.shape[0] > 1000


def test_another_font_is_used_where_one_is_given(tmp_path: Path) -> None:
    builtin = ImageFont.load_default(20)
    assert isinstance(builtin, ImageFont.FreeTypeFont)
    content = builtin.path
    assert isinstance(content, io.BytesIO)
    (tmp_path / "font.ttf").write_bytes(content.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(ImageFont, "load_default")
        texts = make_document("0", tuple(TEXTS), task="text", loss=(True,) * len(TEXTS), image_bytes={}, codes={})
        show_module._font.cache_clear()
        drawn(tmp_path / "a", texts, font=tmp_path / "font.ttf")
    with pytest.raises(OSError, match=r"missing\.ttf|cannot open resource"):
        drawn(tmp_path / "b", picture_document(None), font=tmp_path / "missing.ttf")


def test_texts_beyond_ascii_get_a_font_of_the_machine_if_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builtin = ImageFont.load_default(20)
    assert isinstance(builtin, ImageFont.FreeTypeFont)
    assert isinstance(builtin.path, io.BytesIO)
    (tmp_path / "font.ttf").write_bytes(builtin.path.getvalue())
    monkeypatch.setattr(show_module, "FONTS", ("no-such-font.ttf", str(tmp_path / "font.ttf")))
    texts = [make_document("0", (text,), loss=(True,), image_bytes={}, codes={}) for text in ("plain", "café")]
    assert [show_module._font_for(document) for document in texts] == [None, str(tmp_path / "font.ttf")]
    monkeypatch.setattr(show_module, "FONTS", ("no-such-font.ttf",))
    assert show_module._font_for(texts[1]) is None


@settings(max_examples=200)
@given(st.text(st.characters(codec="utf-8")))
def test_token_boundaries_cut_a_text_and_change_nothing(text: str) -> None:
    assert "".join(token_pieces(text, VOCAB)) == text


def test_token_boundaries_are_those_of_the_tokenizer() -> None:
    text = "what color is the circle?"
    assert token_pieces(text, VOCAB) == [VOCAB.decode_text([token]) for token in VOCAB.encode_text(text)]
    assert token_pieces("é汉", VOCAB) == ["é", "汉"]  # several byte tokens each
