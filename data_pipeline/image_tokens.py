"""Pictures to image codes and back, by a frozen image tokenizer of `transformers`: JanusVQVAE or Emu3VQVAE.

The folder is a normal pretrained folder (config.json, model.safetensors) plus `preprocessing.json`, which says what
the model's config cannot: the picture's size, how others are brought to it (`resize`), and by how much pixels are
folded into channels before the first convolution (`pixel_unshuffle`; 1 for stock models). Folding is why a tokenizer
can be trained on two cores at all: plain 64x64 convolutions of 32 channels reach 46 images/s in training, 64 channels
on pixels folded 4 x 4 reach 320 on one core (run). The folder of a stock model is made from the whole model:

    model = JanusForConditionalGeneration.from_pretrained("deepseek-community/Janus-Pro-1B").model  # or Emu3For...
    model.vqmodel.save_pretrained("tokenizer/image"); Preprocessing(384).save("tokenizer/image")  # Emu3: 512

Janus: codes are the nearest rows of the codebook under what `JanusVQVAE.decode` uses, which normalises the rows while
the model's own `encode` does not: rows are normalised once after loading, and then the two agree. Emu3 needs no such
care. Its model is made for video and sees a picture as `temporal_downsample_factor` equal frames.
Cost (run, one core, 64 codes a picture, Janus): encode 2,000 images/s, decode 1,300 images/s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_pipeline.decode_image import decode_image

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import Emu3VQVAE, JanusVQVAE

PREPROCESSING_NAME = "preprocessing.json"
FORMAT_VERSION = 1
RESIZE = ("crop", "pad", "stretch")
PIXELS_AT_ONCE = 1 << 21  # in one forward: a picture of 512 x 512 holds 1 GB an activation in stock Emu3

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

# B pictures, H W pixels, h w codes, C channels (3 x folding squared once folded), D codebook dim, N = B h w


@dataclass(frozen=True)
class Preprocessing:
    """`image_size` in pixels. `resize` "crop": the shorter side is scaled to image_size, the middle is kept; "pad": the
    longer side is scaled, the rest is white; "stretch": both sides are scaled, each by its own factor."""

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
            or loaded.resize not in RESIZE
            or not all(type(size) is int and size >= 1 for size in sizes)
        ):
            raise ValueError(
                f"{path} must have format_version {FORMAT_VERSION}, resize {' or '.join(RESIZE)} and sizes above 0"
            )
        return loaded

    def save(self, folder: Path | str) -> None:
        (Path(folder) / PREPROCESSING_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def apply(self, image_bytes: bytes) -> np.ndarray:
        """Any picture that `decode_image` reads as uint8 [image_size, image_size, 3]. ValueError if unreadable."""
        pixels_HWC = decode_image(image_bytes)
        if pixels_HWC.shape[:2] == (self.image_size, self.image_size):
            return pixels_HWC
        from PIL import Image, ImageOps

        image, size = Image.fromarray(pixels_HWC), (self.image_size, self.image_size)
        if self.resize == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        elif self.resize == "stretch":
            image = image.resize(size, Image.Resampling.LANCZOS)
        else:
            image = _pad(image, self.image_size)
        return np.array(image, dtype=np.uint8)


def _pad(image: Image.Image, size: int) -> Image.Image:
    """Not `ImageOps.pad`, which refuses pictures so narrow that their shorter side would round to nothing."""
    from PIL import Image

    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    padded = Image.new("RGB", (size, size), "white")
    padded.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return padded


class _Family(Protocol):
    """How one kind of model is called. `frames`: how often it sees a picture; `num_codes`: rows of its codebook."""

    frames: int
    num_codes: int

    def encode(self, pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
        """int64 [B, h, w] of float32 pixels in -1..1."""

    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        """Pixels [B, C, H, W] around -1..1."""


class _Janus:
    def __init__(self, model: JanusVQVAE) -> None:
        import torch

        self.model, self.frames, self.num_codes = model, 1, model.config.num_embeddings
        with torch.no_grad():
            rows_ND = model.quantize.embedding.weight
            rows_ND.copy_(torch.nn.functional.normalize(rows_ND, dim=1))

    def encode(self, pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
        latent_BDhw = self.model.quant_conv(self.model.encoder(pixels_BCHW))
        return nearest_rows(latent_BDhw, self.model.quantize.embedding.weight).reshape(-1, side, side)

    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return self.model.decode(ids_Bhw.flatten(1))


class _Emu3:
    def __init__(self, model: Emu3VQVAE) -> None:
        self.model = model
        self.frames, self.num_codes = model.config.temporal_downsample_factor, model.config.codebook_size

    def encode(self, pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
        import torch

        sizes_B2 = torch.tensor([pixels_BCHW.shape[2:]] * len(pixels_BCHW))  # the model cuts padding off; ours has none
        return torch.stack(list(self.model.encode(pixels_BCHW, sizes_B2).image_tokens))

    def decode(self, ids_Bhw: torch.Tensor) -> torch.Tensor:
        return self.model.decode(ids_Bhw)


FAMILIES: dict[str, tuple[str, type[_Janus] | type[_Emu3]]] = {  # model_type of config.json -> class of transformers
    "janus_vqgan": ("JanusVQVAE", _Janus),
    "emu3_vqgan": ("Emu3VQVAE", _Emu3),
}


class ImageTokenizer:
    """Encodes and decodes pictures of one size. Make it with `load`.

    `fingerprint` names this tokenizer in manifests, `num_codes` is the codebook's size, `image_size` in pixels,
    `codes_hw` the code grid.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, fingerprint: str) -> None:
        """Takes the model over, which is of one of FAMILIES. ValueError where it does not fit `preprocessing`."""
        config, size = model.config, preprocessing.image_size
        factor = _pixels_per_code(preprocessing, len(config.channel_multiplier))
        side = size // factor
        fits = config.in_channels == config.out_channels == 3 * preprocessing.pixel_unshuffle**2
        wanted_side = getattr(config, "num_patches", side)  # Janus models are of one size, Emu3 models of any
        if not fits or side * factor != size or wanted_side != side:
            raise ValueError(
                f"the image tokenizer's config ({config.in_channels} channels, {wanted_side} codes a side) does not "
                f"fit {preprocessing}; correct its {PREPROCESSING_NAME}"
            )
        self.model = model.eval().requires_grad_(False)
        self._family: _Family = FAMILIES[config.model_type][1](model)
        self.preprocessing = preprocessing
        self.fingerprint = fingerprint
        self.num_codes: int = self._family.num_codes
        self.image_size = size
        self.codes_hw = (side, side)
        self._at_once = max(1, PIXELS_AT_ONCE // (size**2 * self._family.frames))

    @classmethod
    def load(cls, folder: Path | str) -> ImageTokenizer:
        """Reads a folder from disk, safetensors only: no code of the folder runs and nothing is downloaded.

        FileNotFoundError names a missing file, ValueError one that does not fit.
        """
        folder = Path(folder)
        fingerprint = image_tokenizer_fingerprint(folder)
        preprocessing = Preprocessing.load(folder)
        class_name, _ = FAMILIES[_model_type(folder)]
        import torch
        import transformers
        from safetensors import SafetensorError
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for a file of a few megabytes would tear through the caller's own
        try:
            model, loading = getattr(transformers, class_name).from_pretrained(
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
        codes_Bhw = np.empty((len(images_BHWC), *self.codes_hw), np.uint16 if self.num_codes <= 1 << 16 else np.uint32)
        with torch.inference_mode():
            for start in range(0, len(images_BHWC), self._at_once):
                part = slice(start, start + self._at_once)
                pixels_BCHW = self._to_device(fold(images_BHWC[part], self.preprocessing.pixel_unshuffle))
                codes_Bhw[part] = self._family.encode(pixels_BCHW, self.codes_hw[0]).cpu().numpy()
        return codes_Bhw

    def decode(self, codes_Bhw: np.ndarray) -> np.ndarray:
        """uint8 pictures [B, H, W, 3] of codes [B, h, w]. ValueError for a code that does not exist."""
        import torch

        codes_Bhw = np.asarray(codes_Bhw)
        self._check(codes_Bhw.shape[1:] == self.codes_hw)
        ids_Bhw = codes_Bhw.astype(np.int64)
        if ids_Bhw.size and (ids_Bhw.min() < 0 or ids_Bhw.max() >= self.num_codes):
            raise ValueError(f"code {ids_Bhw.max()} out of range: the image tokenizer has {self.num_codes} codes")
        images_BHWC = np.empty((len(ids_Bhw), self.image_size, self.image_size, 3), np.uint8)
        with torch.inference_mode():
            for start in range(0, len(ids_Bhw), self._at_once):
                part = slice(start, start + self._at_once)
                pixels_BCHW = self._family.decode(self._to_device(torch.from_numpy(ids_Bhw[part])))
                images_BHWC[part] = unfold(pixels_BCHW, self.preprocessing.pixel_unshuffle)
        return images_BHWC

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.model.quantize.embedding.weight.device)

    def _check(self, fits: bool) -> None:
        if not fits:
            raise ValueError(
                f"this image tokenizer takes uint8 [B, {self.image_size}, {self.image_size}, 3] and codes "
                f"[B, {self.codes_hw[0]}, {self.codes_hw[1]}]"
            )


def _model_type(folder: Path) -> str:
    """The `model_type` of the folder's config; ValueError where it is none of FAMILIES."""
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError):
        model_type = None
    if model_type not in FAMILIES:
        known = " and ".join(f"{name} ({class_name})" for name, (class_name, _) in FAMILIES.items())
        raise ValueError(
            f"{path} is of model_type {model_type!r}; image tokenizers that encode and decode are {known}, and of a "
            "whole Janus or Emu3 model its `model.vqmodel`, saved alone"
        )
    return model_type


def num_codes_of(config: Any) -> int | None:
    """The size of the codebook by the content of an image tokenizer's config.json; None where it does not say."""
    found = config.get("num_embeddings", config.get("codebook_size")) if isinstance(config, dict) else None
    return found if type(found) is int and found >= 1 else None


def codes_hw_of(folder: Path) -> tuple[int, int] | None:
    """The shape of the codes of the image tokenizer in `folder`, by its config.json and preprocessing.json alone; None
    where they do not say. FileNotFoundError or ValueError where these are missing or cannot be understood."""
    preprocessing = Preprocessing.load(folder)
    config = json.loads((folder / "config.json").read_bytes())
    levels = config.get("channel_multiplier") if isinstance(config, dict) else None
    if not isinstance(levels, list) or not levels:
        return None
    side = preprocessing.image_size // _pixels_per_code(preprocessing, len(levels))
    return side, side


def _pixels_per_code(preprocessing: Preprocessing, num_levels: int) -> int:
    """Along a side: each level but the last of the encoder halves the picture, after it has been folded."""
    return preprocessing.pixel_unshuffle * 2 ** (num_levels - 1)


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
