"""The ranks of `tokenize`: several processes on this machine, or the tasks of a Slurm array.

Local ranks are spawned, not forked: a process that holds torch threads or CUDA does not survive a fork. Each has its
share of the cores and, where there are GPUs, one of them. What one rank raises ends all.
Cost (run): 8 s to start and end two ranks on two busy cores, nearly all of it imports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_pipeline.image_tokens import Progress
from data_pipeline.split import Split
from data_pipeline.tokenize import TokenizeReport, tokenize_rank

SECONDS_TO_END = 10.0  # for a rank that is told to stop, before it is killed


def ranks_of_slurm(environment: Mapping[str, str], rank: int | None, num_ranks: int | None) -> tuple[int | None, int]:
    """The rank and the number of ranks of this process: what the user gave, or what a Slurm array task is.

    Outside of an array, a rank of None stands for all ranks. ValueError where array and `num_ranks` contradict.
    """
    if rank is not None:
        if num_ranks is None:
            raise ValueError(f"--rank {rank} says not of how many; give --ranks too")
        return rank, num_ranks
    task = environment.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal():
        return None, num_ranks or 1
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    last = int(environment.get("SLURM_ARRAY_TASK_MAX", task))
    count = int(environment.get("SLURM_ARRAY_TASK_COUNT", str(last - first + 1)))
    if last - first + 1 != count or num_ranks not in (None, count):
        raise ValueError(
            f"the Slurm array has {count} tasks, {first} to {last}"
            + (f", but --ranks is {num_ranks}" if num_ranks is not None else "")
            + f"; submit --array=0-{(num_ranks or count) - 1} (what is finished is kept), or give --rank and --ranks"
        )
    return int(task) - first, count


def tokenize_with_local_ranks(
    num_ranks: int,
    shards: Path | str,
    out: Path | str,
    tokenizer: Path | str,
    options: dict[str, Any],
    progress: Progress | None,
) -> TokenizeReport:
    """Runs all ranks as processes of this machine; the arguments are those of `tokenize`.

    An error of a rank is raised here, and an interrupt ends all of them.
    """
    split = Split.open(shards)
    num_ranks = min(num_ranks, len(split.manifest.shards))  # more would have nothing to do
    num_documents = len(split)
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    context = multiprocessing.get_context("spawn")
    processes = []
    ranks: dict[Connection, int] = {}
    try:
        for rank in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, shards, Path(out), tokenizer, rank, num_ranks, num_threads, options)
            process = context.Process(target=_rank_process, args=arguments, daemon=True, name=f"tokenize rank {rank}")
            process.start()
            sender.close()  # the rank holds the other copy: its end is the end of the pipe
            processes.append(process)
            ranks[receiver] = rank
        return _merged(_listen(ranks, num_documents, progress))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()


def _listen(ranks: dict[Connection, int], num_documents: int, progress: Progress | None) -> list[TokenizeReport]:
    done = dict.fromkeys(ranks.values(), 0)
    reports: dict[int, TokenizeReport] = {}
    while len(reports) < len(done):
        for receiver in wait(list(ranks)):
            assert isinstance(receiver, Connection)
            rank = ranks[receiver]
            try:
                message = receiver.recv()
            except EOFError:
                raise ChildProcessError(
                    f"tokenize rank {rank} of {len(done)} was killed, perhaps for want of memory; use fewer ranks and "
                    "run the same command again, what is finished is kept"
                ) from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, TokenizeReport):
                reports[rank] = message
                del ranks[receiver]
            else:
                done[rank] = message
                if progress is not None:
                    progress("tokenize", sum(done.values()), num_documents)
    return [reports[rank] for rank in sorted(reports)]


def _merged(reports: list[TokenizeReport]) -> TokenizeReport:
    rejected: Counter[str] = Counter()
    for report in reports:
        rejected.update(report.rejected)
    return TokenizeReport(
        documents=sum(report.documents for report in reports),
        images=sum(report.images for report in reports),
        shards_written=sum(report.shards_written for report in reports),
        shards_kept=sum(report.shards_kept for report in reports),
        shards_missing=min(report.shards_missing for report in reports),  # the last to end saw all records
        rejected=dict(rejected),
        psnr=reports[0].psnr,
        seconds=max(report.seconds for report in reports),
    )


def _rank_process(
    sender: Connection,
    shards: Path | str,
    out: Path,
    tokenizer: Path | str,
    rank: int,
    num_ranks: int,
    num_threads: int,
    options: dict[str, Any],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all; the parent is the one to end this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves the `with` blocks, so nothing half-made stays
    message: TokenizeReport | Exception
    with contextlib.suppress(BrokenPipeError):  # the parent has gone
        try:
            import torch

            torch.set_num_threads(num_threads)
            if torch.cuda.is_available():
                torch.cuda.set_device(rank % torch.cuda.device_count())

            def progress(what: str, done: int, total: int) -> None:
                sender.send(done)

            message = tokenize_rank(shards, out, tokenizer, rank, num_ranks, num_threads, progress=progress, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            message = OSError(str(error))
        except ValueError as error:
            message = ValueError(str(error))
        except Exception:
            message = RuntimeError(f"tokenize rank {rank} of {num_ranks} failed:\n{traceback.format_exc()}")
        sender.send(message)
