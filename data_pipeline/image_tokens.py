"""Pictures to image codes and back, by a frozen `transformers.JanusVQVAE`.

The folder is a normal pretrained folder (config.json, model.safetensors) plus `preprocessing.json`, which says what
the model's config cannot: the picture's size, how others are brought to it, and by how much pixels are folded into
channels before the first convolution (`pixel_unshuffle`; 1 for stock models). Folding is why a tokenizer can be trained
on two cores at all: plain 64x64 convolutions of 32 channels reach 46 images/s in training, 64 channels on pixels folded
4 x 4 reach 320 on one core (run). For another JanusVQVAE, such as Janus-Pro's, write the file by hand:
`{"format_version": 1, "image_size": 384, "resize": "crop", "pixel_unshuffle": 1}`.

Codes are the nearest rows of the codebook under what `JanusVQVAE.decode` uses, which normalises the rows while the
model's own `encode` does not: rows are normalised once after loading, and then the two agree.
Cost (run, one core, 64 codes a picture): encode 2,000 images/s, decode 1,300 images/s.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import JanusVQVAE

PREPROCESSING_NAME = "preprocessing.json"
FORMAT_VERSION = 1

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

# B pictures, H W pixels, h w codes, C channels (3 x folding squared once folded), D codebook dim, N = B h w


@dataclass(frozen=True)
class Preprocessing:
    """`image_size` in pixels; `resize` "crop": the shorter side is scaled to image_size, the middle is kept."""

    image_size: int
    pixel_unshuffle: int = 1
    resize: str = "crop"
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: Path) -> Preprocessing:
        """FileNotFoundError or ValueError where the file is missing or not understood."""
        path = folder / PREPROCESSING_NAME
        try:
            loaded = cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be understood ({error}); it needs image_size") from None
        sizes = (loaded.image_size, loaded.pixel_unshuffle)
        if (
            loaded.format_version != FORMAT_VERSION
            or loaded.resize != "crop"
            or not all(type(size) is int and size >= 1 for size in sizes)
        ):
            raise ValueError(f'{path} must have format_version {FORMAT_VERSION}, resize "crop" and positive sizes')
        return loaded

    def save(self, folder: Path) -> None:
        (folder / PREPROCESSING_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def apply(self, image_bytes: bytes) -> np.ndarray:
        """Any picture that Pillow reads as uint8 [H, W, 3], transparent parts white. ValueError if unreadable."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(image_bytes)) as opened:
                image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        except Exception as error:  # damaged bytes show as almost any error, and nothing here touches a disk
            reason = (
                "no known format" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
            )
            raise ValueError(f"image cannot be decoded: {reason}") from None
        if image.size != (self.image_size, self.image_size):
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.array(image, dtype=np.uint8)


