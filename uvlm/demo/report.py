"""The table at the end of the demo, and what to try next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from uvlm.metrics import read_summary

_ROWS = (
    ("answers right, of all {vqa_questions:,} test questions", "vqa_accuracy", "{:.3f}", "0.85", "0.67 blind"),
    (
        "pictures right, of {generated_pictures}: shape and colour",
        "generation_accuracy",
        "{:.3f}",
        "0.60",
        "0.04 chance",
    ),
    ("the judge itself, on real test images", "judge_accuracy", "{:.3f}", "0.99", ""),
    ("first training loss (ln of the vocabulary: {log_vocab:.2f})", "first_loss", "{:.2f}", "", ""),
    ("training speed, tokens/s", "tokens_per_second", "{:,.0f}", "", ""),
)


def print_report(out: Path, seconds: float) -> None:
    """Print the figures of OUT/metrics.json and the two commands to try."""
    summary = read_summary(out)
    table = Table(title="uvlm demo: one model that answers about images and draws them")
    for heading in ("what", "measured", "goal", "for comparison"):
        table.add_column(heading, justify="left" if heading in ("what", "for comparison") else "right")
    for what, key, form, goal, comparison in _ROWS:
        table.add_row(what.format(**summary), form.format(summary[key]), goal, comparison)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    print(f"{int(seconds) // 60}:{int(seconds) % 60:02d} minutes. Pictures: {out / 'pictures.png'}")
    print("Try next:")
    print(f'  uvlm ask {out} {_example_image()} "what color is the shape?"')
    print(f'  uvlm generate {out} "a blue circle" --out x.png')


def _example_image() -> Path:
    from uvlm.demo.easy_vqa import pictures

    return pictures("test")[0].path
