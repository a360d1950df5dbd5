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
from transformers import Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from data_pipeline.image_tokens import (
    ImageTokenizer,
    Preprocessing,
    fold,
    image_tokenizer_fingerprint,
    nearest_rows,
    num_codes_of,
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


def make_emu3_folder(folder: Path) -> Path:
    """Emu3 needs 32 channels for its norms; codes of 2 x 2 pixels, more of them than uint16 holds."""
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=(1 << 16) + 8,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=32,
        temporal_downsample_factor=2,
    )
    model = Emu3VQVAE(config)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    model.save_pretrained(folder)
    Preprocessing(SIZE).save(folder)
    return folder


@pytest.fixture(scope="module")
def emu3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emu3_folder(tmp_path_factory.mktemp("emu3") / "image")


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


def test_emu3_codes_and_pictures_are_those_of_the_model_itself(emu3_folder: Path) -> None:
    tokenizer = ImageTokenizer.load(emu3_folder)
    stock = Emu3VQVAE.from_pretrained(emu3_folder).eval()
    images = random_images(5)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # as its processor: rescaled, mean 0.5, deviation 0.5
    with torch.no_grad():
        ids = torch.stack(list(stock.encode((pixels - 0.5) / 0.5, torch.tensor([[SIZE, SIZE]] * 5)).image_tokens))
        decoded = stock.decode(ids)
    codes = tokenizer.encode(images)
    assert codes.dtype == np.uint32
    assert codes.shape == (5, *tokenizer.codes_hw) == (5, 8, 8)
    assert np.array_equal(codes, ids.numpy())
    assert len(np.unique(codes)) > 20
    assert np.array_equal(tokenizer.encode(images), codes)
    assert tokenizer.decode(codes).shape == images.shape
    assert np.abs(tokenizer.decode(codes).astype(int) - unfold(decoded, 1)).max() <= 1
    with pytest.raises(ValueError, match="out of range"):
        tokenizer.decode(codes + np.uint32(1 << 16))


def test_a_picture_of_another_size_than_the_codes_divide_is_refused(emu3_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(emu3_folder, tmp_path / "image"))
    Preprocessing(SIZE + 1).save(copy)
    with pytest.raises(ValueError, match="does not fit"):
        ImageTokenizer.load(copy)


@pytest.mark.parametrize("model_type", ["chameleon_vqgan", "janus", "emu3", None])
def test_models_that_cannot_decode_or_hold_more_are_refused(folder: Path, tmp_path: Path, model_type: object) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(ValueError, match=r"janus_vqgan \(JanusVQVAE\) and emu3_vqgan .* `model\.vqmodel`"):
        ImageTokenizer.load(copy)


def test_the_number_of_codes_is_known_without_the_model(folder: Path, emu3_folder: Path) -> None:
    for each in (folder, emu3_folder):
        assert num_codes_of(json.loads((each / "config.json").read_text())) == ImageTokenizer.load(each).num_codes
    wrong: list[object] = [[], {}, {"num_embeddings": "16"}, {"codebook_size": 0}, {"num_embeddings": True}]
    assert [num_codes_of(config) for config in wrong] == [None] * len(wrong)


def test_pictures_are_encoded_and_decoded_some_at_a_time(emu3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ImageTokenizer.load(emu3_folder)
    monkeypatch.setattr("data_pipeline.image_tokens.PIXELS_AT_ONCE", 2 * 2 * SIZE**2)  # two pictures of two frames
    parts = ImageTokenizer.load(emu3_folder)
    sizes: list[int] = []
    encode = parts.model.encode

    def counting(pixels: torch.Tensor, image_sizes: torch.Tensor) -> object:
        sizes.append(len(pixels))
        return encode(pixels, image_sizes)

    monkeypatch.setattr(parts.model, "encode", counting)
    images = random_images(5)
    codes = parts.encode(images)
    assert sizes == [2, 2, 1]
    assert (codes == whole.encode(images)).mean() > 0.98  # a tie may fall differently in another summation
    assert np.abs(parts.decode(codes).astype(int) - whole.decode(codes)).max() <= 1
    assert parts.encode(images[:0]).shape == (0, 8, 8)


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


def test_a_picture_is_cropped_padded_or_stretched_as_the_folder_says() -> None:
    size = 64
    wide = Image.new("RGB", (4 * size, 2 * size), "red")
    wide.paste((0, 0, 255), (size, 0, 3 * size, 2 * size))  # the middle half is blue
    content = encoded(wide)
    crop, pad, stretch = (Preprocessing(size, resize=kind).apply(content) for kind in ("crop", "pad", "stretch"))

    def shows(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
        inside = pixels[5:-5, 5:-5].astype(int)  # edges ring
        return inside.size > 0 and bool((np.abs(inside - color) < 8).all())

    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert shows(crop, blue)
    assert shows(pad[:16], white)
    assert shows(pad[48:], white)
    assert shows(pad[16:48, :16], red)
    assert shows(pad[16:48, 16:48], blue)
    assert shows(stretch[:, :16], red)
    assert shows(stretch[:, 16:48], blue)
    assert shows(stretch[:, 48:], red)


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1), (SIZE, SIZE)])
def test_every_shape_of_picture_fits(resize: str, size: tuple[int, int]) -> None:
    assert Preprocessing(SIZE, resize=resize).apply(encoded(Image.new("RGB", size))).shape == (SIZE, SIZE, 3)


def test_how_pictures_are_resized_is_part_of_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    found = set()
    for resize in ("crop", "pad", "stretch"):
        Preprocessing(SIZE, FOLDING, resize).save(copy)
        found.add(ImageTokenizer.load(copy).fingerprint)
    assert len(found) == 3


def test_preprocessing_is_written_in_the_bytes_that_old_fingerprints_are_of(tmp_path: Path) -> None:
    Preprocessing(64, 4).save(tmp_path)
    assert (tmp_path / "preprocessing.json").read_text() == (
        '{\n "image_size": 64,\n "pixel_unshuffle": 4,\n "resize": "crop",\n "format_version": 1\n}\n'
    )


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
    "change", [{"image_size": 24}, {"pixel_unshuffle": 4}, {"image_size": 0}, {"resize": "zoom"}, {"unknown": 1}]
)
def test_preprocessing_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "image"))
    path = copy / "preprocessing.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="preprocessing"):
        ImageTokenizer.load(copy)
