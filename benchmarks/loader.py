"""Claim: the loader reads faster than webdataset and Megatron-Energon, and resumes at once, exactly, in any shape.

One run makes 10,000 documents (1.3 GB, kept for the next run) and reads them with each loader: shuffled as in training,
JSON parsed, code arrays as numpy; with JPEGs, both pictures of a document decoded to uint8 RGB. Each measurement is a
process of its own, files are in the page cache, rounds are interleaved, medians are shown. webdataset hands over
documents one by one, as it does by itself, and in a row of its own in batches of 16; Energon is only measured in
batches of 16, as it is three times slower without them. The ratios compare like with like, documents with documents in
batches of 16, and webdataset by the faster of its rows; `*_packed` compares our full `Loader`, which does more than the
others (tokens, labels, packs), with webdataset one by one and with Energon.

    python benchmarks/loader.py                         Energon is left out
    python benchmarks/loader.py --install-energon       into an environment of its own, build/energon-venv
    python benchmarks/loader.py --energon-python PATH   of an environment that has megatron-energon 7.4.1
    python benchmarks/loader.py --quick                 a small run that shows that all of it works

The last line is JSON: every figure, and the ratios (ours / theirs, the smaller of those with 0 and with 2 workers).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
READERS = Path(__file__).resolve().parent / "_readers"
BUILD = REPOSITORY / "build"
ENERGON = ("megatron-energon==7.4.1", "webdataset==1.0.2")
WORKERS = (0, 2)
MODES = {
    "codes": "codes only, from shards with images",
    "dropped": "codes only, from shards without images",
    "jpeg": "both JPEGs decoded",
}
S3_DELAY_SECONDS = 0.05
TIMEOUT_SECONDS = 600
# One thread for each process, as trainers set it; the project is found where it is not installed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}

# The S3 server of the tests, run as a program: it serves until its input ends.
S3_SERVER = """
import json, pathlib, sys
from tests.s3_server import s3_server
with s3_server(delay_seconds=float(sys.argv[1])) as server:
    server.upload(pathlib.Path(sys.argv[2]), "benchmark/codes")
    print(json.dumps(server.environment), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Reader:
    name: str
    script: str
    modes: tuple[str, ...]
    batch: int = 16
    unit: str = "documents"


PACKS = Reader("ours, full Loader: tokens and packs", "ours.py", ("codes", "dropped"), unit="packs")
DOCUMENTS = Reader("ours, documents", "ours.py", tuple(MODES))
WEBDATASET = Reader("webdataset, one by one", "with_webdataset.py", tuple(MODES), batch=1)
WEBDATASET_BATCHES = Reader("webdataset, batches of 16", "with_webdataset.py", tuple(MODES))
ENERGON_BATCHES = Reader("Megatron-Energon, batches of 16", "with_energon.py", tuple(MODES))


@dataclass(frozen=True)
class Size:
    documents: int
    samples_per_shard: int
    rounds: int
    timed: int  # documents
    timed_jpeg: int
    stop_at: int


FULL = Size(documents=10_000, samples_per_shard=1000, rounds=3, timed=10_000, timed_jpeg=1500, stop_at=8000)
QUICK = Size(documents=1000, samples_per_shard=100, rounds=1, timed=600, timed_jpeg=60, stop_at=800)

Rates = dict[tuple[Reader, str, int], list[float]]  # reader, mode, workers -> documents/s of each round


def main() -> None:
    options = parse()
    size = QUICK if options.quick else FULL
    data = options.data / f"{size.documents}-documents"
    energon = install_energon() if options.install_energon else options.energon_python
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("making the documents, once"):
        made = [str(data), str(size.documents), str(size.samples_per_shard)]
        run([sys.executable, str(READERS / "documents.py"), *made], environment=ENVIRONMENT)
    rates = measure_rates(data, size, energon, options.rounds or size.rounds, console)
    resumes = measure_resumes(data, size, energon)
    s3 = measure_s3(data, size, options.rounds or size.rounds)

    print_rates(console, rates, energon)
    print_resumes(console, resumes, energon)
    print_s3(console, s3)
    print(json.dumps(summary(rates, resumes, s3, energon)))


def parse() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=BUILD / "loader-benchmark", help="where the documents are kept")
    parser.add_argument("--rounds", type=int, help=f"of every measurement (default {FULL.rounds})")
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents and one round")
    parser.add_argument("--energon-python", type=Path, help="the interpreter of an environment that has Energon")
    parser.add_argument("--install-energon", action="store_true", help=f"make one: pip install {' '.join(ENERGON)}")
    return parser.parse_args()


