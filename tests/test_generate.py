"""Drawing with a cache draws what the packed forward pass predicts, and each picture depends on its seed alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.encode import Encoded, encode
from data_pipeline.packing import make_pack
from data_pipeline.vocab import Vocab
from tests.corpus import write_corpus
from tests.test_schema import make_document
from uvlm import generate
from uvlm.backbone import ModelConfig, build_backbone
from uvlm.generate import Generator
from uvlm.model import UnifiedVLM
from uvlm.policies import HMGen, Policy
from uvlm.token_plan import TokenPlan


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    tokenizer = write_corpus(tmp_path_factory.mktemp("corpus")).parent / "tokenizer"
    vocab = Vocab.load(tokenizer)
    torch.manual_seed(1)
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        tie_embeddings=False,
    )
    policy = Policy(target=HMGen(num_shallow=1), target_projections="qkv")
    model = UnifiedVLM(build_backbone(config, vocab.size), policy)
    for projection in model.image_projections.parameters():
        torch.nn.init.normal_(projection, std=0.3)
    torch.nn.init.normal_(model.backbone.lm_head.weight, std=0.3)  # spread, so that the likeliest code stands out
    return Generator(model.eval(), vocab, tokenizer, policy)


def test_the_codes_drawn_at_temperature_zero_are_the_likeliest_of_the_packed_forward_pass(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    decode = generator.image_tokenizer.decode

    def watched(codes: np.ndarray) -> np.ndarray:
        drawn.append(codes)
        return decode(codes)

    monkeypatch.setattr(generator.image_tokenizer, "decode", watched)
    generator.images(["a red thing"], [0], temperature=0.0, guidance=1.0)
    codes = drawn[0][0].astype(np.uint16)

    document = make_document("d", ("a red thing", None), task="generate", codes={"1.npy": codes})
    encoded = encode(document, generator.vocab)
    assert isinstance(encoded, Encoded)
    pack = make_pack([encoded], 64, generator.vocab.pad, (0, 0))
    model = generator.model
    logits = model.logits(pack, TokenPlan.of(pack, generator.policy, model.num_layers))
    first = generator.vocab.first_code
    likeliest = logits[1:-1, first:].argmax(-1)  # the first and last label are the markers
    assert likeliest.tolist() == codes.flatten().tolist()


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_the_batch(generator: Generator) -> None:
    prompts = ["a red thing", "a blue thing", "a red thing", "red"]
    together = generator.images(prompts, [3, 3, 4, 3])
    alone = [generator.images([p], [s])[0] for p, s in zip(prompts, [3, 3, 4, 3], strict=True)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(together[0], together[2]), "another seed, another picture"
    assert together[0].shape == (16, 16, 3)


def test_top_1_is_temperature_0(generator: Generator) -> None:
    greedy = generator.images(["a red thing"], [0], temperature=0.0)[0]
    np.testing.assert_array_equal(generator.images(["a red thing"], [9], top_k=1)[0], greedy)
    assert not np.array_equal(generator.images(["a red thing"], [9])[0], greedy)


def test_guidance_moves_the_draw_away_from_what_comes_without_a_prompt(generator: Generator) -> None:
    plain = generator.images(["a red thing"], [3], guidance=1.0)[0]
    assert not np.array_equal(generator.images(["a red thing"], [3], guidance=4.0)[0], plain)
    # With guidance 0 only the unconditional half is left, and the prompt no longer matters.
    free = [generator.images([prompt], [3], guidance=0.0)[0] for prompt in ("a red thing", "blue")]
    np.testing.assert_array_equal(free[0], free[1])


def test_an_answer_is_text_even_where_the_likeliest_token_is_a_code(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = generator.vocab
    answer = [*vocab.encode_text(" blue"), vocab.end]
    asked: list[Encoded] = []

    class Scripted:
        def __init__(self, model: UnifiedVLM, policy: Policy, prompts: list[Encoded]) -> None:
            asked.extend(prompts)
            self.num_tokens = 0

        @property
        def logits_BV(self) -> torch.Tensor:
            logits = torch.zeros(1, vocab.size)
            logits[0, answer[self.num_tokens]] = 1.0
            logits[0, vocab.first_code] = 2.0  # likelier than any text
            return logits

        def step(self, ids_B: torch.Tensor) -> None:
            assert ids_B.tolist() == [answer[self.num_tokens]]
            self.num_tokens += 1

    monkeypatch.setattr(generate, "Decoder", Scripted)
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(image, "PNG")
    assert generator.answer(image.getvalue(), "what color is it?") == "blue"
    prompt = asked[0].ids.tolist()
    assert prompt[0] == vocab.bos
    assert prompt[1] == vocab.image_start
    assert vocab.decode_text(prompt) == "what color is it?"


def test_bytes_that_are_no_image_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        generator.answer(b"no image", "what?")
