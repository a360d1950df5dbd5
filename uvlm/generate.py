"""Ask a trained model about an image, or have it draw one: sampling with a KV cache.

A method that leaves tokens out in the finished model too leaves them out here (decode.py). Prompts of equal length run
as one batch, so there is no padding anywhere.

Legend: B sequences in a batch, C image codes in the vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.encode import Encoded, encode
from data_pipeline.image_tokens import ImageTokenizer
from data_pipeline.schema import Document
from data_pipeline.vocab import Vocab
from uvlm.decode import Decoder, first_slots
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.run_folder import load_model, read_config


class Generator:
    """A model, its vocabulary, its tokenizer folder and the policy it was trained with."""

    def __init__(self, model: UnifiedVLM, vocab: Vocab, tokenizer: Path, policy: Policy) -> None:
        self.device = model.backbone.device
        self.model = model.float() if self.device.type == "cpu" else model
        self.vocab = vocab
        self.policy = policy
        self.image_tokenizer = ImageTokenizer.load(tokenizer / "image")

    @staticmethod
    def load(run: Path) -> Generator:
        """The trained model of a run folder, on a GPU if there is one. ValueError where there is no trained model."""
        config = read_config(run)
        vocab = Vocab.load(config.data.tokenizer)
        return Generator(load_model(run, vocab), vocab, config.data.tokenizer, config.policy)

    @torch.inference_mode()
    def answer(self, image: bytes, question: str, max_tokens: int = 32) -> str:
        """The greedy answer to a question about an image file's bytes. ValueError where the image cannot be decoded."""
        pixels = self.image_tokenizer.preprocess(image)
        codes = self.image_tokenizer.encode(pixels[None])[0]
        prompt = self._prompt(texts=(None, question), images=("0.png", None), codes={"0.npy": codes})
        decoder = Decoder(self.model, self.policy, [prompt])
        answer: list[int] = []
        while len(answer) < max_tokens:
            token_B = decoder.logits_BV[:, : self.vocab.first_code].argmax(dim=-1)
            if token_B.item() == self.vocab.end:
                break
            answer.append(int(token_B))
            decoder.step(token_B)
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
        encoded = [self._prompt(texts=(p,), images=(None,), codes={}) for p in prompts]
        pictures: dict[int, np.ndarray] = {}
        for length in sorted({len(prompt) for prompt in encoded}):
            members = [i for i, prompt in enumerate(encoded) if len(prompt) == length]
            codes = self._sample(
                [encoded[i] for i in members],
                [torch.Generator().manual_seed(seeds[i]) for i in members],
                temperature,
                top_k,
                guidance,
            )
            pictures.update(zip(members, self.image_tokenizer.decode(codes), strict=True))
        return [pictures[i] for i in range(len(encoded))]

    def _sample(
        self,
        prompts: list[Encoded],
        generators: list[torch.Generator],
        temperature: float,
        top_k: int,
        guidance: float,
    ) -> np.ndarray:
        """Codes of one image a prompt, [B, h, w]. Gumbel noise makes the arg max a draw from the softmax."""
        first, num_codes = self.vocab.first_code, self.vocab.num_codes
        height, width = self.image_tokenizer.codes_hw
        decoders = [Decoder(self.model, self.policy, prompts)]
        if guidance != 1.0:
            free = self._open_document((), (), {})
            decoders.append(Decoder(self.model, self.policy, [free] * len(prompts)))
        codes: list[torch.Tensor] = []
        ids_B = torch.full((len(prompts),), self.vocab.image_start, device=self.device)
        code: tuple[int, int] | None = None
        for number in range(height * width):
            scores_BC, *free_BC = (d.step(ids_B, code)[:, first : first + num_codes].float() for d in decoders)
            if free_BC:
                scores_BC = free_BC[0] + guidance * (scores_BC - free_BC[0])
            if top_k:
                smallest = scores_BC.topk(min(top_k, num_codes)).values[:, -1:]
                scores_BC = scores_BC.masked_fill(scores_BC < smallest, -torch.inf)
            if temperature > 0:
                uniform = torch.stack([torch.rand(num_codes, generator=g) for g in generators]).to(scores_BC.device)
                scores_BC = scores_BC / temperature - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            drawn_B = scores_BC.argmax(dim=-1)
            codes.append(drawn_B)
            ids_B, code = drawn_B + first, (number, height * width)
        return torch.stack(codes, dim=1).reshape(-1, height, width).cpu().numpy()

    def _prompt(
        self, texts: tuple[str | None, ...], images: tuple[str | None, ...], codes: dict[str, np.ndarray]
    ) -> Encoded:
        """An open document whose text says something and fits the model; else ValueError."""
        if not any(texts_of := [text.strip() for text in texts if text is not None]):
            raise ValueError("the text is empty; say what you ask for")
        prompt = self._open_document(texts, images, codes)
        longest = self.model.backbone.config.max_position_embeddings
        if len(prompt) >= longest:
            raise ValueError(f"the text {texts_of[0][:40]!r}... is too long: the model handles {longest} tokens")
        return prompt

    def _open_document(
        self, texts: tuple[str | None, ...], images: tuple[str | None, ...], codes: dict[str, np.ndarray]
    ) -> Encoded:
        """What training saw of these slots, without the end."""
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
        encoded = encode(document, self.vocab)
        assert isinstance(encoded, Encoded), encoded
        return first_slots(encoded, -1)
