"""The table at the end of the demo, and what to try next."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uvlm.metrics import read_summary

_ROWS = (
    ("questions answered right, of {vqa_questions:,} about test images", "vqa_accuracy", "{:.3f}"),
    ("  the best guess without looking at the image", None, "0.67"),
    ("pictures with the right shape and colour, of {generated_pictures}", "generation_accuracy", "{:.3f}"),
    ("  the judge of these pictures, on real test images", "judge_accuracy", "{:.3f}"),
    ("first training loss", "first_loss", "{:.3f}"),
    ("  ln of the vocabulary, which a uniform guess has", "log_vocab", "{:.3f}"),
    ("places of the packs that hold a document's token", "fill_share", "{:.3f}"),
    ("training speed, tokens/s", "tokens_per_second", "{:,.0f}"),
)


def print_report(out: Path, seconds: float) -> None:
    """Print the figures of OUT/metrics.json and the two commands to try."""
    summary = read_summary(out)
    table = Table(title="one model that answers about images and draws them")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for what, key, form in _ROWS:
        table.add_row(what.format(**summary), form.format(summary[key]) if key else form)
    Console(width=None if Console().is_terminal else 100).print(table)
    print(f"{int(seconds) // 60}:{int(seconds) % 60:02d} minutes. Pictures: {out / 'pictures.png'}")
    print("Try next:")
    print(f"  {command('uvlm', 'ask', out, _example_image(), 'what color is the shape?')}")
    print(f"  {command('uvlm', 'generate', out, 'a blue circle', '--out', 'x.png')}")


def command(program: str, *arguments: object) -> str:
    """A command to paste: the program of this very environment, and everything quoted that needs it."""
    path = Path(sys.executable).parent / program
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    return shlex.join([str(path), *map(str, arguments)])


def _example_image() -> Path:
    from uvlm.demo.easy_vqa import pictures

    return pictures("test")[0].path
