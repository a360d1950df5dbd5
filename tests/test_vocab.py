"""One vocabulary: ranges do not overlap, and nothing a user types becomes a marker."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline import vocab as vocab_module
from data_pipeline.image_tokens import image_tokenizer_fingerprint
from data_pipeline.vocab import SPECIALS, Vocab


def make_tokenizer(specials: tuple[str, ...] = SPECIALS) -> Tokenizer:
    """A byte-level BPE of some 270 tokens, the specials last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["what color is the circle? blue, a red circle"] * 3, trainer)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def make_vocab(num_codes: int = 16) -> Vocab:
    return Vocab(make_tokenizer(), num_codes, "abc")


VOCAB = make_vocab()


def test_text_specials_and_codes_follow_one_another() -> None:
    specials = [VOCAB.pad, VOCAB.bos, VOCAB.eos, VOCAB.end, VOCAB.image_start, VOCAB.image_end]
    assert specials == list(range(VOCAB.num_text, VOCAB.first_code))
    assert VOCAB.size == VOCAB.num_text + len(SPECIALS) + 16
    assert VOCAB.code_ids(np.array([[0, 15]], np.uint16)).tolist() == [VOCAB.first_code, VOCAB.size - 1]


@given(st.text(st.characters(codec="utf-8")) | st.lists(st.sampled_from([*SPECIALS, " ", "a"])).map("".join))
def test_text_comes_back_and_never_becomes_a_marker(text: str) -> None:
    for vocab in (VOCAB, pickle.loads(pickle.dumps(VOCAB))):  # noqa: S301  our own bytes
        ids = vocab.encode_text(text)
        assert max(ids, default=0) < vocab.num_text
        assert vocab.decode_text(ids) == text


def test_decoding_leaves_out_specials_and_codes() -> None:
    ids = [VOCAB.bos, *VOCAB.encode_text("blue"), VOCAB.end, VOCAB.first_code, VOCAB.size - 1]
    assert VOCAB.decode_text(ids) == "blue"


def test_codes_come_back_and_foreign_ones_are_errors() -> None:
    codes = np.arange(16, dtype=np.uint16).reshape(2, 8)
    ids = VOCAB.code_ids(codes)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(VOCAB.codes(ids).reshape(2, 8), codes)
    assert VOCAB.codes(ids).dtype == np.uint16
    with pytest.raises(ValueError, match="code out of range"):
        VOCAB.code_ids(np.array([[16]], np.uint16))
    with pytest.raises(ValueError, match="not all image codes"):
        VOCAB.codes(np.array([VOCAB.eos]))


def test_many_codes_need_wider_integers() -> None:
    vocab = make_vocab(70_000)
    codes = np.array([[69_999]], np.uint32)
    np.testing.assert_array_equal(vocab.codes(vocab.code_ids(codes)), codes[0])


def test_specials_that_are_not_the_last_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="last ids"):
        Vocab(make_tokenizer(SPECIALS[::-1]), 16, "abc")
    with pytest.raises(ValueError, match="last ids"):
        Vocab(make_tokenizer(()), 16, "abc")


def test_a_tokenizer_that_lets_users_type_markers_is_refused() -> None:
    tokenizer = make_tokenizer(())
    tokenizer.add_tokens(list(SPECIALS))
    with pytest.raises(ValueError, match="typed markers"):
        Vocab(tokenizer, 16, "abc")


def test_a_tokenizer_folder_is_loaded(tmp_path: Path) -> None:
    for name in ("text", "image"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Vocab.load(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "text" / "tokenizer.json"))
    (tmp_path / "image" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "image" / "preprocessing.json").write_text("{}")
    config = tmp_path / "image" / "config.json"
    for content in ("[]", "{", json.dumps({"num_embeddings": 0})):
        config.write_text(content)
        with pytest.raises(ValueError, match="num_embeddings"):
            Vocab.load(tmp_path)
    config.write_text(json.dumps({"num_embeddings": 16}))
    vocab = Vocab.load(tmp_path)
    assert (vocab.num_codes, vocab.size) == (16, VOCAB.size)
    assert vocab.image_tokenizer == image_tokenizer_fingerprint(tmp_path / "image")
    assert vocab.encode_text("what color is it?") == VOCAB.encode_text("what color is it?")
    (tmp_path / "text" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer"):
        Vocab.load(tmp_path)


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(
        st.sampled_from([*SPECIALS, "<|", "|>", "'ll", "'Ve", "  ", "\r\n", "what color", " blue", "é", "\u2028"])
        | st.characters(max_codepoint=160),
        max_size=12,
    )
)
def test_remembered_words_change_no_ids(parts: list[str]) -> None:
    text = "".join(parts)
    for _ in range(2):  # the second time from memory
        assert VOCAB.encode_text(text) == VOCAB._encode(text)


def test_words_are_remembered_only_where_they_are_tokenized_each_for_itself() -> None:
    lower, prefix, metaspace = (make_tokenizer() for _ in range(3))
    lower.normalizer = normalizers.Lowercase()
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    assert VOCAB._words is not None
    for other in (lower, prefix, metaspace):
        vocab = Vocab(other, 16, "abc")
        assert vocab._words is None
        assert vocab.encode_text("A Circle") == vocab._encode("A Circle")


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_module, "MAX_WORDS", 8)
    vocab = make_vocab()
    for i in range(100):
        assert vocab.encode_text(f" {i}x") == vocab._encode(f" {i}x")
        assert vocab._words is not None
        assert len(vocab._words) <= 8
