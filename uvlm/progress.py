"""Progress on the terminal: bars where there is a terminal, a line now and then in a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LOG_SECONDS = 10.0


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields update(what, done, total). Each new `what` is a bar of its own."""
    if not Console().is_terminal:
        yield _lines()
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield update


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[int], None]]:
    """Yields update(done), for work whose end is not known."""
    with bars() as update:
        yield lambda done: update(what, done, done)


def _lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            print(f"  {what}: {done:,} of {total:,}", flush=True)

    return update
