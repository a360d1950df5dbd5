"""One document as a picture to look at: what the model reads, in order, and what it is asked to predict.

    title      key, task, source, tokens by segment, share of image tokens
    strip      the document as it lies in a pack: one colour for each segment, what is supervised underlined
    slots      texts, wrapped, with their token boundaries; images beside what their codes decode to, with the PSNR

Whatever carries loss has one warm colour, the ground of a text and the frame of a picture. A tokenizer folder is needed
for tokens and decoded codes; without one, texts and originals are shown. A long document ends in "... n more slots".
Cost (run): 50 ms a page, and 3 s once to load torch and the image tokenizer.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.decode_image import decode_image
from data_pipeline.encode import IGNORED, SEGMENTS, Encoded, encode
from data_pipeline.image_tokens import psnr
from data_pipeline.schema import Document, Rejected, codes_name
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab

if TYPE_CHECKING:
    from data_pipeline.image_tokens import ImageTokenizer

WIDTH, MARGIN, GUTTER = 1000, 32, 48  # pixels
PICTURE, LINE, STRIP = 320, 30, 14
MAX_HEIGHT = 2400  # of the slots; what does not fit is counted
MAX_LINES, MAX_CHARACTERS = 36, 4000  # of one text

INK, QUIET, FAINT, ALARM = "#1f2430", "#7a8294", "#dde1ea", "#b3261e"
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")  # looked for on the machine, the first with the most letters
LOSS, LOSS_EDGE = "#ffe8c7", "#e8871e"
CUT = "#b4bccb"  # between two tokens
SEGMENT_COLORS = {"system": "#4a5163", "instruction": "#8fb3e0", "image": "#a78bca", "output": "#f0a44b"}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def show(
    location: Path | str,
    document: int | str,
    out: Path | str,
    *,
    tokenizer: Path | str | None = None,
    pack_tokens: int | None = None,
    font: Path | str | None = None,
) -> str:
    """Writes the PNG `out` of one document and returns the document's key.

    Args:
        document: its number in the folder, or its key, which is searched for from the first document on.
        tokenizer: a tokenizer folder, to see tokens and what the codes decode to.
        pack_tokens: the length of a pack, to see how much of one the document fills.
        font: a TrueType file with the letters of the texts; by default what this machine has.

    Raises ValueError where there is no such document, where it cannot be used, or its codes are of another tokenizer.
    """
    split = Split.open(location)
    vocab = Vocab.load(tokenizer) if tokenizer is not None else None
    known = split.manifest.image_tokenizer
    if vocab is not None and known not in (None, vocab.image_tokenizer):
        raise ValueError(
            f"{location} holds codes of image tokenizer {known}, {tokenizer} is {vocab.image_tokenizer}; "
            "name the tokenizer folder that made them, or none"
        )
    found = _found(split, document)
    image_tokenizer = None
    if vocab is not None and found.codes:
        from data_pipeline.image_tokens import ImageTokenizer

        image_tokenizer = ImageTokenizer.load(Path(str(tokenizer)) / "image")
    page = _Page(found, vocab, image_tokenizer, pack_tokens, _font_for(found) if font is None else str(font))
    page.draw().save(out, format="PNG")
    return found.key


def parse_document(text: str) -> int | str:
    """What a user names: "12" is a document's number, "000000012" and "cat" are keys."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,17}", text) else text


def _found(split: Split, wanted: int | str) -> Document:
    if isinstance(wanted, int):
        if not 0 <= wanted < len(split):
            raise ValueError(f"there is no document {wanted}; the folder holds {len(split):,}, counted from 0")
        candidates = iter([split.read(wanted)])
    else:
        candidates = (split.read(number) for number in range(len(split)))
    for document in candidates:
        if isinstance(wanted, int) or document.key == wanted:
            if isinstance(document, Rejected):
                raise ValueError(f"document {wanted} cannot be used: {document.reason}")
            return document
    raise ValueError(f"no document of the folder has the key {wanted!r}; a number such as 12 names one by its place")


