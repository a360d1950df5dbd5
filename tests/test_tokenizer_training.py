"""Training makes a whole tokenizer folder, the same one whether interrupted or not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from data_pipeline import image_tokenizer_training
from data_pipeline.image_tokenizer_training import ImageTraining, train_image_tokenizer
from data_pipeline.image_tokens import ImageTokenizer, psnr
from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.text_tokenizer import train_text_tokenizer
from data_pipeline.tokenizer_training import train_tokenizers
from data_pipeline.vocab import SPECIALS, Vocab

SETTINGS = ImageTraining(steps=12, image_size=16, num_codes=16, batch_size=4)
ANSWERS = (" yes", " no", " blue", " rectangle")


def squares(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Pictures of one coloured square on a light ground."""
    random = np.random.default_rng(seed)
    colors = np.array([(255, 0, 0), (0, 0, 255), (0, 128, 128), (0, 0, 0)], np.uint8)
    images = np.full((count, size, size, 3), 240, np.uint8)
    for image in images:
        y, x = random.integers(0, size // 2, 2)
        image[y : y + size // 2, x : x + size // 2] = colors[random.integers(len(colors))]
    return images


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, contents: list[bytes], texts: bool = True) -> Path:
    with ShardWriter(folder, 10) as writer:
        for i, content in enumerate(contents):
            words = ("what shape is in the image?", ANSWERS[i % len(ANSWERS)]) if texts else ()
            writer.write(
                Document(
                    key=f"{i:06d}",
                    texts=(None, *words),
                    images=("0.png", *[None] * len(words)),
                    task="understand" if texts else "generate",
                    loss=(not texts, *[True] * len(words)),
                    source="squares",
                    meta={},
                    image_bytes={"0.png": content},
                    codes={},
                )
            )
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [png(picture) for picture in squares(24)])


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizers([shards], out, image=SETTINGS)
    return out


def test_the_folder_is_what_the_vocabulary_and_the_image_tokenizer_load(trained: Path) -> None:
    vocab, image_tokenizer = Vocab.load(trained), ImageTokenizer.load(trained / "image")
    assert vocab.num_codes == image_tokenizer.num_codes == 16
    assert vocab.image_tokenizer == image_tokenizer.fingerprint
    assert image_tokenizer.codes_hw == (2, 2)
    report = json.loads((trained / "tokenizer_report.json").read_text())
    assert report["image"]["image_tokenizer"] == image_tokenizer.fingerprint
    assert report["image"]["images_seen"] == 48
    assert {"psnr", "codes_used", "seconds"} <= set(report["image"])
    assert not [path for path in trained.iterdir() if ".tmp" in path.name or ".training" in path.name]