def install_energon() -> Path:
    folder = BUILD / "energon-venv"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    version = run([sys.executable, "-c", "import torch; print(torch.__version__.partition('+')[0])"])
    run([str(python), "-m", "pip", "install", "--quiet", f"torch=={version}", *ENERGON], timeout=3600)
    return python


def run(command: Sequence[str], timeout: float = TIMEOUT_SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """The last line that a command prints; RuntimeError with its last words where it fails."""
    # Output goes to files: a pipe would be held open by a worker that outlives its parent.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        code = subprocess.run(
            command,
            stdout=output,
            stderr=errors,
            timeout=timeout,
            env={**os.environ, **(environment or {})},
            check=False,
        ).returncode
        output.seek(0)
        errors.seek(0)
        if code:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{errors.read()[-3000:]}")
        return (output.read().splitlines() or [""])[-1]


def ask(reader: Reader, energon: Path | None, job: dict[str, Any], **environment: str) -> dict[str, Any]:
    """The answer of a reader in a process of its own (`_readers/measure.py` says what a job is)."""
    python = str(energon) if reader is ENERGON_BATCHES else sys.executable
    defaults = {"batch": reader.batch, "unit": reader.unit}
    command = [python, str(READERS / reader.script), json.dumps({**defaults, **job})]
    result: dict[str, Any] = json.loads(run(command, environment={**ENVIRONMENT, **environment}))
    return result


def readers(energon: Path | None) -> list[Reader]:
    return [PACKS, DOCUMENTS, WEBDATASET, WEBDATASET_BATCHES] + [ENERGON_BATCHES] * (energon is not None)