def token_pieces(text: str, vocab: Vocab) -> list[str]:
    """The text cut at its token boundaries. Tokens that share a character, as bytes of one do, stay together."""
    pieces = []
    pending: list[int] = []
    position = 0
    for token in vocab.encode_text(text):
        pending.append(token)
        piece = vocab.decode_text(pending)
        if piece and text.startswith(piece, position):
            pieces.append(piece)
            position += len(piece)
            pending = []
    return pieces + ([text[position:]] if position < len(text) else [])


@dataclass(frozen=True)
class _Page:
    """A document and what it is drawn with. Every part is a picture WIDTH wide; the page stacks them."""

    document: Document
    vocab: Vocab | None
    image_tokenizer: ImageTokenizer | None
    pack_tokens: int | None
    font_file: str | None

    def draw(self) -> Image.Image:
        parts = [self._title()]
        height = 0
        for number in range(len(self.document.texts)):
            part = self._slot(number)
            height += part.height
            if number and height > MAX_HEIGHT:
                more = len(self.document.texts) - number
                parts.append(self._line(f"... {more:,} more slot{'s' if more > 1 else ''}"))
                break
            parts.append(part)
        page = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + MARGIN), "white")
        y = 0
        for part in parts:
            page.paste(part, (0, y))
            y += part.height
        return page

    def font(self, size: int) -> Font:
        return _font(self.font_file, size)

    def _line(self, text: str) -> Image.Image:
        part = Image.new("RGB", (WIDTH, LINE + 12), "white")
        ImageDraw.Draw(part).text((MARGIN + GUTTER, 12), text, fill=QUIET, font=self.font(17))
        return part

    def _title(self) -> Image.Image:
        document = self.document
        encoded = encode(document, self.vocab) if self.vocab is not None else None
        part = Image.new("RGB", (WIDTH, 176 if isinstance(encoded, Encoded) else 148), "white")
        draw = ImageDraw.Draw(part)
        draw.text((MARGIN, 22), _shortened(document.key, 50), fill=INK, font=self.font(28))
        num_images = sum(image is not None for image in document.images)
        facts = [document.task, f"source {_shortened(document.source, 40) or '(none)'}"]
        facts.append(f"{len(document.texts)} slots, {num_images} of them images")
        if isinstance(encoded, Encoded) and self.pack_tokens is not None:
            is_long = len(encoded) > self.pack_tokens
            share = f"{len(encoded) / self.pack_tokens:.0%} of" if not is_long else "longer than"
            facts.append(f"{share} a pack of {self.pack_tokens:,} tokens")
        draw.text((MARGIN, 62), "   |   ".join(facts), fill=INK, font=self.font(17))
        if isinstance(encoded, Encoded):
            draw.text((MARGIN, 88), _token_facts(encoded), fill=QUIET, font=self.font(17))
            strip = _strip(encoded, WIDTH - 2 * MARGIN)
            part.paste(strip, (MARGIN, 120))
            self._legend(draw, 120 + strip.height + 6, list(SEGMENT_COLORS))
        else:
            told = "without --tokenizer no tokens are shown" if encoded is None else encoded.reason
            draw.text((MARGIN, 88), _shortened(told, 110), fill=QUIET if encoded is None else ALARM, font=self.font(17))
            self._legend(draw, 116, [])
        return part

    def _legend(self, draw: ImageDraw.ImageDraw, y: int, segments: list[str]) -> None:
        x = float(MARGIN)
        font = self.font(14)
        for name in [*segments, "carries loss"]:
            fill, edge = (SEGMENT_COLORS[name], None) if name in SEGMENT_COLORS else (LOSS, LOSS_EDGE)
            draw.rectangle((x, y + 3, x + 12, y + 15), fill=fill, outline=edge)
            draw.text((x + 18, y), name, fill=QUIET, font=font)
            x += 18 + font.getlength(name) + 22

    def _slot(self, number: int) -> Image.Image:
        document = self.document
        text, image, has_loss = document.texts[number], document.images[number], document.loss[number]
        content = self._text(text, has_loss) if text is not None else self._image(str(image), has_loss)
        part = Image.new("RGB", (WIDTH, content.height + 18), "white")
        draw = ImageDraw.Draw(part)
        draw.line((MARGIN, 0, WIDTH - MARGIN, 0), fill=FAINT)
        draw.text((MARGIN, 15), f"{number}", fill=QUIET, font=self.font(15))
        part.paste(content, (MARGIN + GUTTER, 10))
        return part

    def _text(self, text: str, has_loss: bool) -> Image.Image:
        shown = text[:MAX_CHARACTERS]
        pieces = token_pieces(shown, self.vocab) if self.vocab is not None else re.findall(r"\s*\S+|\s+", shown)
        font = self.font(19)
        width = WIDTH - 2 * MARGIN - GUTTER
        room = width - 80 if has_loss else width  # for the <|end|> after the last line
        lines = list(itertools.islice(_wrapped(pieces, font, room), MAX_LINES + 1)) or [[]]
        is_cut = len(lines) > MAX_LINES or len(shown) < len(text)
        more = f"... cut here, this text has {len(text):,} characters" if is_cut else ""
        lines = lines[:MAX_LINES]
        part = Image.new("RGB", (width, LINE * (len(lines) + bool(more))), "white")
        draw = ImageDraw.Draw(part)
        for row, line in enumerate(lines):
            y = row * LINE
            length = sum(font.getlength(piece) for piece in line)
            if has_loss:
                draw.rectangle((0, y + 1, max(length + 4, 8), y + LINE - 3), fill=LOSS)
            x = 2.0
            for piece in line:
                draw.text((x, y + 3), piece, fill=INK, font=font)
                x += font.getlength(piece)
                if self.vocab is not None:
                    draw.line((x, y + 5, x, y + LINE - 7), fill=CUT)
            is_last = row == len(lines) - 1 and not more
            mark = "<|end|>" if has_loss and is_last and self.vocab is not None else "(empty)" if not text else ""
            draw.text((x + 8, y + 7), mark, fill=LOSS_EDGE if mark == "<|end|>" else QUIET, font=self.font(14))
        draw.text((2, LINE * len(lines) + 5), more, fill=QUIET, font=self.font(15))
        return part

    def _image(self, name: str, has_loss: bool) -> Image.Image:
        """The original at the left, what the codes decode to at the right, a caption under each."""
        original, caption = self._original(name)
        sides: list[tuple[np.ndarray | None, str]] = [(original, caption)]
        codes = self.document.codes.get(codes_name(name))
        if codes is None:
            sides.append((None, "no codes: run `uvlm data tokenize`"))
        else:
            sides.append(self._decoded(codes, original))
        pictures = [_enlarged(pixels) if pixels is not None else None for pixels, _ in sides]
        height = max((picture.height for picture in pictures if picture is not None), default=40)
        part = Image.new("RGB", (WIDTH - 2 * MARGIN - GUTTER, height + 40), "white")
        draw = ImageDraw.Draw(part)
        for side, (picture, (_, caption)) in enumerate(zip(pictures, sides, strict=True)):
            x = 4 + side * (PICTURE + 60)
            w, h = picture.size if picture is not None else (PICTURE, height)
            border = 4 if has_loss else 1
            edge = LOSS_EDGE if has_loss else CUT
            draw.rectangle((x - border, 4 - border, x + w + border - 1, 4 + h + border - 1), fill="#f4f5f8")
            draw.rectangle((x - border, 4 - border, x + w + border - 1, 4 + h + border - 1), outline=edge, width=border)
            if picture is not None:
                part.paste(picture, (x, 4))
            draw.text((x, h + 14), _shortened(caption, 56), fill=QUIET, font=self.font(15))
        return part

    def _original(self, name: str) -> tuple[np.ndarray | None, str]:
        """uint8 [H, W, 3], as the image tokenizer sees it if there is one, and a caption."""
        content = self.document.image_bytes.get(name)
        if content is None:
            return None, f"{name}: its bytes were left out"
        try:
            pixels = decode_image(content)
            caption = f"original {name}, {pixels.shape[1]} x {pixels.shape[0]} pixels"
            if self.image_tokenizer is not None:
                pixels = self.image_tokenizer.preprocess(content)
        except ValueError as error:
            return None, f"{name}: {error}"
        return pixels, caption

    def _decoded(self, codes: np.ndarray, original: np.ndarray | None) -> tuple[np.ndarray | None, str]:
        size = f"{codes.shape[0]} x {codes.shape[1]} codes"
        if self.image_tokenizer is None:
            return None, f"{size}; --tokenizer shows them"
        try:
            pixels = self.image_tokenizer.decode(codes[None])[0]
        except ValueError as error:
            return None, f"{size}: {error}"
        if original is None or original.shape != pixels.shape:
            return pixels, f"decoded from {size}"
        return pixels, f"decoded from {size}, {psnr(original[None], pixels[None])[0]:.1f} dB"


