"""What a preflight's findings mean: pure functions from what ranks saw and measured to sentences for the user.

Whoever differs from the majority is named by node and rank, and where all links of a rank or a node are bad, that one
is named instead of its links: it is what has to be looked at. A link is compared with the median of its class (inside a
node, between nodes), since what is slow for NVLink is fast for Ethernet; with fewer than three links of a class nothing
is compared, and with all of them equally slow there is nothing to see but the rate in the summary.

Judging 1,024 ranks of 128 nodes takes 15 ms (run).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import NamedTuple

from uvlm.distributed import listed

CLOCK_SECONDS = 1.0  # apart; beyond it the times of logs and files of different nodes cannot be compared
KERNEL_BYTES = 512e6  # of the disk of compiled kernels
# DeepSpeed's CPU collective maps 66 MiB for each rank (read, shm.cpp), and NCCL and loader workers pass data there too.
# What does not fit is a bus error in the middle of a step.
SHARED_MEMORY_BYTES = 70e6
SLOW_RANK, SLOW_LINK = 2.0, 3.0  # times the median
_FEWEST = 3  # ranks or links that have a median worth comparing with
_MOST_NODES = 4  # that a sentence lists
GPU = "GPU"  # the one version that may differ: a warning


@dataclass(frozen=True)
class Facts:
    """What one rank found out alone.

    Attributes:
        troubles: clauses that begin with "cannot", each with a remedy.
        seen: digests by name of what must be the same everywhere.
        clock: seconds by which this rank's clock is ahead of rank 0's.
        kernel_folder, kernel_bytes: where kernels are compiled, and what is free there.
        shared_bytes: free in /dev/shm; None where there is no such thing.
    """

    rank: int
    node: str
    troubles: list[str]
    seen: dict[str, str]
    code: str
    code_folder: str
    versions: dict[str, str]
    clock: float
    kernel_folder: str
    kernel_bytes: int
    shared_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """What one rank calculated and exchanged.

    Attributes:
        num_wrong, product_seconds: wrong elements of the matrix products; the time of the fastest round.
        exchanges: (partner, seconds of the fastest exchange, whether all bytes were right).
        sum_is_right: of the sums over all ranks.
    """

    rank: int
    num_wrong: int
    product_seconds: float
    exchanges: list[tuple[int, float, bool]]
    sum_is_right: bool


@dataclass(frozen=True)
class Stage:
    """Where a rank is: `number` counts up in the order in which all ranks pass."""

    number: int
    words: str
    node: str
    partner: int | None = None


class Link(NamedTuple):
    """Between ranks a < b. `seconds` of the slower side."""

    a: int
    b: int
    seconds: float
    is_right: bool


class Verdict(NamedTuple):
    errors: list[str]
    warnings: list[str]


def judge(facts: Sequence[Facts]) -> Verdict:
    """What ranks see differently. `facts`: of all ranks, by rank."""
    nodes = [one.node for one in facts]
    troubles: dict[str, list[int]] = defaultdict(list)
    for one in facts:
        for trouble in one.troubles:
            troubles[trouble].append(one.rank)
    errors = [f"{named(ranks, nodes)} {trouble}" for trouble, ranks in troubles.items()]
    unlike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for one in facts for name in one.seen):
        for _, odd, _, most in _differences({one.rank: one.seen[name] for one in facts if name in one.seen}):
            unlike[named(odd, nodes), named(most, nodes)].append(name)
    errors += [
        f"{odd} cannot see the same {', '.join(names)} as {most}; mount one folder on every node, or copy it again"
        for (odd, most), names in unlike.items()
    ]
    for _, odd, _, most in _differences({one.rank: one.code for one in facts}):
        errors.append(
            f"{named(odd, nodes)} would run other code ({facts[odd[0]].code_folder}) than {named(most, nodes)} "
            f"({facts[most[0]].code_folder}); let PYTHONPATH name one folder that all nodes share"
        )
    warnings = []
    for name in dict.fromkeys(name for one in facts for name in one.versions):
        for version, odd, common, most in _differences({one.rank: one.versions.get(name, "-") for one in facts}):
            if name == GPU:
                warnings.append(f"{named(odd, nodes)} would use {version}, {named(most, nodes)} {common}")
                continue
            errors.append(
                f"{named(odd, nodes)} would run with {name} {version}, {named(most, nodes)} with {name} {common}; "
                "activate the same environment on every node (env.sh)"
            )
    return Verdict(errors + _disks(facts, nodes), warnings + _clocks(facts, nodes))


def _differences(values: Mapping[int, Hashable]) -> list[tuple[Hashable, list[int], Hashable, list[int]]]:
    """For each value but the most common: it, its ranks, the most common value and the ranks of that."""
    ranks: dict[Hashable, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    common = max(ranks, key=lambda value: len(ranks[value]))  # of equals, that of the lowest rank
    return [(value, odd, common, ranks[common]) for value, odd in ranks.items() if value != common]


def _disks(facts: Sequence[Facts], nodes: Sequence[str]) -> list[str]:
    errors = []
    full: dict[str, list[int]] = defaultdict(list)
    for one in facts:
        if one.kernel_bytes < KERNEL_BYTES:
            full[one.kernel_folder].append(one.rank)
    for folder, ranks in full.items():
        free = min(facts[rank].kernel_bytes for rank in ranks)
        errors.append(
            f"{named(ranks, nodes)} cannot compile kernels with {free / 1e6:,.0f} MB free in {folder}, "
            f"{KERNEL_BYTES / 1e6:,.0f} MB are needed; free some space there, or set TORCH_EXTENSIONS_DIR to a folder "
            "of another local disk"
        )
    num_ranks = Counter(nodes)
    small: dict[int, tuple[int, float]] = {}
    for one in facts:
        needed = SHARED_MEMORY_BYTES * num_ranks[one.node]
        if one.shared_bytes is not None and one.shared_bytes < needed:
            small[one.rank] = one.shared_bytes, needed
    if small:
        free, needed = min(small.values())
        errors.append(
            f"{named(small, nodes)} cannot pass data with {free / 1e6:,.0f} MB free in /dev/shm, "
            f"{needed / 1e6:,.0f} MB are needed; free some, or give the container more (docker: --shm-size)"
        )
    return errors


def _clocks(facts: Sequence[Facts], nodes: Sequence[str]) -> list[str]:
    clocks = [one.clock for one in facts]
    middle = min(median_low(clocks), median_high(clocks), key=abs)  # where halves differ, that of rank 0
    by_node: dict[str, list[Facts]] = defaultdict(list)
    for one in facts:
        if abs(one.clock - middle) > CLOCK_SECONDS:
            by_node[one.node].append(one)
    sentences = []
    for odd in by_node.values():
        ahead = max((one.clock - middle for one in odd), key=abs)
        sentences.append(
            f"the clock of {named((one.rank for one in odd), nodes)} is {abs(ahead):,.1f} s "
            f"{'ahead' if ahead > 0 else 'behind'}; have its time service (chronyc tracking) looked at"
        )
    return sentences


def judge_measured(measured: Sequence[Measured], nodes: Sequence[str], num_bytes: int) -> Verdict:
    """What is wrong or slow. `measured`: of all ranks, by rank; `num_bytes`: of one exchange in each direction."""
    errors, warnings = [], []
    for one in measured:
        if one.num_wrong:
            errors.append(
                f"{named([one.rank], nodes)} calculates wrongly ({one.num_wrong:,} wrong elements in products of small "
                "integers); leave the node out (sbatch --exclude) and have its processor or GPU tested"
            )
    if len(measured) >= _FEWEST:
        middle = median_low(one.product_seconds for one in measured)
        slow: dict[str, list[Measured]] = defaultdict(list)
        for one in measured:
            if one.product_seconds > SLOW_RANK * middle:
                slow[nodes[one.rank]].append(one)
        for ranks in slow.values():
            times = max(one.product_seconds for one in ranks) / middle
            warnings.append(
                f"{named((one.rank for one in ranks), nodes)} multiplied matrices {times:.1f} times slower than the "
                "median rank; look for another process there, and at clocks and temperature (nvidia-smi -q -d "
                "PERFORMANCE)"
            )
    links = links_of(measured)
    wrong = {link for link in links if not link.is_right}
    for subject, _ in blame(wrong, links, nodes):
        errors.append(
            f"{subject}: bytes came out changed; leave the node out (sbatch --exclude) and have network and GPU tested"
        )
    if not wrong and (bad := [one.rank for one in measured if not one.sum_is_right]):
        errors.append(
            f"{named(bad, nodes)} got a wrong sum over all ranks, though each link alone was right; have the nodes' "
            "GPUs and network tested, or leave them out (sbatch --exclude)"
        )
    for subject, slowest in blame(_slow_links(links, nodes), links, nodes):
        middle = median_low(link.seconds for link in _class_of(slowest, links, nodes))
        warnings.append(
            f"{subject}: {slowest.seconds / middle:.1f} times slower than the median, "
            f"{_rate(num_bytes, slowest)} instead of {_rate(num_bytes, slowest._replace(seconds=middle))}; look at "
            "cables, ports and NCCL_IB_HCA or NCCL_SOCKET_IFNAME, or leave the node out (sbatch --exclude)"
        )
    return Verdict(errors, warnings)


def links_of(measured: Sequence[Measured]) -> list[Link]:
    """Each pair that has exchanged, once."""
    sides = {(one.rank, partner): (time, right) for one in measured for partner, time, right in one.exchanges}
    both = [(a, b, sides[a, b], sides[b, a]) for a, b in sides if a < b]
    return [Link(a, b, max(at_a[0], at_b[0]), at_a[1] and at_b[1]) for a, b, at_a, at_b in both]


def _class_of(link: Link, links: Iterable[Link], nodes: Sequence[str]) -> list[Link]:
    is_inside = nodes[link.a] == nodes[link.b]
    return [other for other in links if (nodes[other.a] == nodes[other.b]) == is_inside]


def _slow_links(links: Sequence[Link], nodes: Sequence[str]) -> set[Link]:
    slow: set[Link] = set()
    for is_inside in (True, False):
        own = [link for link in links if (nodes[link.a] == nodes[link.b]) == is_inside]
        if len(own) >= _FEWEST:
            middle = median_low(link.seconds for link in own)
            slow |= {link for link in own if link.seconds > SLOW_LINK * middle}
    return slow


def blame(bad: Collection[Link], links: Sequence[Link], nodes: Sequence[str]) -> list[tuple[str, Link]]:
    """Who has to be looked at, and the slowest of its links.

    Nodes come before ranks and ranks before links. One is blamed for its links where it has several, all are bad, and
    the other end of each also has a good one.
    """
    found: list[tuple[str, Link]] = []
    left = set(bad)
    between = [link for link in links if nodes[link.a] != nodes[link.b]]

    def ends(link: Link, of_nodes: bool) -> tuple[int | str, int | str]:
        return (nodes[link.a], nodes[link.b]) if of_nodes else (link.a, link.b)

    for pool, of_nodes, where in (
        (between, True, " to other nodes"),
        (links, False, ""),
        (between, False, " to other nodes"),
    ):
        pools: dict[int | str, list[Link]] = defaultdict(list)
        for link in pool:
            for end in ends(link, of_nodes):
                pools[end].append(link)
        has_good = {end for end, own in pools.items() if not set(own) <= set(bad)}
        for end, own in pools.items():
            others = {other for link in own for other in ends(link, of_nodes) if other != end}
            if len(own) > 1 and set(own) <= left and others <= has_good:
                subject = str(end) if of_nodes else named([int(end)], nodes)
                found.append((f"all links of {subject}{where}", max(own, key=lambda link: link.seconds)))
                left -= set(own)
    if len(between) > 1 and set(between) <= left:
        found.append(("all links between nodes", max(between, key=lambda link: link.seconds)))
        left -= set(between)
    return found + [(f"the link of {named([x.a], nodes)} and {named([x.b], nodes)}", x) for x in sorted(left)]


def late(stages: Mapping[int, Stage], num_ranks: int) -> str:
    """Who holds up the others, in a clause. `stages`: of the ranks that have come."""
    if missing := [rank for rank in range(num_ranks) if rank not in stages]:
        return f"{listed(missing)} {'has' if len(missing) == 1 else 'have'} not come"
    nodes = [stages[rank].node for rank in range(num_ranks)]
    first = min(stage.number for stage in stages.values())
    behind = {rank: stage for rank, stage in sorted(stages.items()) if stage.number == first}
    pairs = sorted({(min(r, s.partner), max(r, s.partner)) for r, s in behind.items() if s.partner is not None})
    if pairs:
        shown = [
            f"{named([a], nodes)} and {named([b], nodes)} have not finished exchanging with each other"
            for a, b in pairs[:_MOST_NODES]
        ]
        more = [f"and {len(pairs) - len(shown)} more pairs"] if len(pairs) > len(shown) else []
        return ", ".join(shown + more)
    words = next(iter(behind.values())).words
    return f"{named(behind, nodes)} {'has' if len(behind) == 1 else 'have'} not finished {words}"


def summary(facts: Sequence[Facts], measured: Sequence[Measured], num_bytes: int, seconds: float) -> str:
    """The line that says that all is well."""
    nodes = [one.node for one in facts]
    clocks = [one.clock for one in facts]
    num_nodes = len(set(nodes))
    who = f"{len(facts)} rank{'s' * (len(facts) > 1)} on {num_nodes} node{'s' * (num_nodes > 1)}"
    parts = [
        f"preflight: {who} agree{'s' * (len(facts) == 1)} on code, versions, data and run folder",
        f"clocks within {max(1.0, 1e3 * (max(clocks) - min(clocks))):,.0f} ms",
    ]
    links = links_of(measured)
    for is_inside, where in ((True, "inside a node"), (False, "between nodes")):
        own = [link for link in links if (nodes[link.a] == nodes[link.b]) == is_inside]
        if own:
            slowest = max(own, key=lambda link: link.seconds)
            ends = f"{named([slowest.a], nodes)} - {named([slowest.b], nodes)}"
            parts.append(f"slowest link {where} {_rate(num_bytes, slowest)} ({ends})")
    return "; ".join([*parts, f"{seconds:.1f} s"])


def named(ranks: Iterable[int], nodes: Sequence[str]) -> str:
    """ "ranks 8-15 on n2"; of many nodes the first are listed. `nodes`: of all ranks, by rank."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(ranks):
        by_node[nodes[rank]].append(rank)
    parts = [f"{listed(own)} on {node}" for node, own in list(by_node.items())[:_MOST_NODES]]
    if more := len(by_node) - len(parts):
        parts.append(f"those on {more} more node{'s' * (more > 1)}")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _rate(num_bytes: int, link: Link) -> str:
    rate = num_bytes / link.seconds
    return f"{rate / 1e9:.2g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


def rounds(nodes: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that exchange at the same time, round after round; nobody twice in a round.

    The ring of all ranks; and where nodes hold equally many ranks, several and in a row, also the rings of equal local
    ranks, so that every network rail is used.
    """
    size, per_node = len(nodes), nodes.count(nodes[0])
    strides = [1]
    is_even = all(len(set(nodes[first : first + per_node])) == 1 for first in range(0, size, per_node))
    if 1 < per_node < size and is_even and set(Counter(nodes).values()) == {per_node}:
        strides.append(per_node)
    found: list[list[tuple[int, int]]] = []
    for stride in strides:
        others = {(min(r, s), max(r, s)) for r in range(size) for s in [(r + stride) % size]}
        own: list[list[tuple[int, int]]] = []
        busy: list[set[int]] = []
        for a, b in sorted(pair for pair in others if pair[0] != pair[1]):
            number = next((n for n, ranks in enumerate(busy) if not ranks & {a, b}), len(busy))
            if number == len(busy):
                own.append([])
                busy.append(set())
            own[number].append((a, b))
            busy[number] |= {a, b}
        found += own
    return found
