"""Ids, labels and segments are those of the layout in encode's docstring."""

import numpy as np

from data_pipeline.encode import IGNORED, SEGMENTS, TOO_LONG, Encoded, encode, encode_pieces
from data_pipeline.schema import TASKS, Document, Rejected
from tests.test_schema import make_document
from tests.test_vocab import VOCAB

Q, A = VOCAB.encode_text("what color?"), VOCAB.encode_text(" blue")
CODE_IDS = [VOCAB.first_code + code for code in range(4)]
IMAGE = [VOCAB.image_start, *CODE_IDS, VOCAB.image_end]


def encoded(document: Document) -> Encoded:
    result = encode(document, VOCAB)
    assert isinstance(result, Encoded), result
    return result


def supervised(result: Encoded) -> list[int]:
    """The ids that carry loss, in order."""
    positions = np.flatnonzero(result.labels != IGNORED)
    np.testing.assert_array_equal(result.labels[positions], result.ids[positions + 1])
    return result.ids[positions + 1].tolist()


def test_understanding_supervises_the_answers_and_their_ends() -> None:
    texts = (None, "what color?", " blue", "what color?", " blue")
    result = encoded(make_document(texts=texts, loss=(False, False, True, False, True)))
    assert result.ids.tolist() == [VOCAB.bos, *IMAGE, *Q, *A, VOCAB.end, *Q, *A, VOCAB.end, VOCAB.eos]
    assert supervised(result) == [*A, VOCAB.end] * 2
    names = [SEGMENTS[i] for i in result.segment]
    answer = ["instruction"] * len(Q) + ["output"] * (len(A) + 1)
    assert names == ["system", *["image"] * 6, *answer, *answer, "system"]
    assert (TASKS[result.task], result.source, result.doc_id) == ("understand", "made", "0")
    assert result.image_starts == [2]
    assert result.image_shapes == [(2, 2)]
    assert result.image_targets == [False]


def test_generation_supervises_the_image_with_its_markers() -> None:
    result = encoded(make_document(texts=("what color?", None), task="generate", loss=(False, True)))
    assert result.ids.tolist() == [VOCAB.bos, *Q, *IMAGE, VOCAB.eos]
    assert supervised(result) == IMAGE
    assert result.image_targets == [True]
    start = result.image_starts[0]
    assert result.ids[start : start + 4].tolist() == CODE_IDS


def test_the_first_slot_can_carry_loss_and_the_eos_never_does() -> None:
    result = encoded(make_document(texts=(" blue",), task="text", loss=(True,)))
    assert supervised(result) == [*A, VOCAB.end]
    assert result.labels[-1] == IGNORED


def test_without_loss_nothing_is_supervised() -> None:
    result = encoded(make_document(loss=(False, False, False)))
    assert supervised(result) == []


def test_an_empty_text_is_an_empty_slot() -> None:
    result = encoded(make_document(texts=("", ""), task="text", loss=(False, True)))
    assert result.ids.tolist() == [VOCAB.bos, VOCAB.end, VOCAB.eos]
    assert supervised(result) == [VOCAB.end]


def test_pieces_hold_all_slots_and_none_is_too_long() -> None:
    texts = ("", "what color?", None, " blue" * 9, "", None)
    document = make_document(texts=texts, task="interleave", loss=(False, True, False, True, True, True))
    whole = encoded(document)
    for max_tokens in range(8, len(whole) + 1):
        pieces = encode_pieces(document, VOCAB, max_tokens)
        assert isinstance(pieces, list)
        assert max(map(len, pieces)) <= max_tokens
        assert [i for piece in pieces for i in piece.ids[1:-1]] == whole.ids[1:-1].tolist()
        assert [i for piece in pieces for i in supervised(piece)] == supervised(whole)
        assert sum(len(piece.image_starts) for piece in pieces) == 2
    for max_tokens in (1, 2, 7):  # an image takes six tokens besides <|bos|> and <|eos|>
        pieces = encode_pieces(document, VOCAB, max_tokens)
        assert isinstance(pieces, Rejected)
        assert pieces.category == TOO_LONG


def test_shapes_and_dtypes_hold_without_images() -> None:
    result = encoded(make_document(texts=("a",), task="text", loss=(True,)))
    assert not result.image_starts + result.image_targets
    assert not result.image_shapes
    dtypes = [array.dtype for array in (result.ids, result.labels, result.segment)]
    assert dtypes == [np.int64, np.int64, np.uint8]


def test_an_image_without_codes_or_with_foreign_codes_is_rejected() -> None:
    for codes, words in (({}, "uvlm data tokenize"), ({"0.npy": np.array([[16]], np.uint16)}, "code out of range")):
        result = encode(make_document(codes=codes), VOCAB)
        assert isinstance(result, Rejected)
        assert words in result.reason