def measure_rates(data: Path, size: Size, energon: Path | None, rounds: int, console: Console) -> Rates:
    cells = [
        (reader, mode, workers)
        for mode in MODES
        for workers in WORKERS
        for reader in readers(energon)
        if mode in reader.modes
    ]
    rates: Rates = {cell: [] for cell in cells}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("documents/s", total=len(cells) * rounds)
        for _ in range(rounds):
            for reader, mode, workers in cells:
                timed = size.timed_jpeg if mode == "jpeg" else size.timed
                job = {"task": "rate", "data": str(data), "mode": mode, "workers": workers}
                answer = ask(reader, energon, {**job, "num_warm": timed // 10, "num_timed": timed})
                rates[reader, mode, workers].append(answer["documents_per_second"])
                progress.advance(task)
    return rates


def measure_resumes(data: Path, size: Size, energon: Path | None) -> dict[str, dict[str, Any]]:
    """Ours under all shapes; the others with workers kept and changed, "0-2" being saved with 0, continued with 2."""
    job: dict[str, Any] = {"task": "resume", "data": str(data), "stop_at": size.stop_at, "batch": 1}
    results = {"ours": ask(PACKS, energon, job)}
    for reader in [WEBDATASET] + [ENERGON_BATCHES] * (energon is not None):
        for saved, resumed in ((0, 0), (2, 2), (0, 2), (2, 0)):
            shape = {**job, "workers": saved, "resume_workers": resumed}
            results[f"{reader.script.removeprefix('with_').removesuffix('.py')} {saved}-{resumed}"] = ask(
                reader, energon, shape
            )
    return results


def measure_s3(data: Path, size: Size, rounds: int) -> dict[str, float] | None:
    """Documents/s of the full Loader, from a disk and from a server that answers late; None where its packages lack."""
    if any(importlib.util.find_spec(name) is None for name in ("moto", "s3fs")):
        return None
    command = [sys.executable, "-c", S3_SERVER, str(S3_DELAY_SECONDS), str(data / "codes")]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    assert server.stdout is not None
    rates: dict[str, list[float]] = {"local": [], "s3": []}
    try:
        environment = json.loads(server.stdout.readline())
        for _ in range(rounds):
            for name, location in (("local", ""), ("s3", "s3://benchmark/codes")):
                job: dict[str, Any] = {"task": "rate", "data": str(data), "mode": "dropped", "location": location}
                job |= {"num_warm": size.timed // 10, "num_timed": size.timed}
                rates[name].append(ask(PACKS, None, job, **environment)["documents_per_second"])
    finally:
        server.stdin.close()
        server.wait(30)
    return {name: statistics.median(values) for name, values in rates.items()}


def print_rates(console: Console, rates: Rates, energon: Path | None) -> None:
    for mode, title in MODES.items():
        table = Table("reader", *(f"{workers} workers" for workers in WORKERS), title=f"documents/s, {title}")
        for reader in [reader for reader in readers(energon) if mode in reader.modes]:
            table.add_row(reader.name, *(figures(rates[reader, mode, workers]) for workers in WORKERS))
        if energon is None:
            table.add_row(ENERGON_BATCHES.name, *["not installed"] * len(WORKERS))
        console.print(table)


def figures(values: list[float]) -> str:
    median = f"{statistics.median(values):,.0f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.0f} to {max(values):,.0f})"


def print_resumes(console: Console, resumes: dict[str, dict[str, Any]], energon: Path | None) -> None:
    table = Table("reader", "saved with", "resumed with", "seconds", "exact", title="resume in the middle of an epoch")
    for shape, result in resumes["ours"]["shapes"].items():
        table.add_row("ours", "1x0", f"{shape} ranks x workers", f"{result['seconds']:.3f}", str(result["exact"]))
    for name, result in resumes.items():
        if name != "ours":
            reader, _, workers = name.partition(" ")
            saved, _, resumed = workers.partition("-")
            seconds = "refused" if result["refused"] else f"{result['seconds']:.3f}"
            table.add_row(reader, f"1x{saved}", f"1x{resumed}", seconds, str(result["exact"]))
    if energon is None:
        table.add_row("energon", "", "", "not installed", "")
    console.print(table)


def print_s3(console: Console, s3: dict[str, float] | None) -> None:
    table = Table("shards without images, full Loader", "documents/s", title="from S3, 50 ms late on each request")
    for name in ("local", "s3"):
        table.add_row(name, f"{s3[name]:,.0f}" if s3 else "moto and s3fs are not installed")
    console.print(table)


def summary(
    rates: Rates, resumes: dict[str, dict[str, Any]], s3: dict[str, float] | None, energon: Path | None
) -> dict[str, Any]:
    medians = {cell: statistics.median(values) for cell, values in rates.items()}

    def ratio(ours: Reader, mode: str, *theirs: Reader) -> float | None:
        """To the fastest of theirs, at the number of workers where we look worst."""
        if (theirs[0], mode, WORKERS[0]) not in medians:
            return None
        fastest = {workers: max(medians[reader, mode, workers] for reader in theirs) for workers in WORKERS}
        return rounded(min(medians[ours, mode, workers] / fastest[workers] for workers in WORKERS))

    ours = resumes["ours"]
    return {
        "ratio_webdataset_codes": ratio(DOCUMENTS, "codes", WEBDATASET, WEBDATASET_BATCHES),
        "ratio_webdataset_jpeg": ratio(DOCUMENTS, "jpeg", WEBDATASET, WEBDATASET_BATCHES),
        "ratio_energon_codes": ratio(DOCUMENTS, "codes", ENERGON_BATCHES),
        "ratio_energon_jpeg": ratio(DOCUMENTS, "jpeg", ENERGON_BATCHES),
        "ratio_webdataset_dropped": ratio(DOCUMENTS, "dropped", WEBDATASET, WEBDATASET_BATCHES),
        "ratio_webdataset_codes_packed": ratio(PACKS, "codes", WEBDATASET),
        "ratio_energon_codes_packed": ratio(PACKS, "codes", ENERGON_BATCHES),
        "resume_seconds": rounded(ours["seconds"]),
        "resume_exact": ours["exact"],
        "ratio_s3_local": rounded(s3["s3"] / s3["local"]) if s3 else None,
        "documents_per_second": {
            f"{reader.name}; {mode}; {workers} workers": round(value)
            for (reader, mode, workers), value in medians.items()
        },
        "resumes": resumes,
        "s3": s3,
        "machine": machine(),
    }


def rounded(value: float) -> float:
    """Three digits that count."""
    return round(value, 2 - math.floor(math.log10(abs(value)))) if value else 0.0


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "webdataset", "tokenizers", "simplejpeg")}
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "versions": versions}


if __name__ == "__main__":
    main()