@functools.lru_cache(maxsize=16)
def _font(file: str | None, size: int) -> Font:
    if file is None:
        return ImageFont.load_default(size)
    # The other layout engine, the default where it is installed, fails on some texts (run).
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _font_for(document: Document) -> str | None:
    """A font of this machine for texts that the built-in font, which is ASCII alone, cannot write."""
    if not all(text.isascii() for text in document.texts if text is not None):
        for name in FONTS:
            with contextlib.suppress(OSError):
                ImageFont.truetype(name, 12)
                return name
    return None


def _token_facts(encoded: Encoded) -> str:
    counts = np.bincount(encoded.segment, minlength=len(SEGMENTS))
    named = [f"{count:,} {name}" for name, count in zip(SEGMENTS, counts, strict=True) if count]
    share = counts[SEGMENTS.index("image")] / len(encoded)
    supervised = int((encoded.labels != IGNORED).sum())
    return f"{len(encoded):,} tokens: {', '.join(named)}   |   image share {share:.0%}   |   {supervised:,} supervised"


def _strip(encoded: Encoded, width: int) -> Image.Image:
    """The tokens from left to right in the colour of their segment; supervised ones have a bar below."""
    token_W = np.arange(width) * len(encoded) // width
    colors = np.array([_rgb(SEGMENT_COLORS[name]) for name in SEGMENTS], dtype=np.uint8)
    pixels_HWC = np.full((STRIP + 6, width, 3), 255, dtype=np.uint8)
    pixels_HWC[:STRIP] = colors[encoded.segment[token_W]]
    # labels[t] is the token t + 1, so it is token t + 1 that is supervised
    is_supervised = np.concatenate(([False], encoded.labels[:-1] != IGNORED))
    pixels_HWC[STRIP + 2 :, is_supervised[token_W]] = _rgb(LOSS_EDGE)
    return Image.fromarray(pixels_HWC)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    """At most PICTURE wide and high; small pictures grow by a whole factor, so that their pixels stay square."""
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest <= PICTURE:
        factor = PICTURE // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, picture.width * PICTURE // longest), max(1, picture.height * PICTURE // longest))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, length: int) -> str:
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= length else text[: length - 3] + "..."


