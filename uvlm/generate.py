"""Ask a trained model about an image, or have it draw one: sampling with a KV cache.

The trained model is an ordinary `transformers` model and dense at inference, so the library's own forward pass and
cache serve. Prompts of equal length run as one batch, so there is no padding anywhere.

Legend: B sequences in a batch, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from data_pipeline.encode import Encoded, encode
from data_pipeline.image_tokens import ImageTokenizer
from data_pipeline.schema import Document
from data_pipeline.vocab import Vocab
from uvlm.run_folder import load_model, read_config


class Generator:
    """A model, its vocabulary and its image tokenizer."""

    def __init__(self, model: PreTrainedModel, vocab: Vocab, tokenizer: Path) -> None:
        self.model = model.float() if model.device.type == "cpu" else model
        self.vocab = vocab
        self.image_tokenizer = ImageTokenizer.load(tokenizer / "image")

    @staticmethod
    def load(run: Path) -> Generator:
        """The trained model of a run folder, on a GPU if there is one. ValueError where there is no trained model."""
        config = read_config(run)
        vocab = Vocab.load(config.data.tokenizer)
        return Generator(load_model(run, vocab), vocab, config.data.tokenizer)

    @torch.inference_mode()
    def answer(self, image: bytes, question: str, max_tokens: int = 32) -> str:
        """The greedy answer to a question about an image file's bytes. ValueError where the image cannot be decoded."""
        pixels = self.image_tokenizer.preprocess(image)
        codes = self.image_tokenizer.encode(pixels[None])[0]
        prompt = self._prompt(texts=(None, question), images=("0.png", None), codes={"0.npy": codes})
        cache, answer = DynamicCache(config=self.model.config), []
        ids_BP = torch.tensor([prompt], device=self.model.device)
        for _ in range(max_tokens):
            token = int(self._logits(ids_BP, cache)[0, : self.vocab.first_code].argmax())
            if token == self.vocab.end:
                break
            answer.append(token)
            ids_BP = torch.tensor([[token]], device=self.model.device)
        return self.vocab.decode_text(answer).strip()

    @torch.inference_mode()
    def images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        temperature: float = 0.7,
        top_k: int = 0,
        guidance: float = 2.0,
    ) -> list[np.ndarray]:
        """One picture for each (prompt, seed), uint8 [height, width, 3].

        Each picture draws from a generator of its own, so it does not depend on what else is in the batch.

        Args:
            temperature: 0 takes the most likely code each time. The defaults suit the demo's model (docs/log.md).
            top_k: draw among this many most likely codes; 0 draws among all.
            guidance: classifier-free guidance (arXiv 2207.12598): scores are u + guidance * (c - u), with c from the
                prompt and u from no prompt; 1 is without. It helps a model that has also seen images alone.
        """
        encoded = [[*self._prompt(texts=(p,), images=(None,), codes={}), self.vocab.image_start] for p in prompts]
        pictures: dict[int, np.ndarray] = {}
        for length in sorted({len(prompt) for prompt in encoded}):
            members = [i for i, prompt in enumerate(encoded) if len(prompt) == length]
            codes = self._sample(
                torch.tensor([encoded[i] for i in members], device=self.model.device),
                [torch.Generator().manual_seed(seeds[i]) for i in members],
                temperature,
                top_k,
                guidance,
            )
            pictures.update(zip(members, self.image_tokenizer.decode(codes), strict=True))
        return [pictures[i] for i in range(len(encoded))]

    def _sample(
        self,
        ids_BP: torch.Tensor,
        generators: list[torch.Generator],
        temperature: float,
        top_k: int,
        guidance: float,
    ) -> np.ndarray:
        """Codes of one image a prompt, [B, h, w]. Gumbel noise makes the arg max a draw from the softmax."""
        first, num_codes = self.vocab.first_code, self.vocab.num_codes
        height, width = self.image_tokenizer.codes_hw
        cache, codes = DynamicCache(config=self.model.config), []
        free_cache = DynamicCache(config=self.model.config)
        free_BP = torch.tensor([[self.vocab.bos, self.vocab.image_start]], device=ids_BP.device).expand(len(ids_BP), -1)
        for _ in range(height * width):
            scores_BC = self._logits(ids_BP, cache)[:, first : first + num_codes].float()
            if guidance != 1.0:
                free_BC = self._logits(free_BP, free_cache)[:, first : first + num_codes].float()
                scores_BC = free_BC + guidance * (scores_BC - free_BC)
            if top_k:
                smallest = scores_BC.topk(min(top_k, num_codes)).values[:, -1:]
                scores_BC = scores_BC.masked_fill(scores_BC < smallest, -torch.inf)
            if temperature > 0:
                uniform = torch.stack([torch.rand(num_codes, generator=g) for g in generators]).to(scores_BC.device)
                scores_BC = scores_BC / temperature - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            drawn_B = scores_BC.argmax(dim=-1)
            codes.append(drawn_B)
            ids_BP = free_BP = (drawn_B + first)[:, None]
        return torch.stack(codes, dim=1).reshape(-1, height, width).cpu().numpy()

    def _logits(self, ids_BP: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits after the last token of each sequence, [B, V]; the cache grows by P positions."""
        output = self.model(input_ids=ids_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _prompt(
        self, texts: tuple[str | None, ...], images: tuple[str | None, ...], codes: dict[str, np.ndarray]
    ) -> list[int]:
        """Ids of an open document: what training saw of these slots, without the end."""
        document = Document(
            key="prompt",
            texts=texts,
            images=images,
            task="interleave",
            loss=(False,) * len(texts),
            source="prompt",
            meta={},
            image_bytes={},
            codes=codes,
        )
        if not any(texts_of := [text.strip() for text in texts if text is not None]):
            raise ValueError("the text is empty; say what you ask for")
        encoded = encode(document, self.vocab)
        assert isinstance(encoded, Encoded), encoded
        longest = self.model.config.max_position_embeddings
        if len(encoded) > longest:
            raise ValueError(f"the text {texts_of[0][:40]!r}... is too long: the model handles {longest} tokens")
        return encoded.ids[:-1].tolist()