class ImageTokenizer:
    """Encodes and decodes pictures of one size. Make it with `load`.

    `fingerprint` names this tokenizer in manifests, `num_codes` is the codebook's size, `image_size` in pixels,
    `codes_hw` the code grid.
    """

    def __init__(self, model: JanusVQVAE, preprocessing: Preprocessing, fingerprint: str) -> None:
        """Takes the model over: its codebook rows are normalised. ValueError where it does not fit `preprocessing`."""
        import torch

        config = model.config
        folding = preprocessing.pixel_unshuffle
        side = preprocessing.image_size // folding // 2 ** (len(config.channel_multiplier) - 1)
        fits = config.in_channels == config.out_channels == 3 * folding**2 and config.num_patches == side
        if not fits or side * folding * 2 ** (len(config.channel_multiplier) - 1) != preprocessing.image_size:
            raise ValueError(
                f"the image tokenizer's config ({config.in_channels} channels, {config.num_patches} codes a side) does "
                f"not fit {preprocessing}; correct its {PREPROCESSING_NAME}"
            )
        with torch.no_grad():
            rows_ND = model.quantize.embedding.weight
            rows_ND.copy_(torch.nn.functional.normalize(rows_ND, dim=1))
        self.model = model.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.fingerprint = fingerprint
        self.num_codes: int = config.num_embeddings
        self.image_size = preprocessing.image_size
        self.codes_hw = (side, side)

    @classmethod
    def load(cls, folder: Path | str) -> ImageTokenizer:
        """Reads a folder from disk, safetensors only: no code of the folder runs and nothing is downloaded.

        FileNotFoundError names a missing file, ValueError one that does not fit.
        """
        folder = Path(folder)
        fingerprint = image_tokenizer_fingerprint(folder)
        preprocessing = Preprocessing.load(folder)
        import torch
        from safetensors import SafetensorError
        from transformers import JanusVQVAE
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for a file of a few megabytes would tear through the caller's own
        try:
            model, loading = JanusVQVAE.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged ({error}); make the tokenizer again") from error
        wrong = [*loading["missing_keys"], *loading["mismatched_keys"]]
        if wrong:
            raise ValueError(f"{folder} lacks weights or has them in another shape ({wrong[0]}); make it again")
        return cls(model.float().to("cuda" if torch.cuda.is_available() else "cpu"), preprocessing, fingerprint)

    def preprocess(self, image_bytes: bytes) -> np.ndarray:
        """uint8 [image_size, image_size, 3]; ValueError where the bytes cannot be decoded."""
        return self.preprocessing.apply(image_bytes)

    def encode(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Codes [B, h, w] of uint8 pictures [B, H, W, 3]: uint16, or uint32 above 65,536 codes."""
        import torch

        self._check(images_BHWC.dtype == np.uint8 and images_BHWC.shape[1:] == (self.image_size, self.image_size, 3))
        with torch.inference_mode():
            pixels_BCHW = self._to_device(fold(images_BHWC, self.preprocessing.pixel_unshuffle))
            latent_BDhw = self.model.quant_conv(self.model.encoder(pixels_BCHW))
            codes_N = nearest_rows(latent_BDhw, self.model.quantize.embedding.weight)
        codes = codes_N.cpu().numpy().reshape(len(images_BHWC), *self.codes_hw)
        return codes.astype(np.uint16 if self.num_codes <= 1 << 16 else np.uint32)

    def decode(self, codes_Bhw: np.ndarray) -> np.ndarray:
        """uint8 pictures [B, H, W, 3] of codes [B, h, w]. ValueError for a code that does not exist."""
        import torch

        codes_Bhw = np.asarray(codes_Bhw)
        self._check(codes_Bhw.shape[1:] == self.codes_hw)
        ids_Bn = codes_Bhw.astype(np.int64).reshape(len(codes_Bhw), -1)
        if ids_Bn.size and (ids_Bn.min() < 0 or ids_Bn.max() >= self.num_codes):
            raise ValueError(f"code {ids_Bn.max()} out of range: the image tokenizer has {self.num_codes} codes")
        with torch.inference_mode():
            pixels_BCHW = self.model.decode(self._to_device(torch.from_numpy(ids_Bn)))
            return unfold(pixels_BCHW, self.preprocessing.pixel_unshuffle)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.quantize.embedding.weight.device)

    def _check(self, fits: bool) -> None:
        if not fits:
            raise ValueError(
                f"this image tokenizer takes uint8 [B, {self.image_size}, {self.image_size}, 3] and codes "
                f"[B, {self.codes_hw[0]}, {self.codes_hw[1]}]"
            )


def fold(images_BHWC: np.ndarray, folding: int) -> torch.Tensor:
    """uint8 pictures as float32 [B, 3 folding^2, H/folding, W/folding] in -1..1."""
    import torch

    pixels_BCHW = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    # Contiguous: with channels last, which the permutation leaves, bf16 group norms are 20 times slower on a CPU (run).
    return torch.nn.functional.pixel_unshuffle(pixels_BCHW.contiguous(), folding)


def unfold(pixels_BCHW: torch.Tensor, folding: int) -> np.ndarray:
    """The inverse of `fold`: uint8 [B, H, W, 3], values out of range are clipped."""
    import torch

    pixels_BCHW = torch.nn.functional.pixel_shuffle(pixels_BCHW.float(), folding)
    levels_BCHW = ((pixels_BCHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def nearest_rows(latent_BDhw: torch.Tensor, unit_rows_ND: torch.Tensor) -> torch.Tensor:
    """int64 [B h w]: the unit row with the smallest angle to each latent vector, which is also the nearest row by
    Euclidean distance whatever the vector's length, so the model's own `encode` gives the same ids."""
    vectors_ND = latent_BDhw.float().permute(0, 2, 3, 1).reshape(-1, latent_BDhw.shape[1])
    return (vectors_ND @ unit_rows_ND.T).argmax(dim=1)


def psnr(images_BHWC: np.ndarray, others_BHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, float64 [B]; 99 where the pictures are equal."""
    error_BHWC = (images_BHWC.astype(np.float64) - others_BHWC.astype(np.float64)) / 255.0
    mean_square_B = (error_BHWC**2).mean(axis=(1, 2, 3))
    return -10.0 * np.log10(np.maximum(mean_square_B, 10**-9.9))


def image_tokenizer_fingerprint(folder: Path | str) -> str:
    """16 hex characters over config, weights and preprocessing; needs no torch. FileNotFoundError names what lacks."""
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    paths = [folder / "config.json", folder / PREPROCESSING_NAME, *(weights or [folder / "model.safetensors"])]
    total = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, so {folder} is no image tokenizer; make one with `uvlm tokenizer train`"
            )
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
