"""An exported folder is the trained model, to transformers and to the next run."""

import json
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen3Config

from data_pipeline.encode import Encoded, encode
from data_pipeline.packing import make_pack
from data_pipeline.schema import Document
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab
from tests.corpus import launch, uvlm, write_corpus
from uvlm import run_folder
from uvlm.backbone import build_backbone
from uvlm.config import Config, load_config
from uvlm.decode import Decoder, first_slots
from uvlm.export import export
from uvlm.model import UnifiedVLM
from uvlm.token_plan import TokenPlan


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config.yaml."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def make_run(corpus: Path, run: Path, *overrides: str, finished: bool = True) -> Config:
    """A run folder without its training: random weights, in bf16, and some records."""
    config = load_config(corpus, [f"run={run}", *overrides])
    run_folder.prepare(config, {})
    records = [
        {"step": 10, "loss/understand": 2.5, "data/fill_share": 0.5},
        {"step": 20, "loss/understand": 1.25, "data/fill_share": 0.75},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        vocab = Vocab.load(config.data.tokenizer)
        torch.manual_seed(0)
        backbone = build_backbone(config.model, vocab.size).to(torch.bfloat16)
        with torch.no_grad():  # of a size that shows differences
            for parameter in backbone.parameters():
                parameter.mul_(3)
        run_folder.save_model(config, UnifiedVLM(backbone, config.policy), vocab.fingerprint)
    return config


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    """A finished run folder of its own for each test."""
    make_run(corpus, tmp_path / "run")
    return tmp_path / "run"


def documents(config: Config, vocab: Vocab) -> list[Encoded]:
    encoded = []
    for split in (Split.open(source.path) for source in config.data.train):
        for number in range(4):
            document = split.read(number)
            assert isinstance(document, Document)
            encoded.append(encode(document, vocab))
    return [document for document in encoded if isinstance(document, Encoded)]


@torch.inference_mode()
def assert_same_model(ours: UnifiedVLM, theirs: PreTrainedModel, config: Config) -> None:
    """Logits to 1e-4 and the same greedy tokens, both computed in fp32 with the weights as they are stored."""
    ours, theirs = ours.float().eval(), theirs.float().eval()
    vocab = Vocab.load(config.data.tokenizer)
    policy = config.policy.at_inference()
    for document in documents(config, vocab):
        pack = make_pack([document], len(document), 0, (0, 0))
        plan = TokenPlan.of(pack, policy, ours.num_layers, progress=1.0)
        logits = ours.logits(pack, replace(plan, supervised=torch.arange(len(document))))
        assert (theirs(pack.ids[None]).logits[0] - logits).abs().max() < 1e-4
        assert logits.std() > 1e-2, "the logits say something"

        prompt = first_slots(document, -2)
        decoder = Decoder(ours, policy, [prompt])
        expected: list[int] = []
        while len(expected) < 12 and (not expected or expected[-1] not in (vocab.end, vocab.eos)):
            expected.append(int(decoder.logits_BV.argmax()))
            decoder.step(torch.tensor(expected[-1:]))
        generated = theirs.generate(torch.tensor(prompt.ids)[None], max_new_tokens=12, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == expected


def load(out: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_has_the_logits_and_greedy_tokens_of_the_trained_one(
    corpus: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    config = make_run(corpus, tmp_path / "run", f"model.family={family}", f"model.tie_embeddings={str(tied).lower()}")
    export(tmp_path / "run", tmp_path / "out")
    theirs = load(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    ours = run_folder.load_model(tmp_path / "run", Vocab.load(config.data.tokenizer))
    assert_same_model(ours, theirs, config)


def test_weights_come_in_shards_of_a_bounded_size(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "one")
    export(run, tmp_path / "many", max_shard_bytes=50_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 50_000 + 5_000 for shard in shards)  # and a head of JSON
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_the_dtype_may_be_chosen(run: Path, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    export(run, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {expected}
    assert load(tmp_path / "out").dtype == expected


def test_others_find_what_the_codes_need(corpus: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    vocab = Vocab.load(corpus.parent / "tokenizer")
    facts = json.loads((out / "vocabulary.json").read_text())
    assert (facts["first_code"], facts["num_codes"], facts["size"]) == (vocab.first_code, vocab.num_codes, vocab.size)
    assert facts["specials"]["<|image|>"] == vocab.image_start
    assert (facts["codes_hw"], facts["image_size"]) == ([4, 4], 16)
    assert Vocab.load(out / "tokenizer").fingerprint == vocab.fingerprint, "it is a tokenizer folder of uvlm"
    settings = load(out).generation_config
    assert settings is not None
    assert (settings.bos_token_id, settings.eos_token_id) == (vocab.bos, [vocab.end, vocab.eos]), "where texts end"
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    for text in ("a red circle", "<|image|> é"):
        assert tokenizer.encode(text, add_special_tokens=False) == vocab.encode_text(text), "no text is a marker"


def test_the_snippet_of_the_model_card_runs_in_the_folder(run: Path, tmp_path: Path, repository: Path) -> None:
    export(run, tmp_path / "out")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert snippet
    result = subprocess.run(
        [sys.executable, "-c", snippet[1]],
        cwd=tmp_path / "out",
        env={"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_card_says_what_the_run_says_and_nothing_else(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards = corpus.parent / "generate"
    source = f"{{path: {shards}, name: 'a|b', weight: {{0: 1.0, 5: 0.5}}}}, {{path: {tmp_path}/gone, weight: 2}}"
    make_run(corpus, run, f"data.train=[{source}]")
    (run / "metrics.json").write_text(json.dumps({"vqa_accuracy": 0.75, "vqa_questions": 8}))
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "steps: 20 of 4 packs of 256 tokens, about 12,800 tokens of documents" in card  # 20 * 4 * 256 * 0.625
    assert "training loss, understand: 1.2500 at step 20" in card
    assert "answer accuracy: 0.7500 over 8 questions" in card
    manifest = json.loads((shards / "manifest.json").read_text())
    assert f"| a\\|b | 1 from step 0, 0.5 from step 5 | 96 | {manifest['image_tokenizer']} |" in card
    assert "| gone | 2 |  |  |" in card, "its manifest cannot be read"
    assert f"torch {torch.__version__}" in card
    assert "policy: route" in card
    (run / "metrics.jsonl").unlink()
    (run / "metrics.json").unlink()
    (run / "environment.txt").unlink()
    export(run, tmp_path / "unknown")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert not any(word in card for word in ("loss", "accuracy", "about", "torch 2", "tasks")), "unknown is left out"


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    """A finished run of two ranks under ZeRO-3, its embeddings not tied, its policy dense in the end."""
    run = corpus.parent / "trained"
    launch(corpus, 2, f"run={run}", "optim.steps=4", "checkpoint.every=2")
    return run


@pytest.fixture(scope="module")
def tied(corpus: Path) -> Path:
    """Some of its weights are frozen too."""
    run, model = corpus.parent / "tied", ("model.tie_embeddings=true", "model.freeze=['model.layers.0.*']")
    launch(corpus, 2, f"run={run}", "optim.steps=4", "checkpoint.every=2", *model)
    return run


@pytest.mark.slow
def test_a_trained_run_is_exported_by_the_command_line(trained: Path, tmp_path: Path) -> None:
    result = uvlm("export", str(trained), str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"model of step 4: {tmp_path / 'out'}"
    config = run_folder.read_config(trained)
    vocab = Vocab.load(config.data.tokenizer)
    assert_same_model(run_folder.load_model(trained, vocab), load(tmp_path / "out"), config)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trained", "tied"])
def test_a_checkpoint_of_sharded_files_is_exported_bit_for_bit(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The last one's weights are those of RUN/model, which training gathered by itself."""
    run = tmp_path / "copied elsewhere"
    shutil.copytree(request.getfixturevalue(which), run)
    expected = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(run / "model")
    export(run, tmp_path / "newest")
    newest = load_file(tmp_path / "newest" / "model.safetensors")
    assert newest.keys() == expected.keys()
    assert all(torch.equal(newest[name], expected[name]) for name in expected)
    load(tmp_path / "newest")

    weights = export(run, tmp_path / "middle", step=2)
    assert (weights.step, weights.is_finished) == (2, False)
    assert "Training was at step 2 of 4." in (tmp_path / "middle" / "README.md").read_text()
    middle = load_file(tmp_path / "middle" / "model.safetensors")
    assert not torch.equal(middle["model.norm.weight"], expected["model.norm.weight"]) or not torch.equal(
        middle["model.embed_tokens.weight"], expected["model.embed_tokens.weight"]
    )
    export(run, tmp_path / "master", dtype="fp32")
    master = load_file(tmp_path / "master" / "model.safetensors")
    assert all(torch.equal(master[name].bfloat16(), expected[name]) for name in expected)
    assert any(not torch.equal(master[name], expected[name].float()) for name in expected), "it is the finer copy"


SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [Qwen3Config(**SIZES, head_dim=16), LlamaConfig(**SIZES)], ids=["qwen3", "llama"])
def test_a_model_of_transformers_is_trained_exported_loaded_and_trained_again(
    family: Any, corpus: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family).save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "model.safetensors")

    def train(name: str, init_from: Path, *overrides: str) -> dict[str, torch.Tensor]:
        launch(
            corpus,
            2,
            f"run={tmp_path / name}",
            f"model={{init_from: {init_from}}}",
            "policy={name: dense}",
            "dtype=fp32",
            "optim.weight_decay=0",
            "checkpoint.every=100",
            *overrides,
        )
        export(tmp_path / name, tmp_path / f"{name}-exported")
        return load_file(tmp_path / f"{name}-exported" / "model.safetensors")

    trained = train("first", tmp_path / "start", "optim.steps=3")
    assert trained.keys() == start.keys()
    moved = {name: (trained[name][: len(start[name])] - start[name]).abs().max().item() for name in start}
    assert all(0 < by < 0.01 for by in moved.values()), moved  # three steps of at most 1e-3, from where it started
    config = run_folder.read_config(tmp_path / "first")
    vocab = Vocab.load(config.data.tokenizer)
    assert trained["model.embed_tokens.weight"].shape[0] == vocab.size, "enlarged for specials and codes"
    assert_same_model(run_folder.load_model(tmp_path / "first", vocab), load(tmp_path / "first-exported"), config)

    again = train("second", tmp_path / "first-exported", "optim.steps=1", "optim.learning_rate=1e-8")
    for name, tensor in trained.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


def test_an_exported_folder_can_be_read_by_whoever_may_read_its_config(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 1
