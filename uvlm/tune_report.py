"""What a search has found, for people: report.md with every trial, and tune.png with the rates of every setting."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.files import replace_file
from uvlm.tune_search import LAST, Gain, Record, Search, gain, rates
from uvlm.tune_space import Setting

_NUM_SHOWN = 24  # settings in the picture
_MAX_WORDS = 70  # letters of a setting in the picture; the report has them all
_HELD = (
    "Only what may change the speed was searched. Held were the tokens of an optimizer step, dtype, seed, learning "
    "rate and every other key. `data.pack_tokens` changes which documents share a pack, and so their order; each "
    "document is still trained on alone, and as many tokens make a step. Another stage, or DeepSpeed's own Adam, "
    "rounds otherwise: in the fifth digit of a loss."
)


def write_report(
    out: Path,
    search: Search,
    winner: Setting,
    found: Gain | None,
    warnings: Sequence[str],
    versions: Mapping[str, str],
) -> None:
    """OUT/report.md and OUT/tune.png."""
    replace_file(out / "report.md", report(search, winner, found, warnings, versions))
    draw(search, winner, out / "tune.png")


def verdict(search: Search, winner: Setting, found: Gain | None) -> str:
    """The result in a sentence or two."""
    records, start = search.journal.records, search.space.start
    if not search.start_works:
        reason = next(record.outcome.failure for record in records if record.setting == start and not record.rate)
        rate = statistics.median(rates(records, winner))
        return f"The start setting cannot run ({reason}). The best that can: {rate:,.0f} useful tokens/s."
    if found is None:
        return "Nothing that was tried is faster than the start setting: keep it."
    before, after = (statistics.median(rates(records, setting)) for setting in (start, winner))
    sentence = (
        f"{after:,.0f} useful tokens/s against {before:,.0f} with the start setting: {found.ratio:.2f} times as fast "
        f"(median of {found.num_pairs} turns; from {found.low:.2f} to {found.high:.2f})."
    )
    if found.low <= 1:
        sentence += " The turns do not agree that it is faster: take it for a tie, or give --budget more minutes."
    return sentence


def report(
    search: Search, winner: Setting, found: Gain | None, warnings: Sequence[str], versions: Mapping[str, str]
) -> str:
    """The whole report, in Markdown."""
    records, start = search.journal.records, search.space.start
    changes = winner.changes_from(start)
    lines = ["# What `uvlm tune` found", "", verdict(search, winner, found), ""]
    if changes:
        lines += ["The winner against the start setting:", "", *(f"- `{change}`" for change in changes), ""]
    lines += ["![rates of all settings](tune.png)", "", _HELD, "", *(f"- {warning}" for warning in warnings), ""]
    lines += ["## The last rung", "", *_last_rung(search), ""]
    lines += ["## All trials", "", *_trials(records, start), ""]
    lines += ["Spread: quartiles of the steps of the trial. Memory: the largest rank's peak.", ""]
    if search.not_tried:
        lines += ["## Not tried", ""]
        lines += [f"- {reason}: {_what(setting, start)}" for setting, reason in search.not_tried.items()]
        lines += [""]
    device = next((record.outcome.device for record in records if record.outcome.device), "not known")
    lines += ["## Where", "", f"- {search.space.num_ranks} ranks; {device}"]
    lines += [f"- {name} {version}" for name, version in versions.items()]
    spent = f"- {search.spent / 60:.1f} minutes in {len(records)} trials, of a budget of {search.budget / 60:g}"
    return "\n".join([*lines, spent]) + "\n"


def _last_rung(search: Search) -> list[str]:
    records, start = search.journal.records, search.space.start
    settings = dict.fromkeys(record.setting for record in records if record.rung == LAST)
    lines = ["| setting | median tokens/s | each repeat | times the start | memory |", "|---|--:|---|---|--:|"]
    ranked = sorted(settings, key=lambda setting: -statistics.median(rates(records, setting) or [0.0]))
    for setting in ranked:
        found = rates(records, setting)
        ratio = "1"
        if setting != start:
            pairs = gain(records, setting, start) if rates(records, start) and found else None
            ratio = f"{pairs.ratio:.2f} ({pairs.low:.2f} to {pairs.high:.2f})" if pairs else "-"
        peak = max((max(one.outcome.peak_bytes, default=0) for one in records if one.setting == setting), default=0)
        each = ", ".join(f"{rate:,.0f}" for rate in found) or "failed"
        median = f"{statistics.median(found):,.0f}" if found else "-"
        lines.append(f"| {_what(setting, start)} | {median} | {each} | {ratio} | {peak / 1e9:.2f} GB |")
    return lines


def _trials(records: Sequence[Record], start: Setting) -> list[str]:
    lines = [
        "| trial | rung | tokens/s | spread | s/step | memory | took | setting |",
        "|--:|---|--:|---|--:|--:|--:|---|",
    ]
    for record in records:
        outcome = record.outcome
        head = f"| {record.number} | {record.rung} "
        tail = f"| {outcome.seconds:.0f} s | {_what(record.setting, start)} |"
        if outcome.failure:
            lines.append(f"{head}| failed | {_cell(outcome.failure)} | - | - {tail}")
            continue
        low, high = _quartiles(outcome.rates)
        step = statistics.median(outcome.step_seconds)
        memory = f"{max(outcome.peak_bytes) / 1e9:.2f} GB"
        lines.append(f"{head}| {record.rate:,.0f} | {low:,.0f} to {high:,.0f} | {step:.3f} | {memory} {tail}")
    return lines


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _what(setting: Setting, start: Setting) -> str:
    return _cell(setting.short_from(start)) or "**the start setting**"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def draw(search: Search, winner: Setting, path: Path) -> None:
    """Rates of the fastest settings and of the start: median of a setting's trials, and the range of its steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records, start = search.journal.records, search.space.start
    found: dict[Setting, list[Record]] = {}
    for record in records:
        if record.rate:
            found.setdefault(record.setting, []).append(record)
    medians = {setting: statistics.median(one.rate for one in of_it) for setting, of_it in found.items()}
    ranked = sorted(medians, key=lambda setting: -medians[setting])
    shown = [setting for setting in ranked if setting in ranked[:_NUM_SHOWN] or setting in (start, winner)][::-1]
    figure = Figure(figsize=(12, 1.6 + 0.28 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    finalists = {record.setting for record in records if record.rung == LAST}
    kinds = {
        "start setting": ("tab:orange", lambda setting: setting == start),
        "winner": ("tab:green", lambda setting: setting == winner != start),
        "of the last rung": ("tab:blue", lambda setting: setting in finalists - {start, winner}),
        "others": ("tab:gray", lambda setting: setting not in finalists | {start, winner}),
    }
    for label, (color, belongs) in kinds.items():
        own = [setting for setting in shown if belongs(setting)]
        if not own:
            continue
        middle = [medians[setting] for setting in own]
        steps = [_quartiles([rate for one in found[setting] for rate in one.outcome.rates]) for setting in own]
        spread = [
            [max(0.0, value - low) for value, (low, _) in zip(middle, steps, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(middle, steps, strict=True)],
        ]
        places = [shown.index(setting) for setting in own]
        axes.errorbar(middle, places, xerr=spread, fmt="o", color=color, label=label, capsize=3)
    words = [setting.short_from(start) or "the start setting" for setting in shown]
    words = [text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 3] + "..." for text in words]
    axes.set_yticks(
        range(len(shown)), [f"{found[one][0].number}: {text}" for one, text in zip(shown, words, strict=True)]
    )
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlim(left=0)
    axes.set_xlabel("useful tokens/s, all ranks (bars: quartiles of the steps)")
    axes.set_ylabel("number of its first trial, and the setting")
    axes.set_title("uvlm tune: measured rates")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
