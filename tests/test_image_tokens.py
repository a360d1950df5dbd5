"""Codes are the nearest rows of the codebook that decoding uses, and a tokenizer folder is not trusted."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import JanusVQVAE, JanusVQVAEConfig

from data_pipeline.image_tokens import (
    ImageTokenizer,
    Preprocessing,
    fold,
    image_tokenizer_fingerprint,
    nearest_rows,
    psnr,
    unfold,
)

SIZE, FOLDING, NUM_CODES = 16, 2, 32


def make_folder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=NUM_CODES,
        latent_channels=8,
        in_channels=3 * FOLDING**2,
        out_channels=3 * FOLDING**2,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=0,
        num_patches=4,
    )
    model = JanusVQVAE(config)
    with torch.no_grad():  # rows of every length: what a stock folder may hold
        model.quantize.embedding.weight.copy_(torch.randn(NUM_CODES, 4) * torch.linspace(0.2, 3.0, NUM_CODES)[:, None])
    model.save_pretrained(folder)
    Preprocessing(SIZE, FOLDING).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tokenizer") / "image")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ImageTokenizer:
    return ImageTokenizer.load(folder)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_codes_are_those_of_the_model_itself_once_its_rows_are_normalised(folder: Path) -> None:
    tokenizer = ImageTokenizer.load(folder)
    stock = JanusVQVAE.from_pretrained(folder).eval()
    images = random_images(5)
    with torch.no_grad():
        stock.quantize.embedding.weight.copy_(torch.nn.functional.normalize(stock.quantize.embedding.weight, dim=1))
        ids = stock.encode(fold(images, FOLDING)).image_tokens.reshape(5, 4, 4)
        decoded = stock.decode(ids.reshape(5, -1))
    codes = tokenizer.encode(images)
    assert codes.dtype == np.uint16
    assert np.array_equal(codes, ids.numpy())
    assert np.array_equal(tokenizer.decode(codes), unfold(decoded, FOLDING))


def test_the_rows_that_encoding_compares_with_are_the_rows_that_decoding_uses(tokenizer: ImageTokenizer) -> None:
    ids = torch.arange(NUM_CODES).reshape(-1, 16)
    used_by_decode = tokenizer.model.quantize.get_codebook_entry(ids)
    assert torch.equal(nearest_rows(used_by_decode, tokenizer.model.quantize.embedding.weight), torch.arange(NUM_CODES))


def test_codes_do_not_depend_on_the_batch(tokenizer: ImageTokenizer) -> None:
    images = random_images(4)
    one_by_one = np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(4)])
    assert (one_by_one == tokenizer.encode(images)).mean() > 0.98  # a tie may fall differently in another summation


def test_folding_loses_nothing() -> None:
    images = random_images(3)
    for folding in (1, 2, 4):
        assert np.array_equal(unfold(fold(images, folding), folding), images)


def test_psnr_of_known_errors() -> None:
    black = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr(black, black).item() == pytest.approx(99.0)
    assert psnr(black, black + 255).item() == pytest.approx(0.0)
    assert psnr(black, black + np.uint8(51)).item() == pytest.approx(13.979, abs=1e-3)  # a fifth: -20 log10(1/5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessing.json"])
def test_the_fingerprint_follows_every_file_and_not_the_place(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert image_tokenizer_fingerprint(copy) == image_tokenizer_fingerprint(folder)
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    assert image_tokenizer_fingerprint(copy) != image_tokenizer_fingerprint(folder)


def test_the_fingerprint_needs_no_torch(folder: Path, repository: Path) -> None:
    program = (
        "import sys; from data_pipeline.image_tokens import image_tokenizer_fingerprint as f; f(sys.argv[1]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, cwd=repository)


def test_pictures_of_other_sizes_and_modes_become_ours(tokenizer: ImageTokenizer) -> None:
    wide = Image.new("RGB", (3 * SIZE, SIZE), "red")
    wide.paste((0, 0, 255), (SIZE, 0, 2 * SIZE, SIZE))
    middle = tokenizer.preprocess(encoded(wide))
    assert middle.shape == (SIZE, SIZE, 3)
    assert (middle[:, 2:-2] == (0, 0, 255)).all()  # cropped to the middle, neither squeezed nor padded
    transparent = Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0))
    assert (tokenizer.preprocess(encoded(transparent)) == 255).all()
    gray = tokenizer.preprocess(encoded(Image.new("L", (5, 5), 77)))
    assert (gray == 77).all()


def test_a_photograph_is_turned_as_its_exif_says(tokenizer: ImageTokenizer) -> None:
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste((0, 0, 0), (0, 0, SIZE, SIZE // 2))  # black above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture = tokenizer.preprocess(encoded(image, exif=exif))
    assert (picture[: SIZE // 2] == 255).all()
    assert (picture[SIZE // 2 :] == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_that_cannot_be_decoded_is_a_value_error(tokenizer: ImageTokenizer, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    whole = encoded(noise, kind)
    tokenizer.preprocess(whole)
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>", whole[:20]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            tokenizer.preprocess(damaged)


def test_wrong_shapes_and_codes_are_refused(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ValueError, match="16, 16, 3"):
        tokenizer.encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="4, 4"):
        tokenizer.decode(np.zeros((1, 16), np.uint16))
    with pytest.raises(ValueError, match="32 codes"):
        tokenizer.decode(np.full((1, 4, 4), NUM_CODES, np.uint16))


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    torch.save(JanusVQVAE.from_pretrained(folder).state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        ImageTokenizer.load(copy)


def test_weights_that_are_missing_are_an_error_and_not_random_numbers(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    weights = load_file(copy / "model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight"):
        ImageTokenizer.load(copy)


@pytest.mark.parametrize(
    "change", [{"image_size": 24}, {"pixel_unshuffle": 4}, {"image_size": 0}, {"resize": "pad"}, {"unknown": 1}]
)
def test_preprocessing_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    path = copy / "preprocessing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="preprocessing"):
        ImageTokenizer.load(copy)
