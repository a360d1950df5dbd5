"""What is refused before a run starts, beside what the tests of each part refuse."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from data_pipeline.text_tokenizer import train_text_tokenizer
from data_pipeline.vocab import SPECIALS, Vocab
from uvlm.check import check_full_tail, check_same_words


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A model's folder with a tokenizer that has none of our markers."""
    train_text_tokenizer(["the same words as always, the same ones"] * 3, tmp_path / "whole.json", vocabulary=280)
    whole = (tmp_path / "whole.json").read_text()
    bare = Tokenizer.from_str(whole.replace(whole[whole.index('"added_tokens"') : whole.index('"normalizer"')], ""))
    folder = tmp_path / "pretrained"
    folder.mkdir()
    bare.save(str(folder / "tokenizer.json"))
    return folder


def test_the_tokenizer_of_the_pretrained_model_with_our_markers_is_taken(pretrained: Path) -> None:
    text = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    assert text.token_to_id(SPECIALS[0]) is None
    text.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    check_same_words(pretrained, Path("tokenizer"), Vocab(text, 16, "image"))


def test_a_tokenizer_that_numbers_words_otherwise_than_the_pretrained_model_is_refused(
    pretrained: Path, tmp_path: Path
) -> None:
    train_text_tokenizer(["quite other text, quite other merges"] * 3, tmp_path / "other.json", vocabulary=280)
    vocab = Vocab(Tokenizer.from_file(str(tmp_path / "other.json")), 16, "image")
    with pytest.raises(ValueError, match=r"token 2\d\d is .* to model.init_from=.* to tokenizer; make tokenizer/text/"):
        check_same_words(pretrained, Path("tokenizer"), vocab)


def test_a_damaged_tokenizer_of_the_pretrained_model_is_named(pretrained: Path) -> None:
    text = Tokenizer.from_file(str(pretrained / "tokenizer.json"))
    text.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    (pretrained / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer of the tokenizers library"):
        check_same_words(pretrained, Path("tokenizer"), Vocab(text, 16, "image"))


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 3_000, 2_999_999])
def test_a_full_tail_shorter_than_a_step_is_refused_with_one_that_is_long_enough(steps: int) -> None:
    check_full_tail(0.0, steps)
    check_full_tail(1 / steps, steps)
    with pytest.raises(ValueError, match=r"is less than a step; set policy\.full_tail=") as refusal:
        check_full_tail(0.9 / steps, steps)
    check_full_tail(float(str(refusal.value).rpartition("=")[2].removesuffix(", or 0")), steps)