def test_every_answer_is_one_token_and_the_specials_come_last(trained: Path) -> None:
    vocab = Vocab.load(trained)
    assert [len(vocab.encode_text(answer)) for answer in ANSWERS] == [1] * len(ANSWERS)
    tokenizer = Tokenizer.from_file(str(trained / "text" / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert size <= 512
    assert [tokenizer.id_to_token(size - len(SPECIALS) + i) for i in range(len(SPECIALS))] == list(SPECIALS)


@pytest.mark.parametrize("text", ["", " yes", "Ünïcödé 漢字 \U0001f600", "tab\tnew\nline  two", "<|image|>"])
def test_any_text_comes_back_unchanged(trained: Path, text: str) -> None:
    vocab = Vocab.load(trained)
    assert vocab.decode_text(vocab.encode_text(text)) == text


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="262"):
        train_text_tokenizer(["a"], tmp_path / "tokenizer.json", vocabulary=200)
    assert train_text_tokenizer(["a b c " * 9], tmp_path / "tokenizer.json", vocabulary=262) == 262


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(shards: Path, trained: Path, tmp_path: Path) -> None:
    again = train_tokenizers([shards], tmp_path / "again", image=SETTINGS)
    assert again["image"]["image_tokenizer"] == ImageTokenizer.load(trained / "image").fingerprint
    text = (tmp_path / "again" / "text" / "tokenizer.json").read_bytes()
    assert text == (trained / "text" / "tokenizer.json").read_bytes()
    other = ImageTraining(**{**vars(SETTINGS), "seed": 1})
    different = train_tokenizers([shards], tmp_path / "other", image=other)
    assert different["image"]["image_tokenizer"] != again["image"]["image_tokenizer"]


class Interrupt:
    """A progress callback that stops the training at one step, as Ctrl-C would."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.first: int | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "image tokenizer":
            self.first = done if self.first is None else self.first
            if done == self.at:
                raise KeyboardInterrupt


def test_an_interrupted_training_ends_with_the_same_weights(
    shards: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_tokenizer_training, "SAVE_SECONDS", -1.0)
    out = tmp_path / "tokenizer"
    with pytest.raises(KeyboardInterrupt):
        train_tokenizers([shards], out, image=SETTINGS, progress=Interrupt(7))
    assert not (out / "image").exists()
    assert not (out / "tokenizer_report.json").exists()
    resumed = Interrupt(-1)
    train_tokenizers([shards], out, image=SETTINGS, progress=resumed)
    assert resumed.first == 7
    weights = (out / "image" / "model.safetensors").read_bytes()
    assert weights == (trained / "image" / "model.safetensors").read_bytes()


def test_a_state_of_other_settings_is_not_continued(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_tokenizer_training, "SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizers([shards], tmp_path, image=SETTINGS, progress=Interrupt(7))
    restarted = Interrupt(-1)
    train_tokenizers([shards], tmp_path, image=ImageTraining(**{**vars(SETTINGS), "num_codes": 8}), progress=restarted)
    assert restarted.first == 0


def test_a_finished_folder_is_not_trained_again_unless_something_changed(shards: Path, trained: Path) -> None:
    watched = Interrupt(-1)
    train_tokenizers([shards], trained, image=SETTINGS, progress=watched)
    assert watched.first is None
    (trained / "image" / "model.safetensors").write_bytes(b"damaged")
    train_tokenizers([shards], trained, image=SETTINGS, progress=watched)
    assert watched.first == 0
    ImageTokenizer.load(trained / "image")


def test_training_learns_the_pictures_with_most_of_the_codebook(tmp_path: Path) -> None:
    settings = ImageTraining(
        steps=250, image_size=16, num_codes=32, batch_size=16, learning_rate=1e-3, contrast_weight=0.0
    )
    held_out = squares(32, seed=1)
    report = train_image_tokenizer(squares(400), held_out, tmp_path / "image", settings)
    flat = np.broadcast_to(held_out.mean(axis=(1, 2), keepdims=True).astype(np.uint8), held_out.shape)
    assert report["psnr"] > psnr(held_out, flat).mean() + 2.0
    assert report["codes_used"] >= 16
    rows = ImageTokenizer.load(tmp_path / "image").model.quantize.embedding.weight
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "image" / "model.safetensors")["quantize.embedding.weight"]
    assert torch.allclose(saved.norm(dim=1), torch.ones(len(saved)), atol=1e-5)
    assert torch.allclose(saved, rows, atol=1e-6)


def test_rows_that_nobody_chooses_are_revived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_tokenizer_training, "DEAD_STEPS", 3)
    monkeypatch.setattr(image_tokenizer_training, "REVIVE_EVERY", 4)
    settings = ImageTraining(steps=10, image_size=16, num_codes=64, batch_size=4)
    assert train_image_tokenizer(squares(20), squares(4), tmp_path / "image", settings)["codes_revived"] > 0


def test_unreadable_pictures_are_counted_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    contents = [png(picture) for picture in squares(6)]
    some = write_shards(tmp_path / "some", [*contents, b"no picture"])
    report = train_tokenizers([some], tmp_path / "a", image=ImageTraining(**{**vars(SETTINGS), "steps": 1}))
    assert report["image"]["documents_rejected"] == 1
    none = write_shards(tmp_path / "none", [b"no picture"])
    with pytest.raises(ValueError, match="no picture that can be decoded"):
        train_tokenizers([none], tmp_path / "b", image=SETTINGS)


def test_shards_without_text_are_an_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [png(picture) for picture in squares(3)], texts=False)
    with pytest.raises(ValueError, match="hold no text"):
        train_tokenizers([folder], tmp_path / "out", image=SETTINGS)


def test_impossible_settings_name_a_value_that_works() -> None:
    with pytest.raises(ValueError, match="multiple of 8, such as 64"):
        ImageTraining(image_size=60)
