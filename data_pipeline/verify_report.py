"""What `verify` finds: counts that add up over shards and processes, and the tables that a terminal gets.

Bounded whatever a corpus holds: findings are counted by category, of which there are few, and the first of each keep
their sentence; documents are counted by source, up to NUM_SOURCES of them; lengths by value.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KEPT_PER_CATEGORY = 20  # sentences
NUM_SOURCES = 1000  # that are counted by name; a hostile corpus could name one for each document
COUNTS = ("shards", "documents", "bytes", "images", "images_with_bytes", "images_with_codes", "images_decoded")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `place` is a document's key or a byte offset, "" for a whole file."""

    shard: str
    place: str
    category: str  # one of a few fixed strings
    sentence: str

    def __str__(self) -> str:
        where = " ".join(part for part in (self.shard, self.place) if part)
        return _printable(f"{where}: {self.sentence}" if where else self.sentence)


@dataclass
class VerifyReport:
    """What a folder holds and what is wrong with it. Tasks and sources are those of readable documents."""

    shards: int = 0
    documents: int = 0  # readable ones
    bytes: int = 0
    images: int = 0
    images_with_bytes: int = 0
    images_with_codes: int = 0
    images_decoded: int = 0
    problems: Counter[str] = field(default_factory=Counter)  # category -> how many
    findings: list[Finding] = field(default_factory=list)  # the first KEPT_PER_CATEGORY of each category
    documents_by: Counter[tuple[str, str]] = field(default_factory=Counter)  # (task, source) -> documents
    images_by: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)  # task -> tokens -> documents; needs a tokenizer
    longest: tuple[int, str] = (0, "")  # tokens and key of the longest document
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.problems

    def add(self, finding: Finding) -> None:
        self.problems[finding.category] += 1
        self._keep(finding)

    def _keep(self, finding: Finding) -> None:
        if sum(kept.category == finding.category for kept in self.findings) < KEPT_PER_CATEGORY:
            self.findings.append(finding)

    def count(self, task: str, source: str, num_documents: int, num_images: int) -> None:
        kind = (task, source[:200])
        if kind not in self.documents_by and len(self.documents_by) >= NUM_SOURCES:
            kind = (task, "(others)")
        self.documents_by[kind] += num_documents
        self.images_by[kind] += num_images

    def merge(self, other: VerifyReport) -> None:
        """Adds what another part of the folder gave."""
        self.problems.update(other.problems)
        for finding in other.findings:
            self._keep(finding)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for (task, source), count in other.documents_by.items():
            self.count(task, source, count, other.images_by[(task, source)])
        for task, lengths in other.lengths.items():
            self.lengths.setdefault(task, Counter()).update(lengths)
        self.longest = max(self.longest, other.longest)


def summary(report: VerifyReport) -> str:
    """A short table: documents and images by task and source, and lengths in tokens where they were measured."""
    lines = [
        f"{report.documents:,} documents, {report.images:,} images ({report.images_decoded:,} decoded, "
        f"{report.images_with_codes:,} with codes) in {report.shards:,} shards, {report.bytes / 1e6:,.1f} MB"
    ]
    lines.append(f"{'task':<12}{'source':<28}{'documents':>12}{'images':>12}")
    for (task, source), count in sorted(report.documents_by.items(), key=lambda item: -item[1])[:20]:
        name = _printable(source, 26)
        lines.append(f"{task:<12}{name:<28}{count:>12,}{report.images_by[(task, source)]:>12,}")
    if len(report.documents_by) > 20:
        lines.append(f"... and {len(report.documents_by) - 20:,} more sources")
    if report.lengths:
        lines.append(f"{'task':<12}{'tokens':<28}{'p50':>8}{'p95':>8}{'max':>8}")
        for task, lengths in sorted(report.lengths.items()):
            p50, p95, largest = (_quantile(lengths, q) for q in (0.5, 0.95, 1.0))
            lines.append(f"{task:<12}{sum(n * m for n, m in lengths.items()):<28,}{p50:>8,}{p95:>8,}{largest:>8,}")
        lines.append(f"the longest document is {_printable(report.longest[1], 60)} with {report.longest[0]:,} tokens")
    return "\n".join(lines)


def problems(report: VerifyReport) -> str:
    """What is wrong, for the terminal: a count for each category and under it its first sentences."""
    lines = []
    for category, count in report.problems.most_common():
        lines.append(f"{count:,} x {category}")
        kept = [finding for finding in report.findings if finding.category == category]
        lines += [f"  {finding}" for finding in kept]
        lines += [f"  ... and {count - len(kept):,} more"] if count > len(kept) else []
    return "\n".join(lines)


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that `share` of all counted values do not exceed."""
    wanted, total = share * sum(counts.values()), 0
    for value in sorted(counts):
        total += counts[value]
        if total >= wanted:
            return value
    raise AssertionError("no values")


def _printable(text: str, length: int = 400) -> str:
    """Names come from untrusted files and go to a terminal, which must not act on them."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[: 2 * length])
    return text if len(text) <= length else text[: length - 3] + "..."
