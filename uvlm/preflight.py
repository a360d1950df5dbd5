"""Preflight: before a job spends time, all its ranks look around together, and whoever is out of line is named.

    meet       all ranks are there; rank 0 leaves a token in the run folder and tells the time
    look       each rank: data, tokenizer, run folder, code, versions, clock, disks
    compute    each rank: matrix products whose result is known, timed
    exchange   pairs of ranks send each other known bytes, timed; then one sum over all ranks
    judge      rank 0 says what it means (preflight_judge.py); an error ends all ranks before anything is trained

What ranks tell each other goes through the store of the process group, not through collectives: it is plain TCP that
they have just met by, works with gloo and NCCL alike, and also where the network between GPUs is what is broken. Every
rank writes there which stage it enters. A collective that never comes raises nothing, so a thread of rank 0 looks at
these when the deadline is reached, names who holds up the others and ends the process, and launchers end the others.
Thread and main thread have a connection of their own each, since a client is locked while it waits (watchdog.py).

A clock is read when rank 0's message arrives, so it is known as exactly as the message is fast: 3 ms (run, loopback).
Nothing is known of data beyond manifests: `uvlm data verify` reads shards.

The products are exact in every dtype, however a processor rounds or splits its sums: elements are -1, 0 and 1 in rows
of period 3, so partial sums only grow, up to 256, and bf16, fp16, TF32 and fp32 hold all integers that far.

An exchange is 4 MiB each way on CPUs, 16 MiB on GPUs, 40 us of NVLink, where less would measure the start of kernels.
A round is four of them, and there are six rounds at most: where eight ranks share 1 Gbit Ethernet, 5 s and 20 s
(reasoned). Cost (run, two cores, loopback): 0.3 s with 2 ranks, 0.7 s with 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import data_pipeline
import uvlm
from data_pipeline.shards import MANIFEST_NAME
from data_pipeline.storage import Folder
from data_pipeline.vocab import Vocab
from uvlm import distributed, preflight_judge, run_folder
from uvlm.backbone import DTYPES
from uvlm.config import Config, dump_config
from uvlm.preflight_judge import GPU, Facts, Measured, Stage, Verdict, named

DEADLINE, SECONDS_A_RANK = 60.0, 0.25  # a thousand ranks that meet on a busy network take their time
_GRACE = 10.0  # seconds that the other ranks give rank 0 to say who is late
_TOKEN = ".preflight_"
_TOKEN_SECONDS = 5.0  # nobody asks for the token before it is written, so caches of a network file system know nothing
_INNER = 384  # of the products: with -1, 0 and 1 at period 3, sums are 256 or -128
_MOST_ERRORS = 8  # in one message
_NUM_ROUNDS, _NUM_EXCHANGES = 5, 3  # timed ones, of which the fastest counts


def preflight(config: Config, device: torch.device, deadline: float | None = None) -> None:
    """Check ranks, nodes and links of this job. All ranks call it, in a process group.

    Rank 0 prints a summary, and warnings, which also go to events.jsonl of the run folder.

    Args:
        device: this rank's own, from which its backend sends.
        deadline: seconds after which the process ends with exit code 1 and a sentence that says who is late; else
            DEADLINE and SECONDS_A_RANK for each rank.

    Raises:
        ValueError: on all ranks, where something differs that must not, or calculates or transfers wrongly.
    """
    started = time.perf_counter()
    board = _Board()
    num_bytes = (16 if device.type == "cuda" else 4) << 20
    with _watched(board, deadline or DEADLINE + SECONDS_A_RANK * board.num_ranks):
        token, clock = _meet(board, config.run)
        board.at("reading data, tokenizer and run folder")
        board.put(f"facts/{board.rank}", dataclasses.asdict(_look(config, board, token, clock)))
        board.at("waiting for what rank 0 finds")

        def all_facts() -> list[Facts]:
            return [Facts(**facts) for facts in board.gather("facts")]

        def agree() -> list[str]:
            facts = all_facts()
            if token:
                (config.run / token).unlink(missing_ok=True)
            _say(preflight_judge.judge(facts), config.run)
            return [one.node for one in facts]

        nodes = board.from_rank_0("nodes", agree)
        board.put(f"measured/{board.rank}", dataclasses.asdict(_measure(config, board, nodes, device, num_bytes)))
        board.at("waiting for what rank 0 finds")

        def conclude() -> None:
            facts = all_facts()
            measured = [Measured(**one) for one in board.gather("measured")]
            _say(preflight_judge.judge_measured(measured, nodes, num_bytes), config.run)
            print(preflight_judge.summary(facts, measured, num_bytes, time.perf_counter() - started), flush=True)

        board.from_rank_0("end", conclude)
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Board:
    """What ranks write for each other in the store of the process group: JSON by key."""

    def __init__(self) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.PrefixStore("uvlm/preflight", store.clone())
        self._stage = 0

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Waits until somebody has put it there, for as long as the process lives."""
        self._store.wait([key], timedelta(days=1))
        return json.loads(self._store.get(key))

    def gather(self, kind: str) -> list[Any]:
        """KIND/RANK of all ranks, by rank; waits as `get`."""
        keys = [f"{kind}/{rank}" for rank in range(self.num_ranks)]
        self._store.wait(keys, timedelta(days=1))
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def at(self, words: str, partner: int | None = None) -> None:
        """This rank enters the next stage; `words` are what it has not finished if it stays there."""
        self.put(f"at/{self.rank}", dataclasses.asdict(Stage(self._stage, words, self.node, partner)))
        self._stage += 1

    def pass_by(self) -> None:
        """Others enter a stage that this rank has no part in."""
        self._stage += 1

    def stages(self) -> dict[int, Stage]:
        """Of the ranks that have entered one."""
        keys = {rank: f"at/{rank}" for rank in range(self.num_ranks)}
        return {rank: Stage(**self.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def from_rank_0(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0 on all ranks; what it raises there, ends them all, as collectives.from_rank_0."""
        if self.rank == 0:
            try:
                value = make()
            except Exception as error:
                self.put(key, [None, f"rank 0: {error or type(error).__name__}"])
                raise
            self.put(key, [value, ""])
        value, refusal = self.get(key)
        if refusal:
            raise ValueError(refusal)
        return value


@contextlib.contextmanager
def _watched(board: _Board, deadline: float) -> Iterator[None]:
    """At the deadline, rank 0 says who is late and ends its process; the others end theirs somewhat later."""
    own = None if board.rank else _Board()  # a connection of its own

    def end() -> None:
        last_resort = threading.Timer(_GRACE, os._exit, [1])  # the store may hang
        last_resort.daemon = True
        last_resort.start()
        if own:
            reason = preflight_judge.late(own.stages(), own.num_ranks)
            remedy = "look at their nodes and the network, or leave the node out (sbatch --exclude)"
            print(f"error: preflight: after {deadline:g} s, {reason}; {remedy}", file=sys.stderr, flush=True)
        else:
            print(f"error: preflight: rank {board.rank} gives up; rank 0 knows more", file=sys.stderr, flush=True)
        os._exit(1)  # not `distributed.leave`: what has not come back could hold up exit handlers too

    timer = threading.Timer(deadline + (_GRACE if board.rank else 0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(board: _Board, run: Path) -> tuple[str, float]:
    """The name of rank 0's token in the run folder ("" where it could not write it), and by how many seconds this
    rank's clock is ahead of rank 0's."""
    board.at("meeting the others")
    if board.rank == 0:
        board.gather("at")
        token = _TOKEN + secrets.token_hex(8)
        try:
            for left_over in run.glob(f"{_TOKEN}*"):
                left_over.unlink(missing_ok=True)
            (run / token).write_text(token)
        except OSError:
            token = ""
        board.put("go", {"token": token, "time": time.time()})
    told = board.get("go")
    return told["token"], time.time() - told["time"] if board.rank else 0.0


def _look(config: Config, board: _Board, token: str, clock: float) -> Facts:
    """What this rank finds alone."""
    troubles: list[str] = []
    seen = {"resolved config": hashlib.sha256(dump_config(config).encode()).hexdigest()}

    def digest(name: str, read: Callable[[], bytes]) -> None:
        try:
            seen[name] = hashlib.sha256(read()).hexdigest()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            troubles.append(f"cannot read {name} ({reason}); mount it on every node, and look at rights there")

    places = dict.fromkeys(source.path for source in (*config.data.train, *config.data.valid))
    with ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(digest, f"data {place}", partial(_manifest, place)) for place in places]
        digest(f"tokenizer {config.data.tokenizer}", lambda: Vocab.load(config.data.tokenizer).fingerprint.encode())
        for one in reading:
            one.result()
    if trouble := _run_trouble(config.run, token, board.rank):
        troubles.append(trouble)
    kernels = Path(os.environ.get("TORCH_EXTENSIONS_DIR", tempfile.gettempdir())).absolute()
    kernels = next(folder for folder in (kernels, *kernels.parents) if folder.exists())
    shared = Path("/dev/shm")
    return Facts(
        rank=board.rank,
        node=board.node,
        troubles=sorted(troubles),
        seen=dict(sorted(seen.items())),
        code=code_fingerprint(),
        code_folder=str(code_folders()[0].parent),
        versions=_versions(),
        clock=clock,
        kernel_folder=str(kernels),
        kernel_bytes=shutil.disk_usage(kernels).free,
        shared_bytes=shutil.disk_usage(shared).free if shared.is_dir() else None,
    )


def _manifest(place: str) -> bytes:
    return Folder.open(place).read(MANIFEST_NAME)


def _run_trouble(run: Path, token: str, rank: int) -> str | None:
    """A clause if this rank does not see rank 0's token in the run folder, or may not write there."""
    give_up = time.monotonic() + _TOKEN_SECONDS
    while token and not (run / token).exists():
        if time.monotonic() > give_up:
            return (
                f"cannot see the run folder {run} as rank 0 sees it; give the run a folder on a file system that all "
                "nodes share"
            )
        time.sleep(0.1)
    if distributed.world().local_rank:
        return None  # one of a node writes for all
    trial = run / f"{token or _TOKEN}_{rank}"
    try:
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        return f"cannot write to the run folder {run} ({error.strerror}); look at rights, quota and disk"
    return None


def code_folders() -> list[Path]:
    """Of the packages that this process has imported."""
    return [Path(package.__path__[0]) for package in (uvlm, data_pipeline)]


def code_fingerprint() -> str:
    """16 hex characters over names and bytes of all .py files of this code."""
    total = hashlib.sha256()
    for folder in code_folders():
        for path in sorted(folder.rglob("*.py")):
            total.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "uvlm": uvlm.__version__}
    versions |= {name: metadata.version(name) for name in ("deepspeed", "transformers")}
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": nccl, GPU: torch.cuda.get_device_name()}
    return versions


def _measure(config: Config, board: _Board, nodes: list[str], device: torch.device, num_bytes: int) -> Measured:
    """Calculate, exchange with each partner, add up with all ranks. `nodes`: of all ranks, by rank."""
    own = named([board.rank], nodes)

    def add_up(num_elements: int) -> bool:
        board.at("adding up with all ranks")
        with failing_as(f"{own} cannot add up with all ranks"):
            return _sum_is_right(num_elements, device)

    board.at("multiplying matrices")
    num_wrong, seconds = multiply(DTYPES[config.dtype], device)
    is_right = add_up(1)  # NCCL wants all ranks in the first call, before pairs may exchange
    exchanges = []
    for pairs in preflight_judge.rounds(nodes):
        partner = next((a + b - board.rank for a, b in pairs if board.rank in (a, b)), None)
        if partner is None:
            board.pass_by()
            continue
        board.at("exchanging", partner)
        with failing_as(f"{own} cannot exchange with {named([partner], nodes)}"):
            exchanges.append((partner, *_exchange(partner, num_bytes, device)))
    return Measured(board.rank, num_wrong, seconds, exchanges, add_up(num_bytes // 4) and is_right)


@contextlib.contextmanager
def failing_as(clause: str) -> Iterator[None]:
    """Errors of torch's backends are raised as a ValueError that says whose they are; launchers end the other ranks."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"preflight: {clause} ({reason}); look at the network and devices of their nodes, NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME, or leave the node out (sbatch --exclude)"
        ) from error


def multiply(dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """Wrong elements of products whose result is known, and the seconds of the fastest round."""
    width, num_products = (4096, 100) if device.type == "cuda" else (512, 1)
    outer, inner = torch.arange(width, device=device), torch.arange(_INNER, device=device)
    left = ((outer[:, None] + inner) % 3 - 1).to(dtype)
    right = ((inner[:, None] + outer) % 3 - 1).to(dtype)
    expected = torch.where((outer[:, None] - outer) % 3 == 0, 2 * _INNER // 3, -_INNER // 3).to(dtype)
    num_wrong, fastest = 0, float("inf")
    for _ in range(1 + _NUM_ROUNDS):  # the first one also chooses and loads kernels
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(num_products):
            product = torch.mm(left, right)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        num_wrong += int((product != expected).sum())
    return num_wrong, fastest


def _exchange(partner: int, num_bytes: int, device: torch.device) -> tuple[float, bool]:
    """Seconds of the fastest exchange with `partner`, num_bytes each way, and whether all bytes came right."""
    sent = pattern(dist.get_rank(), num_bytes, device)
    received = torch.zeros(1 + _NUM_EXCHANGES, num_bytes, dtype=torch.uint8, device=device)
    fastest = float("inf")
    for number in range(1 + _NUM_EXCHANGES):
        _synchronize(device)
        started = time.perf_counter()
        ops = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received[number], partner)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        _synchronize(device)
        if number:  # the first one makes the connection, and partners wait for each other there
            fastest = min(fastest, time.perf_counter() - started)
    return fastest, bool((received == pattern(partner, num_bytes, device)).all())


def pattern(rank: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """The bytes that a rank sends, other ones for each of 251 ranks."""
    return ((torch.arange(num_bytes, dtype=torch.int32, device=device) + rank) % 251).to(torch.uint8)


def _sum_is_right(num_elements: int, device: torch.device) -> bool:
    """Whether the sum over all ranks is the known one: of integers, so that no order of adding matters."""
    base = torch.arange(num_elements, dtype=torch.int32, device=device) % 7 + 1
    total, num_ranks = base * (dist.get_rank() + 1), dist.get_world_size()
    dist.all_reduce(total)
    return bool((total == base * (num_ranks * (num_ranks + 1) // 2)).all())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(verdict: Verdict, run: Path) -> None:
    """On rank 0: warnings are printed and kept, errors raised in one."""
    for sentence in verdict.warnings:
        print(f"preflight: {sentence}", flush=True)
        with contextlib.suppress(OSError):  # where the run folder is what fails, that is an error of its own
            run_folder.note_event(run, f"preflight: {sentence}")
    if errors := verdict.errors:
        more = [f"and {len(errors) - _MOST_ERRORS} more"] if len(errors) > _MOST_ERRORS else []
        raise ValueError("preflight: " + "; ".join([*errors[:_MOST_ERRORS], *more]))
