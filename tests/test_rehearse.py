"""A rehearsal: real ranks of a large world, each alone; what they do is the same, or is told by rank and module.

Whole rehearsals take half a minute of two cores, as each rank is a process that imports everything; what is compared
and how it is said is tested on lists alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.corpus import uvlm, write_corpus
from tests.fake_slurm import FakeSlurm
from tests.submitting import REQUEST, env_file, run, slurm, submit
from uvlm.check import check
from uvlm.config import Config, dump_config, load_config
from uvlm.plan import Planner
from uvlm.rehearse import Call, Collective, Report, Result, default_ranks, difference, problems_of, rehearse
from uvlm.submit import Submitted

__all__ = ["env_file", "run", "slurm", "submit"]  # fixtures

WORLD = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a small corpus of two tasks, with a row and a half-sized pack for each of many ranks."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(corpus: Path, *overrides: str) -> Config:
    return load_config(corpus, [f"data.num_rows={WORLD}", "data.pack_tokens=64", *overrides])


def not_alike(
    corpus: Path, case: str, rank: int, *ranks: int, num_steps: int = 1, overrides: tuple[str, ...] = ()
) -> Report:
    """A rehearsal in which one rank is not as the others are (rehearsal_worker.py)."""
    worker = ("-m", "tests.rehearsal_worker", case, str(rank))
    return rehearse(config_of(corpus, *overrides), WORLD, ranks, num_steps=num_steps, worker=worker)


def gather(module: str, elements: int = 8, step: int = 1, phase: str = "forward") -> Collective:
    return Collective("allgather_base", "bfloat16", (elements,), 16, step, phase, module)


def result(rank: int, collectives: list[Collective], calls: list[Call] | None = None, error: str = "") -> Result:
    return Result(rank, collectives, calls or [], {}, {}, {}, 0.0, error)


def test_ranks_that_do_the_same_do_not_differ() -> None:
    assert difference({0: [gather("a"), gather("b")], 9: [gather("a"), gather("b")]}) is None
    assert difference({}) is None


def test_the_first_difference_is_told_by_place_and_module_and_the_odd_rank_against_most() -> None:
    usual = [gather("start", step=0), gather("a"), gather("b"), gather("c")]
    odd = [gather("start", step=0), gather("a"), gather("c"), gather("c")]
    assert difference({0: odd, 1: usual, 2: usual, 7: usual}) == (
        "rank 0 issued allgather_base of 8 bfloat16 elements among 16 ranks in the forward of c as collective 2 of "
        "step 1, where ranks 1-2, 7 issued allgather_base of 8 bfloat16 elements among 16 ranks in the forward of b"
    )


@pytest.mark.parametrize(
    "other",
    [
        gather("a")._replace(operation="broadcast"),
        gather("a")._replace(dtype="float32"),
        gather("a", elements=9),
        gather("a")._replace(elements=(4, 4)),
        gather("a")._replace(group_size=8),
        gather("a", phase="backward"),
        gather("b"),
    ],
)
def test_a_difference_in_anything_counts(other: Collective) -> None:
    assert "ranks 0-1" in str(difference({0: [gather("a")], 1: [gather("a")], 2: [other]}))


def test_a_rank_that_stops_issuing_differs_and_one_that_failed_does_not() -> None:
    whole, cut = [gather("a"), gather("b")], [gather("a")]
    assert str(difference({0: whole, 1: whole, 2: cut})).startswith("rank 2 did nothing more as collective 2 of step 1")
    assert difference({0: whole, 1: whole, 2: cut}, unfinished=[2]) is None


def test_gradients_in_another_order_are_a_problem_although_the_collectives_are_the_same() -> None:
    def calls(*names: str) -> list[Call]:
        return [Call("received the gradient of", name, 1) for name in names]

    results = [result(rank, [gather("a")], calls("k.weight", "v.weight")) for rank in (0, 1)]
    assert problems_of(results) == []
    (problem,) = problems_of([*results, result(5, [gather("a")], calls("v.weight", "k.weight"))])
    assert "rank 5 received the gradient of v.weight as call or gradient 1 of step 1" in problem


def test_the_default_ranks_are_the_first_two_one_of_another_node_and_the_last() -> None:
    assert default_ranks(1024, 8) == [0, 1, 512, 1023]
    assert default_ranks(12, 8) == [0, 1, 8, 11]
    assert default_ranks(2, 8) == [0, 1]
    assert default_ranks(1, 8) == [0]


def test_ranks_outside_of_the_world_are_refused(corpus: Path) -> None:
    for ranks in ([0, 16], [-1], []):
        with pytest.raises(ValueError, match="a world of 16 has ranks 0 to 15"):
            rehearse(config_of(corpus), WORLD, ranks)


def test_what_check_refuses_is_refused_before_any_rank_starts(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.num_rows=16 does not divide over 5 ranks"):
        rehearse(config_of(corpus), 5)


def test_the_command_says_what_is_no_list_of_ranks(corpus: Path) -> None:
    done = uvlm("rehearse", str(corpus), "--world=16", "--ranks=0-3")
    assert done.returncode == 1
    assert done.stderr == "error: --ranks=0-3 must be numbers with commas between them, such as 0,1,517\n"


def test_a_submission_whose_ranks_differ_is_refused_before_the_queue(
    submit: Callable[..., Submitted], slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def rehearsed(config: Config, world_size: int, *, gpus_per_node: int, **_: object) -> Report:
        asked.append((world_size, gpus_per_node))
        return Report(world_size, 2, [result(0, [])], {}, problems[:], 1.0)

    monkeypatch.setattr("uvlm.rehearse.rehearse", rehearsed)
    problems = ["rank 3 does something else"]
    with pytest.raises(ValueError, match="nothing was submitted: rank 3 does something else"):
        submit(rehearse=True)
    assert slurm.calls("sbatch") == []
    problems.clear()
    assert submit(rehearse=True, request=REQUEST._replace(gpus_per_node=0)).job
    assert asked == [(4, 2), (2, 1)]
    with pytest.raises(ValueError, match=r"^--rehearse reads the data, .* before --after's jobs end; leave out one$"):
        submit(rehearse=True, request=REQUEST._replace(after=["42"]))


@pytest.mark.slow
def test_a_submission_is_rehearsed_for_real(
    submit: Callable[..., Submitted], slurm: FakeSlurm, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(rehearse=True, request=REQUEST._replace(gpus_per_node=0)).job
    assert "rehearsal: ranks 0-1 of 2 issued the same" in capfd.readouterr().err


def sent(collectives: list[Collective], operation: str, world_size: int) -> float:
    """Bytes that a rank sends in collectives of this kind, by rings."""
    given = sum(
        sum(one.elements) * getattr(torch, one.dtype).itemsize
        for one in collectives
        if one.operation.startswith(operation)
    )
    others = world_size - 1
    return (
        given
        * {"allgather": others, "reduce_scatter": others / world_size, "allreduce": 2 * others / world_size}[operation]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("json_name", "reduction"), [("zero3.json", "reduce_scatter"), ("zero2.json", "allreduce")])
def test_the_plan_says_what_the_collectives_of_a_step_send(corpus: Path, json_name: str, reduction: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "head_dim": 64}  # not all stays whole
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    config = config_of(corpus, f"deepspeed={json_name}", f"data.num_rows={2 * WORLD}", *overrides)
    report = rehearse(config, WORLD, [0])
    step = [one for one in report.results[0].collectives if one.step == report.num_steps]
    flow = Planner(config).at(WORLD).communication
    assert sent(step, "allgather", WORLD) == pytest.approx(flow.gather, rel=1e-3)
    assert sent(step, reduction, WORLD) == pytest.approx(flow.reduce, rel=1e-3)
    everything = sum(sent(step, kind, WORLD) for kind in ("allgather", "reduce_scatter", "allreduce"))
    assert everything == pytest.approx(flow.total, rel=0.05)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rehearsal_that_is_ended_ends_its_ranks(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "uvlm", "rehearse", str(corpus), "--world=4", "--steps=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        ranks: list[psutil.Process] = []
        while not ranks and process.poll() is None:
            time.sleep(0.05)
            children = psutil.Process(process.pid).children()
            ranks = [child for child in children if "uvlm.rehearsal_rank" in words_of(child)]
        assert [*tmp_path.glob("uvlm-rehearsal-*/config.yaml")]
        process.send_signal(number)
        try:
            said = process.communicate(timeout=60)[0]
        finally:
            process.kill()  # its ranks end with it
    assert ranks, said
    running = psutil.wait_procs(ranks, timeout=60)[1]
    for rank in running:
        rank.kill()
    assert running == []
    if number == signal.SIGTERM:
        assert process.returncode == 130, said
        assert [*tmp_path.glob("uvlm-rehearsal-*")] == []


@pytest.mark.slow
def test_a_rehearsal_is_ended_by_a_signal_that_comes_while_it_starts_a_rank(corpus: Path) -> None:
    program = "; ".join(
        [
            "import os, signal, sys",
            "from uvlm.cli import main",
            # Python drops what a handler raises in here; the signal is for the rehearsal, which has a handler
            "wish = lambda: callable(signal.getsignal(signal.SIGTERM)) and os.kill(os.getpid(), signal.SIGTERM)",
            "os.register_at_fork(after_in_parent=wish)",
            "main()",
        ]
    )
    command = [sys.executable, "-c", program, "rehearse", str(corpus), "--world=4", "--steps=100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ('policy={"input": {"name": "pyramid", "layers": [1], "keep": [0.5]}}', "recompute=selective"),
        ('policy={"input": {"name": "route", "first_layer": 1, "last_layer": 1}, "target_projections": "kv"}',),
        ("deepspeed=zero2.json",),
    ],
)
def test_ranks_with_packs_of_other_tasks_and_token_roles_do_the_same(corpus: Path, overrides: tuple[str, ...]) -> None:
    report = not_alike(corpus, "other_task", 3, 0, 3, num_steps=2, overrides=overrides)
    assert [list(result.tasks) for result in report.results] == [["generate"], ["understand"]]
    assert report.problems == []
    assert all(len(result.collectives) > 20 for result in report.results)


@pytest.mark.slow
@pytest.mark.parametrize("json_name", ["zero3.json", "zero2.json"])
def test_two_real_ranks_issue_what_a_rehearsal_says(corpus: Path, tmp_path: Path, json_name: str) -> None:
    config = config_of(corpus, "data.num_rows=4", f"deepspeed={json_name}", f"run={json.dumps(str(tmp_path / 'run'))}")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "deepspeed.json").write_text(json.dumps(check(config, 2)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "tests.rehearsal_worker", "real", "-"]
    command += [str(tmp_path / "config.yaml"), str(tmp_path / "deepspeed.json"), "2", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = rehearse(config, 2)
    assert report.problems == []
    for rehearsed in report.results:
        real = json.loads((tmp_path / f"rank_{rehearsed.rank}.json").read_text())
        # Python objects travel as two tensors, and in a rehearsal not at all: only the build sends some.
        issued = [Collective(*one)._replace(elements=tuple(one[2])) for one in real["collectives"]]
        expected = [one for one in issued if one.phase != "build"]
        assert len(expected) > 20
        assert [one for one in rehearsed.collectives if one.phase != "build"] == expected
        assert rehearsed.calls == [Call(*one) for one in real["calls"]]


@pytest.mark.slow
def test_a_module_that_one_rank_skips_is_named_with_that_rank(corpus: Path) -> None:
    report = not_alike(corpus, "skip", 3, 0, 3, 15)
    failed, differs = report.problems
    assert failed.startswith("rank 3 failed: backbone.model.layers.1.mlp")
    assert "got no gradient" in failed
    assert "rank 3 issued" in differs
    assert "layers.1" in differs


@pytest.mark.slow
@pytest.mark.parametrize("json_name", ["zero3.json", "zero2.json"])
def test_modules_of_one_shape_that_change_places_on_one_rank_are_named(corpus: Path, json_name: str) -> None:
    (problem,) = not_alike(corpus, "swap", 3, 0, 3, 15, overrides=(f"deepspeed={json_name}",)).problems
    assert "rank 3" in problem
    assert "layers.2.self_attn.v_proj" in problem
    assert "where ranks 0, 15" in problem


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_with_its_last_words(corpus: Path) -> None:
    (problem,) = not_alike(corpus, "die", 1, 0, 1).problems
    assert problem.startswith("rank 1 was ended by signal SIGKILL, as Linux does where memory runs out")
    assert problem.endswith("the last words of a rank")


@pytest.mark.slow
def test_a_rank_that_crashes_is_told_with_its_last_words_and_does_not_count_as_another_order(corpus: Path) -> None:
    (problem,) = not_alike(corpus, "crash", 1, 0, 1).problems
    assert problem.startswith("rank 1 failed with exit code 1")
    assert problem.endswith("RuntimeError: a kernel has no image for this device")


@pytest.mark.slow
def test_the_command_leaves_the_run_folder_alone_and_prints_what_it_cannot_see(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "SAVE").touch()  # a wish of its user, which a training would fulfil and forget
    done = uvlm("rehearse", str(corpus), f"--world={WORLD}", f"data.num_rows={WORLD}", f"run={json.dumps(str(run))}")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("overflow checks", "loss values", "the guard's comparison", "not how NCCL runs them"):
        assert words in done.stdout
    assert "ranks 0-1, 8, 15 of 16 issued the same" in done.stdout
    assert [path.name for path in run.iterdir()] == ["SAVE"]


@pytest.mark.slow
def test_a_thousand_ranks_keep_what_the_plan_says(corpus: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "head_dim": 64}  # the demo's
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    overrides += ["data.num_rows=1024", f"run={json.dumps(str(tmp_path / 'run'))}"]
    done = uvlm("rehearse", str(corpus), "--world=1024", "--ranks=0,1023", "--json", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    tree = json.loads(done.stdout)
    assert tree["problems"] == []
    assert tree["measured_shard"] == pytest.approx(tree["planned_shard"], rel=0.1)
    assert {one["group_size"] for one in tree["results"][0]["collectives"]} == {1024}
