"""Training by real ranks under DeepSpeed ZeRO-3: the number of ranks and an interruption change nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from data_pipeline.loader import Loader
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from tests.corpus import launch, uvlm, write_corpus
from uvlm.backbone import build_backbone
from uvlm.checkpoint import complete
from uvlm.config import Config, load_config
from uvlm.losses import by_task, task_counts, task_ids, task_scales, task_sums
from uvlm.metrics import read_records
from uvlm.model import UnifiedVLM
from uvlm.optim import apply_learning_rate, learning_rate, parameter_groups, settings
from uvlm.run_folder import load_model
from uvlm.token_plan import TokenPlan
from uvlm.weights import Weights, check_weights, fill


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def two_ranks(config: Path) -> Path:
    """The run folder of 20 steps on two ranks."""
    run = config.parent / "two"
    launch(config, 2, f"run={run}", "validation={every: 10, steps: 2, prompts: [a red thing]}")
    return run


def _losses(run: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in record.items() if key.startswith("loss/")}
        for record in read_records(run)
        if "loss/mean" in record
    ]


def _assert_same_losses(run: Path, other: Path, tolerance: float) -> None:
    losses, others = _losses(run), _losses(other)
    assert len(losses) == len(others) == 20
    for step, (got, want) in enumerate(zip(losses, others, strict=True), 1):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert got[key] == pytest.approx(value, abs=tolerance), (step, key)


def test_one_rank_and_two_ranks_have_the_same_losses(config: Path, two_ranks: Path) -> None:
    run = config.parent / "one"
    launch(config, 1, f"run={run}")
    _assert_same_losses(run, two_ranks, 1e-6)  # measured: equal to the last bit
    norms = [
        [r["optim/gradient_norm"] for r in read_records(folder) if "loss/mean" in r] for folder in (run, two_ranks)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_stopped_run_goes_on_with_the_losses_of_an_uninterrupted_one(config: Path, two_ranks: Path) -> None:
    run = config.parent / "stopped"
    launch(config, 2, f"run={run}", "optim.steps=13")
    shutil.rmtree(run / "checkpoints" / "step_00000013")  # as if it died at step 13, with step 10 saved
    (run / "checkpoints" / "step_00000012").mkdir()  # and a half-written checkpoint, which has no marker
    launch(config, 2, f"run={run}")
    _assert_same_losses(run, two_ranks, 1e-6)
    steps = [record["step"] for record in read_records(run) if "loss/mean" in record]
    assert steps == list(range(1, 21)), "metrics.jsonl has each step once"
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/mean")] == list(range(1, 21)), "and so has TensorBoard"


def _plain_loop(config: Config) -> Iterator[dict[str, float]]:
    """The same training in plain PyTorch, one process, one batch: what every split over ranks must equal."""
    vocab = Vocab.load(config.data.tokenizer)
    model = UnifiedVLM(build_backbone(config.model, vocab.size), config.policy)
    fill(model, config.seed)
    optim = config.optim
    model.backbone.lm_head.z_loss = config.loss.z_loss
    groups = parameter_groups(model, optim)
    own = settings(groups)
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)
    data = config.data
    sources = [source.source() for source in data.train]
    loader = Loader(sources, vocab, pack_tokens=data.pack_tokens, num_rows=data.num_rows, seed=config.seed)
    for step, (packs, _) in enumerate(loader):
        counts = task_counts(packs)
        sums = torch.zeros(len(TASKS))
        for pack in packs:
            plan = TokenPlan.of(pack, config.policy, config.model.num_layers, config.seed, step / optim.steps)
            ids = task_ids(pack)
            loss, nll, _ = model(pack, plan, task_scales(counts, config.loss.weights, num_micro_batches=1)[ids])
            loss.backward()
            sums += task_sums(nll, ids)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clipping).item()
        apply_learning_rate(optimizer.param_groups, own, learning_rate(optim, step))
        optimizer.step()
        optimizer.zero_grad()
        losses = by_task(sums / counts.clamp(min=1), counts)
        yield {**{f"loss/{task}": loss for task, loss in losses.items()}, "optim/gradient_norm": norm}


@pytest.fixture(scope="module")
def one_task_a_rank(config: Path) -> Config:
    """The config of a finished run on two ranks that often have different tasks in a micro-step."""
    overrides = [
        f"run={config.parent / 'one-task-a-rank'}",
        "dtype=fp32",
        "data.pack_tokens=40",  # one document
        "model.tie_embeddings=true",
        "loss.weights={understand: 3.0, generate: 0.5}",
        "optim.steps=8",
        "optim.gradient_clipping=0.5",
        "optim.schedule=wsd",
        "optim.decay_share=0.25",
        "optim.embedding_rate=0.5",
        "optim.projection_rate=2.0",
        "loss.z_loss=0.01",
        "policy.keep={start: 0.25, end: 1.0}",
        "policy.full_tail=0.25",
        "policy.target_projections=qkv",
    ]
    launch(config, 2, *overrides)
    return load_config(config, overrides)


def test_zero_3_equals_a_plain_loop_where_ranks_hold_different_tasks(one_task_a_rank: Config) -> None:
    records = [record for record in read_records(one_task_a_rank.run) if "loss/mean" in record]
    assert len(records) == 8
    for record, want in zip(records, _plain_loop(one_task_a_rank), strict=False):
        for key, value in want.items():
            assert record[key] == pytest.approx(value, rel=1e-4), (record["step"], key)
    shares = [record["roles/flop_share"] for record in records]
    assert shares == sorted(shares), "a share that grows keeps more and more tokens"
    assert shares[0] < 0.95
    assert shares[-2:] == [1.0, 1.0], "the tail is dense"


def test_projections_of_images_belong_to_the_finished_model(one_task_a_rank: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_task_a_rank.run, run)
    vocab = Vocab.load(one_task_a_rank.data.tokenizer)
    model = load_model(run, vocab)
    own: Any = model.image_projections[0]
    attention = model.backbone.model.layers[0].self_attn
    assert sorted(own) == ["target_k", "target_q", "target_v"]
    assert not torch.equal(own["target_q"].weight, attention.q_proj.weight), "it was trained apart"
    with pytest.raises(ValueError, match="which are not those of this policy; give the policy it was trained with"):
        check_weights(UnifiedVLM(model.backbone), Weights(run / "model"))
    started = UnifiedVLM(model.backbone, one_task_a_rank.policy)
    fill(started, 0, Weights(run / "model"))
    assert torch.equal(started.image_projections.state_dict()["0.target_q.weight"], own["target_q"].weight)
    (run / "model" / "image_projections.safetensors").unlink()
    with pytest.raises(ValueError, match=r"image_projections.safetensors.*start the training again"):
        load_model(run, vocab)


def test_the_first_loss_is_that_of_a_uniform_guess(two_ranks: Path) -> None:
    summary = json.loads((two_ranks / "metrics.json").read_text())
    assert abs(summary["first_loss"] / summary["log_vocab"] - 1) < 0.05


def test_the_model_learns(two_ranks: Path) -> None:
    losses = _losses(two_ranks)
    assert losses[-1]["loss/understand"] < 0.7 * losses[0]["loss/understand"]


def test_tensorboard_has_losses_rate_speed_roles_validation_and_pictures(two_ranks: Path) -> None:
    board = EventAccumulator(str(two_ranks / "tensorboard"))
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    assert scalars >= {
        "loss/mean",
        "loss/understand",
        "loss/generate",
        "optim/learning_rate",
        "speed/tokens_per_second",
        "roles/query_share",
        "roles/image_query_share",
        "roles/flop_share",
        "valid/understand",
    }
    assert "generated" in board.Tags()["images"]
    # Half of the image tokens are left out in one of three layers.
    assert board.Scalars("roles/image_query_share")[0].value == pytest.approx(5 / 6)


def test_the_run_folder_holds_what_the_run_was_made_from(two_ranks: Path) -> None:
    tree = json.loads((two_ranks / "deepspeed.json").read_text())
    assert tree["gradient_accumulation_steps"] == 2
    assert "torch==" in (two_ranks / "environment.txt").read_text()
    assert [folder.name for folder in complete(two_ranks)] == ["step_00000010", "step_00000020"]


def test_the_trained_model_is_an_ordinary_transformers_folder(config: Path, two_ranks: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(two_ranks / "model", dtype=torch.float32)
    vocab = Vocab.load(config.parent / "tokenizer")
    logits = model(torch.tensor([[vocab.bos, vocab.image_start]])).logits
    assert logits.shape == (1, 2, vocab.size)
    share_of_codes = logits.softmax(-1)[0, -1, vocab.first_code :].sum()
    assert share_of_codes > 1.5 * vocab.num_codes / vocab.size, "it has learned that codes follow"


def test_an_image_is_drawn_and_a_question_answered(config: Path, two_ranks: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    result = uvlm("generate", str(two_ranks), "a red thing", "--out", str(out))
    assert result.returncode == 0, result.stderr
    result = uvlm("ask", str(two_ranks), str(out), "what color is it?")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    result = uvlm("eval", str(two_ranks), "--shards", str(config.parent / "understand"))
    assert result.returncode == 0, result.stderr
    assert "over 96 questions" in result.stdout


def test_a_run_folder_that_another_config_made_is_refused_and_nothing_is_lost(
    config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_ranks, run)
    result = uvlm("launch", str(config), "--nproc=2", f"run={run}", "seed=1")
    assert result.returncode == 1
    assert "was written with seed=0, this config has 1" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(complete(run)) == 2
    assert (run / "model").is_dir()
    for name in ("config.yaml", "deepspeed.json", "environment.txt", "metrics.json"):
        assert (run / name).read_bytes() == (two_ranks / name).read_bytes()


def test_an_interrupt_ends_all_ranks_without_a_stack_trace_and_says_what_to_do(config: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "uvlm",
        "launch",
        str(config),
        "--nproc=2",
        f"run={tmp_path}",
        "optim.steps=100000",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, which is what a terminal interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as training:
        assert training.stdout is not None
        output = ""
        for line in training.stdout:
            output += line
            if "step 3/" in line:
                os.killpg(training.pid, signal.SIGINT)
                break
        output += training.stdout.read()  # ends when the last rank has closed it
    assert training.returncode == 130, output
    assert "Traceback" not in output
    assert "interrupted; run the same command again" in output


def test_a_start_that_finds_other_data_is_refused_and_the_finished_model_stays(
    config: Path, two_ranks: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_ranks, tmp_path / "run")
    other = write_corpus(tmp_path / "other", samples_per_shard=7)  # the same documents, cut otherwise
    data = load_config(other).data
    sources = [{"path": str(source.path), "weight": source.weight} for source in data.train]
    result = uvlm(
        "launch",
        str(config),
        "--nproc=2",
        f"run={tmp_path / 'run'}",
        f"data.train={json.dumps(sources)}",
        "optim.steps=25",
    )
    assert result.returncode != 0
    assert "shards of source 'understand' are not those that the run was saved with" in result.stderr
    assert "Traceback" not in result.stderr
    for name in ("model/model.safetensors", "metrics.json", "metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (two_ranks / name).read_bytes()


def test_a_model_that_is_cut_is_named_with_the_way_back(two_ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(two_ranks, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = uvlm("generate", str(tmp_path / "run"), "a red thing", "--out", str(tmp_path / "x.png"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "is damaged" in result.stderr
    assert "start the training again" in result.stderr
