"""One vocabulary for text and images: text tokens, then six specials, then the image codes.

    0 ............ num_text - 1       byte-level BPE
    num_text ..... first_code - 1     SPECIALS, in their order
    first_code ... size - 1           image codes

A tokenizer folder holds `text/tokenizer.json` (the specials are its last ids) and `image/`, a transformers pretrained
folder of which only `config.json` is needed here, so no torch is imported. What a user types is always plain text:
a literal "<|image|>" becomes ordinary tokens, so nobody can forge a marker.
Cost (run): `encode_text` 1.4 us for a short question in ASCII, whose words' ids are remembered, and 6 us otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# How a byte-level pre-tokenizer cuts ASCII text into the words that BPE then works on, each for itself (Radford et al.,
# "Language Models are Unsupervised Multitask Learners", 2019: the pattern of GPT-2's encoder, here for ASCII alone).
ASCII_WORD = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
MAX_WORDS, MAX_LETTERS = 1 << 16, 64  # that are remembered, and of one of them

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", "<|image|>", "<|/image|>")


class Vocab:
    """Ids of texts, specials and image codes.

    `num_text` text tokens (specials not counted), `num_codes` image codes, `first_code` the id of code 0, `size` all
    together; `pad`, `bos`, `eos`, `end`, `image_start`, `image_end` are ids; `image_tokenizer` is the fingerprint of
    the tokenizer that makes the codes.
    """

    SPECIALS = SPECIALS

    def __init__(self, tokenizer: Tokenizer, num_codes: int, image_tokenizer: str) -> None:
        """ValueError where the specials are not the last ids of `tokenizer`, or plain text can produce one."""
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # our own: the settings below must not reach the caller's
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._words = _Words(self._encode) if _cuts_words_as_gpt2(tokenizer) else None
        self.num_codes = num_codes
        self.image_tokenizer = image_tokenizer
        self.num_text = tokenizer.get_vocab_size(with_added_tokens=True) - len(SPECIALS)
        self.first_code = self.num_text + len(SPECIALS)
        self._first_code = np.int64(self.first_code)  # makes int64 of what it is added to
        self.size = self.first_code + num_codes
        ids: list[Any] = [tokenizer.token_to_id(special) for special in SPECIALS]  # None where one is missing
        if ids != list(range(self.num_text, self.first_code)):
            raise ValueError(
                f"the text tokenizer has {' '.join(SPECIALS)} at ids {ids}; they must be its last ids, in this order: "
                "train one with `uvlm tokenizer train`, or add them to a model's own as docs/data.md says"
            )
        self.pad, self.bos, self.eos, self.end, self.image_start, self.image_end = ids
        if max(self.encode_text(" ".join(SPECIALS)), default=0) >= self.num_text:
            raise ValueError(
                "the text tokenizer turns typed markers into special tokens; add them with add_special_tokens, "
                "or train one with `uvlm tokenizer train`"
            )

    @classmethod
    def load(cls, folder: Path | str) -> Vocab:
        """Reads a tokenizer folder. FileNotFoundError names a missing file, ValueError one that makes no sense."""
        from data_pipeline.image_tokens import image_tokenizer_fingerprint, num_codes_of

        text_path = Path(folder) / "text" / "tokenizer.json"
        image_path = Path(folder) / "image" / "config.json"
        for path in (text_path, image_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; make a tokenizer folder with `uvlm tokenizer train`")
        try:
            tokenizer = Tokenizer.from_file(str(text_path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{text_path} is no tokenizer of the tokenizers library: {error}") from None
        try:
            num_codes = num_codes_of(json.loads(image_path.read_bytes()))
        except ValueError:
            num_codes = None
        if num_codes is None:
            raise ValueError(
                f"{image_path} has no positive num_embeddings or codebook_size; it must be the config of an image "
                "tokenizer"
            )
        return cls(tokenizer, num_codes, image_tokenizer_fingerprint(image_path.parent))

    @property
    def fingerprint(self) -> str:
        """16 hex characters over the text tokenizer and the image tokenizer: what a model's ids mean."""
        return hashlib.sha256(f"{self._tokenizer.to_str()} {self.image_tokenizer}".encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled Tokenizer forgets encode_special_tokens (run), so the pickle goes through the constructor.
        return {
            "tokenizer": self._tokenizer.to_str(),
            "num_codes": self.num_codes,
            "image_tokenizer": self.image_tokenizer,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        self.__init__(tokenizer, state["num_codes"], state["image_tokenizer"])  # type: ignore[misc]  # see above

    def encode_text(self, text: str) -> list[int]:
        """Ids below num_text. ValueError for half a surrogate pair, which undecodable bytes of a shell become."""
        if self._words is None or not text.isascii():
            return self._encode(text)
        return list(chain.from_iterable(map(self._words.__getitem__, ASCII_WORD.findall(text))))

    def _encode(self, text: str) -> list[int]:
        try:
            # The batch call of one is a fifth faster: it finds no offsets, which nobody reads here.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:
            raise ValueError(f"the text {text!r} is not valid Unicode; give it in UTF-8") from None

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of the text tokens among `ids`; specials and image codes are left out."""
        return self._tokenizer.decode([int(i) for i in ids if i < self.num_text], skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        """The text tokenizer's name of an id; None where it has none."""
        return self._tokenizer.id_to_token(number)

    def code_ids(self, codes: np.ndarray) -> np.ndarray:
        """Ids, int64 [h * w], row by row, of codes [h, w]. ValueError for a code that the tokenizer does not have."""
        flat = codes.reshape(-1)
        # The ufunc's own reduction takes half the time of `flat.max()`.
        is_negative = flat.dtype.kind != "u" and flat.size and flat.min() < 0
        if is_negative or (flat.size and np.maximum.reduce(flat) >= self.num_codes):
            raise ValueError(
                f"code out of range: {codes.min()} to {codes.max()}, the image tokenizer has {self.num_codes}"
            )
        return flat + self._first_code

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `code_ids` in the shape of `ids`: uint16, or uint32 above 65,536 codes."""
        codes = np.asarray(ids).astype(np.int64) - self.first_code
        if codes.size and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ValueError(f"ids {np.asarray(ids).min()} to {np.asarray(ids).max()} are not all image codes")
        return codes.astype(np.uint16 if self.num_codes <= 1 << 16 else np.uint32)


class _Words(dict[str, list[int]]):
    """The ids of words, remembered up to a bound."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= MAX_LETTERS:
            self[word] = ids
        return ids


def _cuts_words_as_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether BPE sees the words of ASCII_WORD one by one, so that a word's ids can be remembered."""
    parts = json.loads(tokenizer.to_str())
    cut, model = parts["pre_tokenizer"] or {}, parts["model"]
    return (
        parts["normalizer"] is None
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex")) == ("ByteLevel", False, True)
        and model["type"] == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in parts["added_tokens"])
    )
