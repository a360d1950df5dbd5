"""Claim: under ZeRO-3 no rank ever holds the full fp32 model, neither at the start nor in a step nor in a save.

Real ranks build a Qwen3 of width 512 in bf16 as `uvlm train` does, hand it to DeepSpeed, take two steps, save a
checkpoint, and write the trained model as at the end of a run, here in files of 32 MB. Resident memory at its peak
(Linux: VmHWM, reset before each of these phases) is taken above what it was once torch, transformers and DeepSpeed
were imported and the process group had started; shown is the rank with the most. A checkpoint is written in the
background from a copy, so the most that training can need is the peak of a step and that copy: "step while saving" is
their sum. Packs have 64 tokens, so that activations do not matter.

By least squares over model sizes and ranks, peak = shard * P / ranks + whole * P + rest, for P parameters. `shard` is
what a parameter costs the rank that owns it. `whole` is what one costs every rank, whoever owns it: it would be 4 bytes
or more if each held the full fp32 model at any moment. `rest` does not grow with depth: libraries, buffers, one layer.

zero3.json is used with buffers of 2**22 elements, a layer and a third, in place of its own of up to 5 * 10**8. Those
are larger than these models, so with them DeepSpeed may keep all gathered weights and gradients of a model at once: the
row "in shards, shipped buffers" shows it. The row "whole model first" shows the other way to build, and that the
measurement sees it: each rank makes the fp32 model, then DeepSpeed shards it.

Measured (run): 2.0 bytes of the shard while the model is built and 10.0 once DeepSpeed has it, at most 0.2 of the
whole; 29.9 and 0.5 in a step, 41.8 and 0.4 in a step while saving. With 4 ranks and 102M parameters building takes 73
MB, and 422 where the whole model comes first. Gathering the trained model takes rank 0 4.4 bytes of the whole, beside
its shard.

    python benchmarks/train_memory.py           17 minutes on two busy cores
    python benchmarks/train_memory.py --quick   tiny models, to show that all of it works

The last line is JSON: every figure, bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
# glibc: freed tensors leave at once; one thread for each rank; the project is found where it is not installed.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}
PHASES = ("build", "engine", "steps", "save", "model")
STEP_WHILE_SAVING = "step while saving"
PACK_TOKENS = 64
NUM_CODES = 1700  # a vocabulary of 2,000, so that no weight is much larger than the others
TIMEOUT_SECONDS = 300
MODEL_FILE_BYTES = 2**25  # uvlm's own files are of 5 GB, so these models would fit into one


class Size(NamedTuple):
    hidden: int
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    bucket: int


FULL = Size(hidden=512, layers=(8, 16, 32), ranks=(1, 2, 4), bucket=2**22)
QUICK = Size(hidden=64, layers=(2, 4), ranks=(1, 2), bucket=2**16)


class Case(NamedTuple):
    """One start of ranks. `whole_first`: each makes the full fp32 model. A bucket of 0: zero3.json as it is."""

    hidden: int
    num_layers: int
    num_ranks: int
    bucket: int
    whole_first: bool = False

    @property
    def way(self) -> str:
        if self.whole_first:
            return "whole model first"
        return "in shards" if self.bucket else "in shards, shipped buffers"


class Row(NamedTuple):
    """Bytes above the baseline, of the rank that has the most: by phase, and STEP_WHILE_SAVING."""

    case: Case
    num_parameters: int
    peaks: dict[str, int]


class Fit(NamedTuple):
    """peak = shard * parameters / ranks + whole * parameters + rest; bytes."""

    shard: float
    whole: float
    rest: float

    @staticmethod
    def of(rows: list[Row], peaks: list[int]) -> Fit:
        matrix = [(row.num_parameters / row.case.num_ranks, row.num_parameters, 1.0) for row in rows]
        scale = np.abs(matrix).max(axis=0)
        solution = np.linalg.lstsq(np.asarray(matrix) / scale, np.asarray(peaks, dtype=float), rcond=None)[0] / scale
        return Fit(*(round(float(value), 2) for value in solution))


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to show that all of it works")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # this process is one rank of that case
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_a_rank(Case(**json.loads(options.rank_of)), options.folder)
        return
    size = QUICK if options.quick else FULL
    shards = [Case(size.hidden, layers, ranks, size.bucket) for ranks in size.ranks for layers in size.layers]
    last = Case(size.hidden, size.layers[-1], size.ranks[-1], size.bucket)
    others = [last._replace(bucket=0), last._replace(whole_first=True)]
    rows = [measure(case) for case in track([*shards, *others], "training", transient=True)]
    sharded = rows[: len(shards)]
    fits = {name: Fit.of(sharded, [row.peaks[name] for row in sharded]) for name in rows[0].peaks}
    print_tables(rows, fits)
    most = max(fit.whole for name, fit in fits.items() if name != "model")
    result = {
        "rows": [{"way": r.case.way, **r.case._asdict(), "parameters": r.num_parameters, **r.peaks} for r in rows],
        "fits": {name: fit._asdict() for name, fit in fits.items()},
        "no_rank_holds_the_full_fp32_model": None if options.quick else most < 4,  # tiny models cannot show it
    }
    print(json.dumps(result))


def measure(case: Case) -> Row:
    """Start the ranks of a case and gather what they have measured."""
    reports = reports_of_ranks(__file__, case, ENVIRONMENT, TIMEOUT_SECONDS)
    peaks = {name: max(report["peaks"][name] for report in reports) for name in reports[0]["peaks"]}
    return Row(case, reports[0]["num_parameters"], peaks)


def reports_of_ranks(script: str, case: Any, environment: dict[str, str], timeout: float) -> list[dict[str, Any]]:
    """Start the ranks of a case, each as `script --rank-of=CASE --folder=FOLDER`; what they write into
    FOLDER/rank_N.json.

    Args:
        case: a named tuple with `num_ranks`.
        environment: variables beside those of this process.
        timeout: seconds.
    """
    with tempfile.TemporaryDirectory(prefix=f"uvlm-{Path(script).stem}-") as folder:
        command = [sys.executable, "-m", "uvlm.torchrun", "--nnodes=1", f"--nproc-per-node={case.num_ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", script]
        command += [f"--rank-of={json.dumps(case._asdict())}", f"--folder={folder}"]
        variables = {**os.environ, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise RuntimeError(f"{case} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        reports = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
    assert len(reports) == case.num_ranks
    return reports


def be_a_rank(case: Case, folder: Path) -> None:
    """Train in this process, one of `case.num_ranks`, and write FOLDER/rank_N.json."""
    from uvlm.distributed import leave, prepare_environment, world

    prepare_environment()
    from uvlm import engine as deepspeed_engine
    from uvlm.backbone import build_backbone
    from uvlm.checkpoint import Saver
    from uvlm.deepspeed_config import read_deepspeed_json, resolve
    from uvlm.model import UnifiedVLM
    from uvlm.train import build
    from uvlm.weights import write_weights

    deepspeed_engine.start()
    config, vocab = make_config(case, folder / str(world().rank)), make_vocab(folder / f"text_{world().rank}.json")
    tree = resolve(read_deepspeed_json(config.deepspeed), config, case.num_ranks)
    peaks: dict[str, int] = {}
    baseline = resident("VmRSS")

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        yield
        peaks[name] = resident("VmHWM") - baseline

    with phase("build"):
        if case.whole_first:
            model = UnifiedVLM(build_backbone(config.model, vocab.size), config.policy)
        else:
            model, _ = build(config, vocab, tree)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    with phase("engine"):
        engine = deepspeed_engine.Engine(model, config, tree)
        saver = Saver(engine, config, fixed={})
    with phase("steps"):
        for number in range(2):
            step(engine, case, number)
    before = resident("VmRSS") - baseline
    with phase("save"):
        saver.save(2, {}, {})
        assert saver.finish()
    peaks[STEP_WHILE_SAVING] = peaks["steps"] + peaks["save"] - before
    with phase("model"):
        weights = dict(model.named_parameters())
        shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in weights.items()}
        (folder / "model").mkdir(exist_ok=True)
        dtype = next(iter(weights.values())).dtype
        write_weights(folder / "model", shapes, dtype, lambda name: engine.whole(weights[name]), MODEL_FILE_BYTES)
    (folder / f"rank_{world().rank}.json").write_text(json.dumps({"num_parameters": num_parameters, "peaks": peaks}))
    leave()


def step(engine: Any, case: Case, number: int) -> None:
    import torch

    from data_pipeline.encode import OUTPUT, Encoded
    from data_pipeline.packing import make_pack
    from data_pipeline.schema import TASKS
    from uvlm.policies import Policy
    from uvlm.token_plan import TokenPlan

    ids = np.random.default_rng(number).integers(0, NUM_CODES, PACK_TOKENS)
    document = Encoded(ids, [PACK_TOKENS], [OUTPUT], [True], TASKS.index("text"), "made", "made", [], [], [])
    pack = make_pack([document], PACK_TOKENS, 0, (0, number))
    plan = TokenPlan.of(pack, Policy(), case.num_layers)
    num_supervised = len(plan.supervised)
    weights_S = torch.full((num_supervised,), 1 / num_supervised, device=engine.device)
    loss, *_ = engine(pack.to(engine.device), plan.to(engine.device), weights_S)
    engine.backward(loss)
    engine.step()


def make_config(case: Case, folder: Path) -> Any:
    """The config of a run in `folder`, with zero3.json and a bucket of `case.bucket` elements."""
    from uvlm.config import parse_config
    from uvlm.deepspeed_config import read_deepspeed_json

    folder.mkdir()
    tree = read_deepspeed_json(Path("zero3.json"))
    if case.bucket:
        keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
        limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
        tree["zero_optimization"].update(dict.fromkeys(keys + limits, case.bucket))
    (folder / "zero3.json").write_text(json.dumps(tree))
    model = {"hidden_size": case.hidden, "intermediate_size": 3 * case.hidden, "num_layers": case.num_layers}
    return parse_config(
        {
            "run": str(folder.parent),  # one run folder for all ranks
            "model": {**model, "num_heads": 8, "num_kv_heads": 4, "head_dim": case.hidden // 8},
            "data": {
                "tokenizer": "none",
                "train": [{"path": "none"}],
                "pack_tokens": PACK_TOKENS,
                "num_rows": case.num_ranks,
            },
            "optim": {"steps": 3, "learning_rate": 1e-4},
            "checkpoint": {"every": 2},
            "dtype": "bf16",
            "deepspeed": str(folder / "zero3.json"),
        }
    )


def make_vocab(path: Path) -> Any:
    from tokenizers import Tokenizer

    from data_pipeline.text_tokenizer import train_text_tokenizer
    from data_pipeline.vocab import Vocab

    train_text_tokenizer(["a red circle"], path)
    return Vocab(Tokenizer.from_file(str(path)), NUM_CODES, "benchmark")


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def print_tables(rows: list[Row], fits: dict[str, Fit]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("ranks", "parameters", "way", *rows[0].peaks, title="peak memory of a rank, MB")
    for row in rows:
        peaks = [f"{peak / 1e6:,.0f}" for peak in row.peaks.values()]
        table.add_row(str(row.case.num_ranks), f"{row.num_parameters / 1e6:.1f}M", row.case.way, *peaks)
    console.print(table)
    for name, fit in fits.items():
        console.print(
            f"{name}: {fit.shard:.1f} bytes a parameter of the shard, {fit.whole:.1f} of the whole model, "
            f"and {fit.rest / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