def _wrapped(pieces: list[str], font: Font, width: int) -> Iterator[list[str]]:
    """Lines of pieces at most `width` pixels wide, broken before a word where one fits a line, at "\\n" always."""
    line: list[str] = []
    used = 0.0
    for word in _words(pieces):
        length = sum(font.getlength(piece) for piece in word)
        if line and used + length > width:
            yield line
            line, used = [], 0.0
        for piece in word:
            for part in _fitting(piece, font, width):
                size = font.getlength(part)
                if part == "\n" or (line and used + size > width):
                    yield line
                    line, used = [], 0.0
                if part != "\n":
                    line.append(part)
                    used += size
    if line:
        yield line


def _words(pieces: list[str]) -> Iterator[list[str]]:
    """Pieces in groups that should stay on one line: a group begins at a piece that begins with white space."""
    word: list[str] = []
    for piece in pieces:
        if word and (piece[:1].isspace() or word[-1].endswith("\n")):
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _fitting(piece: str, font: Font, width: int) -> Iterator[str]:
    """The piece, or parts of it where it holds line ends (each "\\n") or is wider than a line."""
    for part in re.findall(r"\n|[^\n]+", piece):
        if part == "\n":
            yield part
            continue
        part = "".join(char if char.isprintable() else " " for char in part)
        while font.getlength(part) > width:
            widths = list(itertools.accumulate(font.getlength(char) for char in part[:width]))
            num_fitting = max(1, bisect.bisect_right(widths, width))
            yield part[:num_fitting]
            part = part[num_fitting:]
        yield part
