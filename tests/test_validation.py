"""Validation gives the same numbers on any number of ranks, keeps to its share of the time and stops when told to."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.functional import cross_entropy

from data_pipeline.packing import make_pack
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from tests.corpus import write_corpus
from tests.helpers import mixed_pack, tiny_model
from tests.random_packs import IMAGE_FIRST, IMAGE_LAST, NO_LOSS, TEXT_ONLY, image, laid_out, pack_of, text
from tests.validation_worker import PROMPTS, Clock, StopOnLastRank, configured, make_loader, run_rank, validation
from uvlm.config import load_config
from uvlm.evaluate import documents_right
from uvlm.generate import Generator
from uvlm.losses import task_ids
from uvlm.pictures import picture_grid
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan
from uvlm.validation import MAX_SOURCES, means, pack_sums


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


TWO_ANSWERS = ("understand", [image(2, 2), text(3), text(2, loss=True), text(1), text(3, loss=True)])


def _sums(documents: list[tuple[str, list[Any]]], wrong: set[int]) -> dict[str, tuple[float, int]]:
    """Sums of a pack in which the n-th supervised token costs n nats, and the tokens in `wrong` are wrong."""
    pack = pack_of(documents, tail=7)
    supervised_S = TokenPlan.of(pack, Policy(), 1).supervised
    numbers_S = torch.arange(len(supervised_S))
    right_S = torch.tensor([number not in wrong for number in numbers_S.tolist()], dtype=torch.bool)
    return pack_sums(pack, supervised_S, numbers_S.float(), right_S)


def test_each_task_has_the_mean_over_its_own_tokens() -> None:
    # Supervised: 4 tokens of an answer, 10 of an image with its markers, 6 of a text.
    sums = _sums([IMAGE_FIRST, IMAGE_LAST, TEXT_ONLY], wrong=set())
    assert sums["valid/understand"] == (0 + 1 + 2 + 3, 4)
    assert sums["valid/generate"] == (sum(range(4, 14)), 10)
    assert sums["valid/text"] == (sum(range(14, 20)), 6)
    assert "valid/interleave" not in means({(0, 0): sums})
    assert means({(0, 0): sums})["valid/understand"] == 1.5


@pytest.mark.parametrize(
    ("wrong", "num_right"),
    [(set(), 3), ({0}, 2), ({3}, 2), ({4, 5}, 2), ({6}, 2), ({5, 6}, 1), ({0, 4, 6}, 0), ({9}, 3)],
)
def test_an_answer_is_right_only_if_all_of_it_is(wrong: set[int], num_right: int) -> None:
    # Answers of 4, 2 and 3 tokens; what is wrong in the picture that follows is no answer.
    sums = _sums([IMAGE_FIRST, NO_LOSS, TWO_ANSWERS, IMAGE_LAST], wrong)
    assert sums["valid/answers_right"] == (num_right, 3)


def test_answers_are_counted_as_uvlm_eval_counts_them() -> None:
    model, policy = tiny_model().eval(), Policy()
    documents = [laid_out([image(1, 2), text(2), text(1, loss=True)], "understand", seed) for seed in range(400)]
    pack = make_pack(documents, sum(map(len, documents)), 0, (0, 0))
    plan = TokenPlan.of(pack, policy, model.num_layers)
    logits_SV = model.logits(pack, plan)
    right_S = logits_SV.argmax(dim=1) == pack.labels[plan.supervised]
    expected = documents_right(model, pack, policy)
    assert 0 < sum(expected) < 400
    sums = pack_sums(pack, plan.supervised, torch.zeros(len(right_S)), right_S)
    assert sums["valid/answers_right"] == (sum(expected), 400)


def test_a_pack_without_supervised_tokens_adds_nothing() -> None:
    assert means({(0, 0): _sums([NO_LOSS], wrong=set())}) == {}


def test_where_documents_name_several_sources_each_has_a_mean() -> None:
    pack = mixed_pack()
    supervised_S = TokenPlan.of(pack, Policy(), 1).supervised
    nll_S, right_S = torch.arange(len(supervised_S)).float(), torch.ones(len(supervised_S), dtype=torch.bool)
    alone = means({(0, 0): pack_sums(pack, supervised_S, nll_S, right_S)})
    assert not any(name.startswith("valid_source/") for name in alone)
    pack.doc_source = ["vqa", "pairs", "pairs", ""]
    values = means({(0, 0): pack_sums(pack, supervised_S, nll_S, right_S)})
    num_vqa = 9  # tokens of the first document's answer
    assert values["valid_source/vqa"] == nll_S[:num_vqa].mean()
    assert values["valid_source/pairs"] == nll_S[num_vqa:].mean()
    assert values["valid/understand"] == values["valid_source/vqa"]


def test_of_very_many_sources_only_the_largest_have_a_mean() -> None:
    sums = {(0, number): {f"valid_source/{number}": (1.0, 1 + number)} for number in range(MAX_SOURCES + 5)}
    assert set(means(sums)) == {f"valid_source/{number}" for number in range(5, MAX_SOURCES + 5)}


def test_an_empty_prompt_is_refused_before_the_run_starts() -> None:
    with pytest.raises(ValueError, match=r"validation.prompts=.*a prompt is empty; write a caption such as"):
        load_config(Path("demo"), ["validation.prompts=[a red circle, ' ']"])


@pytest.mark.usefixtures("alone")
def test_the_same_weights_give_the_same_numbers_and_pictures_each_time(path: Path) -> None:
    validates, engine = validation(configured(path), Clock(1.0))
    (first, picture), (second, same_picture) = validates.run(20), validates.run(20)
    assert {"valid/understand", "valid/generate", "valid/answers_right"} <= set(first)
    assert first == second
    assert picture is not None
    assert same_picture is not None
    assert np.array_equal(picture, same_picture)
    assert engine.model.training, "training goes on as before"
    assert not any(parameter.grad is not None for parameter in engine.model.parameters())


@pytest.mark.usefixtures("alone")
def test_losses_are_those_of_the_finished_model_over_all_packs(path: Path) -> None:
    config = configured(path, "validation.prompts=[]", "validation.steps=3")
    assert config.policy.at_inference() != config.policy, "in training some tokens are left out"
    validates, engine = validation(config, Clock())
    values, _ = validates.run(20)
    model = engine.model.eval()
    losses: dict[int, list[torch.Tensor]] = {}
    loader = make_loader(config, Vocab.load(config.data.tokenizer))(config.data.valid)
    for packs, _ in itertools.islice(loader, 3):
        for pack in packs:
            plan = TokenPlan.of(pack, config.policy.at_inference(), model.num_layers, progress=1.0)
            nll_S = cross_entropy(model.logits(pack, plan), pack.labels[plan.supervised], reduction="none")
            for task, nll in zip(task_ids(pack).tolist(), nll_S, strict=True):
                losses.setdefault(task, []).append(nll)
    for task, nlls in losses.items():
        expected = torch.stack(nlls).double().mean().item()
        assert values[f"valid/{TASKS[task]}"] == pytest.approx(expected, rel=1e-9)
    assert len(losses) == 2


@pytest.mark.usefixtures("alone")
def test_the_picture_shows_what_each_prompt_gives_with_its_own_seed(path: Path) -> None:
    config = configured(path)
    validates, engine = validation(config, Clock())
    _, picture = validates.run(20)
    vocab, folder = Vocab.load(config.data.tokenizer), config.data.tokenizer
    images = Generator(engine.model.eval(), vocab, folder, config.policy.at_inference()).images(PROMPTS, [0, 1])
    assert picture is not None
    assert np.array_equal(picture, picture_grid(images, PROMPTS))


@pytest.mark.usefixtures("alone")
def test_it_is_due_every_so_many_steps_and_at_the_end(path: Path) -> None:
    validates, _ = validation(configured(path, "validation.every=8"), Clock())
    assert [step for step in range(1, 21) if validates.is_due(step)] == [8, 16, 20]
    for nothing in ("validation.every=0", "data.valid=[]"):
        validates, _ = validation(configured(path, "validation.prompts=[]", nothing), Clock())
        assert not validates.is_due(20)


@pytest.mark.usefixtures("alone")
def test_beyond_its_share_of_the_time_it_is_put_off_and_that_is_said_once(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    config = configured(path, "optim.steps=1000", "validation.prompts=[]", "validation.max_share=0.25")
    validates, _ = validation(config, clock, seconds=1.0)  # 2 steps of 4 packs: 8 seconds
    clock.seconds = 10.0
    assert validates.is_due(10)
    values, _ = validates.run(10)
    assert values["speed/validation_losses_seconds"] == 8.0
    assert values["speed/validation_share"] == pytest.approx(8 / 18)
    due_at = []
    for step in range(20, 100, 10):
        clock.seconds += 5.0
        if validates.is_due(step):
            due_at.append(clock.seconds)
            validates.run(step)
    assert due_at == [58.0], "16 seconds are a quarter of 64, so 56 have to pass first"
    output = capsys.readouterr().out
    assert output.count("validations are put off") == output.count("\n") == 1
    assert "validation.max_share=0.25" in output
    assert validates.is_due(1000), "the last step's takes place whatever it costs"


@pytest.mark.usefixtures("alone")
def test_pictures_wait_where_there_is_time_for_losses_only(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    validates, engine = validation(configured(path, "optim.steps=1000"), clock, seconds=0.01, drawing_seconds=1.0)
    clock.seconds = 10.0
    values, picture = validates.run(10)
    assert picture is not None, "what pictures cost is not known before the first"
    seconds = values["speed/validation_pictures_seconds"]
    assert seconds >= 16  # codes, one after the other
    clock.seconds += 1.5 * seconds  # enough for the first, not for a second
    assert validates.is_due(20)
    values, picture = validates.run(20)
    assert picture is None
    assert "valid/understand" in values
    assert engine.num_snapshots == 1, "a snapshot is taken only where a picture follows"
    assert "pictures of validation.prompts are put off" in capsys.readouterr().out
    assert validates.run(1000)[1] is not None, "the last step has its picture"
    clock.seconds += 3 * seconds
    assert validates.run(30)[1] is not None


@pytest.mark.usefixtures("alone")
def test_a_stop_between_packs_leaves_nothing_half_measured(path: Path) -> None:
    validates, engine = validation(configured(path), Clock(), StopOnLastRank(4))
    assert validates.run(20) == ({}, None)
    assert engine.num_calls == 3
    assert engine.model.training


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), ValueError("the text is too long")])
def test_pictures_that_cannot_be_drawn_do_not_end_the_run(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Generator, "images", fail)
    validates, engine = validation(configured(path), Clock())
    for step in (10, 20):
        values, picture = validates.run(step)
        assert picture is None
        assert "valid/understand" in values
    assert engine.num_snapshots == 1, "it is not tried again"
    sentence = f"no pictures of validation.prompts will be drawn from now on: {error}\n"
    assert capsys.readouterr().out == sentence


@pytest.fixture(scope="module")
def worlds(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of each world reports."""
    reports = {}
    for num_ranks in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"ranks_{num_ranks}")
        multiprocessing.spawn(run_rank, (num_ranks, path, folder), num_ranks)
        reports[num_ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return reports


@pytest.mark.slow
def test_one_two_and_four_ranks_see_the_same_numbers_to_the_last_bit(worlds: dict[int, list[dict[str, Any]]]) -> None:
    alone = worlds[1][0]
    assert {"valid/understand", "valid/generate", "valid/answers_right"} == set(alone["values"])
    for num_ranks, ranks in worlds.items():
        for rank in ranks:
            assert rank["values"] == alone["values"]
            assert rank["num_calls"] == 8 // num_ranks


@pytest.mark.slow
def test_rank_0_alone_has_the_picture_and_it_is_the_same(worlds: dict[int, list[dict[str, Any]]]) -> None:
    assert worlds[1][0]["picture"]
    for ranks in worlds.values():
        assert ranks[0]["picture"] == worlds[1][0]["picture"]
        assert all(rank["picture"] is None for rank in ranks[1:])


@pytest.mark.slow
def test_rank_0s_clock_decides_for_all(worlds: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in worlds.values():
        # A step that is not due, one that is put off, and the last; then there is time enough on rank 0 too.
        assert [rank["is_due"] for rank in ranks] == [[False, False, True, True]] * len(ranks)


@pytest.mark.slow
def test_a_stop_on_any_rank_ends_a_validation_on_all(worlds: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in worlds.values():
        assert [rank["stopped"] for rank in ranks] == [[[{}, None], 1, 2]] * len(ranks)


@pytest.mark.slow
def test_a_stop_on_any_rank_ends_the_drawing_and_losses_are_kept(worlds: dict[int, list[dict[str, Any]]]) -> None:
    for ranks in worlds.values():
        assert [rank["stopped_drawing"] for rank in ranks] == [[True, True, 3]] * len(ranks)
