"""Trains a small image tokenizer: a `transformers.JanusVQVAE` on one's own pictures, in minutes on two cores.

Autoencoder with a codebook on the unit sphere: latents and rows have length one, as `JanusVQVAE.decode` demands, so the
ids of encoding and the rows of decoding cannot drift apart. The codebook is not trained by gradients but is the running
mean of the latents that chose each row (EMA); a row that nobody chose for DEAD_STEPS is put on a latent of the batch.
The loss counts pixels that differ from the picture's median colour more, because small things on large backgrounds are
what a caption speaks of. Everything random is a function of (seed, step), so a training that is interrupted and started
again ends with the same weights.

Measured on easy-vqa's 3,800 training pictures with the defaults (run): 0.7M parameters, 32,000 pictures in 93 s on one
core; PSNR 29.8 dB on pictures not trained on, all 256 codes used. After 40,000 pictures it was 30.7 dB, and the demo's
judge found shape and colour right in 98.4% of 183 validation pictures after a round trip.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import JanusVQVAE, JanusVQVAEConfig
from transformers.utils import logging

from data_pipeline.image_tokens import ImageTokenizer, Preprocessing, Progress, fold, nearest_rows, psnr

# B pictures, h w codes, C channels, D codebook dim, K codebook rows, N = B h w latents

DEAD_STEPS = 40
REVIVE_EVERY = 20
REVIVE_UNTIL = 0.7  # of the training: rows revived later would not settle
CODEBOOK_DECAY = 0.97
COMMITMENT = 0.25
SAVE_SECONDS = 15.0
CONTRAST_REACH = 5  # pixels, odd


@dataclass(frozen=True)
class ImageTraining:
    """`image_size` in pixels, a multiple of 8; the code grid has image_size / 8 codes a side."""

    steps: int = 2000
    image_size: int = 64
    num_codes: int = 256
    batch_size: int = 16
    learning_rate: float = 2e-3
    contrast_weight: float = 6.0
    base_channels: int = 64
    folding: int = 4
    embed_dim: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size % 8:
            raise ValueError(f"image_size={self.image_size} must be a multiple of 8, such as 64")
        if self.steps < 1 or self.num_codes < 2:
            raise ValueError(f"steps={self.steps} must be at least 1 and num_codes={self.num_codes} at least 2")

    def model_config(self) -> JanusVQVAEConfig:
        return JanusVQVAEConfig(
            embed_dim=self.embed_dim,
            num_embeddings=self.num_codes,
            latent_channels=64,
            in_channels=3 * self.folding**2,
            out_channels=3 * self.folding**2,
            base_channels=self.base_channels,
            channel_multiplier=[1, 1],
            num_res_blocks=0,
            num_patches=self.image_size // 8,
        )


def train_image_tokenizer(
    images_BHWC: np.ndarray,
    held_out_BHWC: np.ndarray,
    folder: Path,
    settings: ImageTraining,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains on uint8 pictures [B, H, W, 3] and writes `folder`, a pretrained folder that ImageTokenizer loads.

    Returns the report: PSNR in dB on `held_out_BHWC`, codes used, seconds (all starts together), pictures seen. The
    state of a running training lies beside `folder` in `<name>.training.pt` until the end.
    """
    started = time.monotonic()
    state_path = folder.with_name(folder.name + ".training.pt")
    training = _Training(settings, images_BHWC)
    training.resume(state_path)
    before = training.seconds
    saved = started
    with _one_thread():
        while training.step < settings.steps:
            if progress is not None:
                progress("image tokenizer", training.step, settings.steps)
            training.train_step()
            if time.monotonic() - saved > SAVE_SECONDS:
                training.seconds = before + time.monotonic() - started
                training.save(state_path)
                saved = time.monotonic()
    training.seconds = before + time.monotonic() - started
    training.export(folder)
    state_path.unlink(missing_ok=True)
    if progress is not None:
        progress("image tokenizer", settings.steps, settings.steps)
    return _measure(folder, held_out_BHWC) | {
        "seconds": round(training.seconds, 1),
        "images_seen": settings.steps * settings.batch_size,
        "images_per_second": round(settings.steps * settings.batch_size / training.seconds, 1),
        "codes_revived": training.num_revived,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "settings": asdict(settings),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: sums repeat on any number of cores, and where something else runs, two threads wait for each other
    at every small operation: 5 to 34 pictures/s against 221 with one (run, two cores, load 4)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _measure(folder: Path, images_BHWC: np.ndarray) -> dict[str, Any]:
    tokenizer = ImageTokenizer.load(folder)
    codes: list[np.ndarray] = []
    decibels: list[np.ndarray] = []
    for start in range(0, len(images_BHWC), 64):
        batch_BHWC = images_BHWC[start : start + 64]
        codes.append(tokenizer.encode(batch_BHWC))
        decibels.append(psnr(batch_BHWC, tokenizer.decode(codes[-1])))
    psnr_B = np.concatenate(decibels)
    share_K = np.bincount(np.concatenate(codes).ravel(), minlength=tokenizer.num_codes) / np.concatenate(codes).size
    used = share_K[share_K > 0]
    return {
        "psnr": round(float(psnr_B.mean()), 2),
        "psnr_lowest": round(float(psnr_B.min()), 2),
        "codes_used": len(used),
        "codes_effective": round(float(np.exp(-(used * np.log(used)).sum())), 1),  # perplexity
        "images_measured": len(images_BHWC),
        "image_tokenizer": tokenizer.fingerprint,
        "num_codes": tokenizer.num_codes,
        "codes_hw": list(tokenizer.codes_hw),
    }


class _Training:
    """Model, optimizer and codebook; `step` counts optimizer steps taken."""

    def __init__(self, settings: ImageTraining, images_BHWC: np.ndarray) -> None:
        self.settings = settings
        self.images = torch.from_numpy(images_BHWC)
        record = json.dumps(asdict(settings), sort_keys=True).encode()
        self.identity = hashlib.sha256(record + np.ascontiguousarray(images_BHWC).tobytes()).hexdigest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = JanusVQVAE(settings.model_config()).train()
        self.model.quantize.embedding.weight.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=1e-4,
        )
        self.sums_KD = torch.zeros(settings.num_codes, settings.embed_dim)
        self.last_used_K = torch.zeros(settings.num_codes, dtype=torch.int64)
        self.step = 0
        self.num_revived = 0
        self.seconds = 0.0

    def train_step(self) -> None:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        pixels_BChw, weight_BChw = self._batch(generator)
        with torch.autocast("cpu", torch.bfloat16):
            latent_BDhw = self.model.quant_conv(self.model.encoder(pixels_BChw))
        latent_BDhw = functional.normalize(latent_BDhw.float(), dim=1)
        vectors_ND = latent_BDhw.detach().permute(0, 2, 3, 1).reshape(-1, settings.embed_dim)
        if self.step == 0:
            self._start_codebook(vectors_ND, generator)
        codes_N = nearest_rows(latent_BDhw.detach(), self.model.quantize.embedding.weight)
        rows_BDhw = self.model.quantize.embedding.weight[codes_N].reshape(
            latent_BDhw.shape[0], *latent_BDhw.shape[2:], -1
        )
        rows_BDhw = rows_BDhw.permute(0, 3, 1, 2).contiguous()
        straight_BDhw = latent_BDhw + (rows_BDhw - latent_BDhw).detach()  # gradients pass the choice of a row by
        with torch.autocast("cpu", torch.bfloat16):
            decoded_BChw = self.model.decoder(self.model.post_quant_conv(straight_BDhw))
        error_BChw = decoded_BChw.float() - pixels_BChw
        reconstruction = (weight_BChw * (error_BChw.abs() + error_BChw.square())).mean()
        commitment = (latent_BDhw - rows_BDhw.detach()).square().sum(dim=1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (reconstruction + COMMITMENT * commitment).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._schedule()
        self.optimizer.step()
        self._update_codebook(codes_N, vectors_ND, generator)
        self.step += 1

    def _schedule(self) -> float:
        warm_up = min(1.0, (self.step + 1) / 50)
        return warm_up * 0.5 * (1.0 + math.cos(math.pi * self.step / self.settings.steps))

    def _batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Folded pictures and the weight of each value. An epoch is a permutation; half are mirrored."""
        size = min(self.settings.batch_size, len(self.images))
        per_epoch = len(self.images) // size
        epoch, within = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(self.settings.seed * 7_919 + epoch)
        )
        images_BHWC = self.images[order[within * size : (within + 1) * size]]
        mirrored_B = torch.rand(size, generator=generator) < 0.5
        images_BHWC = torch.where(mirrored_B[:, None, None, None], images_BHWC.flip(2), images_BHWC)
        median_B1C = images_BHWC.flatten(1, 2).median(dim=1, keepdim=True).values
        contrast_BHW = (images_BHWC.float() - median_B1C[:, None].float()).abs().amax(dim=3) / 127.5
        # Widened, so that what lies just outside a thing counts as much as the thing: halos made circles squares.
        near_B1HW = functional.max_pool2d(contrast_BHW[:, None], CONTRAST_REACH, stride=1, padding=CONTRAST_REACH // 2)
        weight_B1HW = 1.0 + self.settings.contrast_weight * near_B1HW
        weight_BChw = functional.pixel_unshuffle(weight_B1HW.expand(-1, 3, -1, -1), self.settings.folding)
        return fold(images_BHWC.numpy(), self.settings.folding), weight_BChw

    def _start_codebook(self, vectors_ND: torch.Tensor, generator: torch.Generator) -> None:
        chosen = torch.randint(len(vectors_ND), (self.settings.num_codes,), generator=generator)
        self.sums_KD = vectors_ND[chosen].clone()
        self.model.quantize.embedding.weight.copy_(self.sums_KD)

    @torch.no_grad()
    def _update_codebook(self, codes_N: torch.Tensor, vectors_ND: torch.Tensor, generator: torch.Generator) -> None:
        added_KD = torch.zeros_like(self.sums_KD).index_add_(0, codes_N, vectors_ND)
        self.sums_KD = self.sums_KD * CODEBOOK_DECAY + added_KD * (1.0 - CODEBOOK_DECAY)
        self.last_used_K[codes_N] = self.step
        if self.step % REVIVE_EVERY == REVIVE_EVERY - 1 and self.step < REVIVE_UNTIL * self.settings.steps:
            dead = (self.step - self.last_used_K >= DEAD_STEPS).nonzero().squeeze(1)
            chosen = torch.randint(len(vectors_ND), (len(dead),), generator=generator)
            self.sums_KD[dead] = 0.1 * vectors_ND[chosen]  # light, so that the row's own users soon decide its place
            self.last_used_K[dead] = self.step
            self.num_revived += len(dead)
        self.model.quantize.embedding.weight.copy_(functional.normalize(self.sums_KD, dim=1))

    def save(self, path: Path) -> None:
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums_KD,
            "last_used": self.last_used_K,
            "step": self.step,
            "num_revived": self.num_revived,
            "seconds": self.seconds,
        }
        temporary = path.with_name(path.name + ".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on from a saved state; one of other pictures or settings is ignored."""
        if not path.is_file():
            return
        try:
            state = torch.load(path, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is no state of a training; remove it to train the image tokenizer anew"
            ) from error
        if state["identity"] != self.identity:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums_KD, self.last_used_K = state["sums"], state["last_used"]
        self.step, self.num_revived, self.seconds = state["step"], state["num_revived"], state["seconds"]

    def export(self, folder: Path) -> None:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        logging.disable_progress_bar()  # a bar for one file would tear through the caller's own
        self.model.eval().save_pretrained(temporary)
        Preprocessing(self.settings.image_size, self.settings.folding).save(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
