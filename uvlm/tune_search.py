"""The search of `uvlm tune`: which setting is measured when, and which one wins.

Successive halving. The start setting is measured, then a first generation (the shipped JSONs, and settings several keys
away from them); each further rung measures longer, keeps the better half and fills up with settings one key away from
the best; the start is measured again in each. The last rung has the best few and the start take turns, NUM_REPEATS
times, each time in fresh processes: whatever else the machine does hits all of them, and the gain is a median of paired
ratios. `plan` leaves out what needs more memory than there is, and decides the order of trying.

About half of the budget belongs to the last rung: where time is short, fewer settings are tried, never fewer repeats.
With five repeats the smallest and the largest ratio enclose the median's true value in 15 of 16 cases, whatever the
noise is like (an order statistic: 1 - 2 / 2^5).

Every trial is a line of OUT/trials.jsonl. All decisions follow from these lines, so the same command goes on where it
was stopped, and the budget counts over all starts.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import NamedTuple

from uvlm.tune_space import Setting, Space
from uvlm.tune_trial import Outcome

NUM_REPEATS, MAX_REPEATS = 5, 9  # of the last rung
LAST = "last"
_LAST_SHARE = 0.55  # of the budget
_MAX_FINALISTS, _MAX_RUNGS = 3, 6
_FIRST_SECONDS = 2.0  # timed in a trial of the first rung; twice as long in each further one
_TOLD_APART = 0.2  # of the time of a step; plan knows no more than that
_POOL = 40  # settings that plan puts into order
MIN_DEADLINE, BUILD_SECONDS = 60.0, 180.0  # the latter where DeepSpeed may have to compile an operator (90 s, run)


class Record(NamedTuple):
    """A trial: a line of trials.jsonl. `spent`: seconds of the budget that are gone after it."""

    number: int
    rung: str
    repeat: int
    setting: Setting
    outcome: Outcome
    spent: float

    @property
    def rate(self) -> float:
        """Useful tokens/s: the median over the timed steps. 0 where it failed."""
        return statistics.median(self.outcome.rates) if self.outcome.rates else 0.0


class Forecast(NamedTuple):
    """What plan says of a setting."""

    num_bytes: float  # of a rank
    seconds: float  # of a useful token


class Gain(NamedTuple):
    """Rate of a setting over that of the start, in turns that both finished."""

    ratio: float  # median
    low: float
    high: float
    num_pairs: int


class Journal:
    """OUT/trials.jsonl: what has been measured, in order."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self.records: list[Record] = []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if not line.endswith(b"\n"):  # the machine stopped in the middle of it
                with path.open("r+b") as file:
                    file.truncate(sum(map(len, lines)) - len(line))
                break
            tree = json.loads(line)
            setting, outcome = Setting(*tree["setting"]), Outcome(**tree["outcome"])
            self.records.append(Record(tree["number"], tree["rung"], tree["repeat"], setting, outcome, tree["spent"]))
        self._spent_before, self._began = (self.records[-1].spent if self.records else 0.0), clock()

    def find(self, setting: Setting, rung: str, repeat: int) -> Record | None:
        wanted = (setting, rung, repeat)
        return next((one for one in self.records if (one.setting, one.rung, one.repeat) == wanted), None)

    def add(self, setting: Setting, rung: str, repeat: int, outcome: Outcome) -> Record:
        spent = round(self._spent_before + self._clock() - self._began, 2)
        record = Record(len(self.records), rung, repeat, setting, outcome, spent)
        tree = {**record._asdict(), "outcome": asdict(outcome), "fingerprint": setting.fingerprint}
        with self._path.open("ab") as file:
            file.write(json.dumps(tree).encode() + b"\n")
        self.records.append(record)
        return record


@dataclass
class Tools:
    """What the search does not do itself; tests give stand-ins.

    Attributes:
        run: measures (setting, number of the trial, seconds of timed steps, deadline in seconds).
        refusal: a sentence where `uvlm train` would refuse a setting.
        forecast: what plan says of (setting, device of the first trial); a sentence where it refuses; None: not known.
        say: takes a line for the terminal.
    """

    run: Callable[[Setting, int, float, float], Outcome]
    refusal: Callable[[Setting], str | None] = lambda setting: None
    forecast: Callable[[Setting, Outcome], Forecast | str | None] = lambda setting, first: None
    say: Callable[[str], None] = lambda line: None


@dataclass
class Search:
    """One search, from its first trial or from wherever the journal stands.

    Attributes:
        budget: seconds. memory: bytes of a rank, where they are not to be those of the device.
    """

    space: Space
    journal: Journal
    tools: Tools
    budget: float
    memory: float | None = None
    seed: int = 0
    spent: float = 0.0
    not_tried: dict[Setting, str] = field(default_factory=dict)  # with the reason
    _failed: set[Setting] = field(default_factory=set)
    _tried: dict[Setting, None] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)  # that trials have taken, but those of the start
    _start_seconds: float = 0.0  # that the start's last trial took
    _start_stumbled: bool = False
    _first: Outcome = field(default_factory=Outcome)

    def run(self) -> tuple[Setting, Gain | None]:
        """The winner, which may be the start, and its gain over it; None where the start cannot run, or has won.

        ValueError where nothing at all could run.
        """
        self._first = self._measure(self.space.start, "0", 0).outcome
        alive = self._first_rung()
        for number in range(1, _MAX_RUNGS):
            if not alive or (room := self._room(number)) < 3:
                break
            alive = self._rung(number, alive, room)
        return self._last_rung(alive)

    @property
    def start_works(self) -> bool:
        return self.space.start not in self._failed

    def _measure(self, setting: Setting, rung: str, repeat: int, seconds: float = _FIRST_SECONDS) -> Record:
        record = self.journal.find(setting, rung, repeat)
        if record is None:
            number = len(self.journal.records)
            record = self.journal.add(setting, rung, repeat, self._judged(setting, number, seconds))
            self.tools.say(self._line(record))
        self.spent = record.spent
        self._tried[setting] = None
        if record.outcome.failure:
            if setting == self.space.start and self._first.rates and not self._start_stumbled:
                self._start_stumbled = True  # it has worked before: the comparison is not given up for one accident
            else:
                self._failed.add(setting)
        elif setting == self.space.start:
            self._start_seconds = record.outcome.seconds
        else:
            self._seconds.append(record.outcome.seconds)
        return record

    def _judged(self, setting: Setting, number: int, seconds: float) -> Outcome:
        """The trial; a failure too where it was fast by doing something else than the start."""
        outcome, start = self.tools.run(setting, number, seconds, self._deadline(setting, seconds)), self.space.start
        if outcome.num_too_long and setting.pack_tokens < start.pack_tokens and not self._first.num_too_long:
            reason = f"{outcome.num_too_long} documents of the first steps, which the start takes, were left out"
            return Outcome(f"{reason}: data.pack_tokens={setting.pack_tokens} is too small", seconds=outcome.seconds)
        peak = max(outcome.peak_bytes, default=0)
        if self.memory and peak > self.memory:
            reason = f"needs {peak / 1e9:.2f} GB a rank, more than --gpu-memory"
            return Outcome(reason, peak_bytes=outcome.peak_bytes, seconds=outcome.seconds)
        return outcome

    def _deadline(self, setting: Setting, seconds: float) -> float:
        if not self._seconds and not self._first.rates:  # nothing is known yet
            return max(BUILD_SECONDS, 0.4 * self.budget)
        longest = max([*self._seconds, self._first.seconds])
        adam = "optimizer.params.torch_adam"
        builds = self.space.start.flat().get(adam) and not setting.flat().get(adam)
        return max(MIN_DEADLINE, 3 * longest, BUILD_SECONDS if builds else 0.0) + 3 * seconds

    def _typical(self) -> float:
        """Seconds that another trial may take: as the last ones did, for the machine may have slowed down."""
        return statistics.median(self._seconds[-5:]) if self._seconds else max(self._first.seconds, 1.0)

    def _turn(self, num_finalists: int) -> float:
        """Seconds of a turn of the last rung."""
        return (self._start_seconds if self.start_works else 0.0) + num_finalists * self._typical()

    def _num_finalists(self) -> int:
        fitting = (_LAST_SHARE * self.budget / NUM_REPEATS - self._turn(0)) / self._typical()
        return max(1, min(_MAX_FINALISTS, int(fitting)))

    def _left(self) -> float:
        """Seconds of the budget that are left for searching."""
        return self.budget - self.spent - NUM_REPEATS * self._turn(self._num_finalists())

    def _room(self, number: int) -> int:
        """How many trials beside the start's the next rung has: half of what is left, or all if that is little."""
        left = self._left() - self._turn(0)
        fitting = int(left / self._typical())
        return fitting // 2 if fitting >= 8 and number < _MAX_RUNGS - 1 else fitting

    def _ordered(self, settings: Sequence[Setting]) -> list[Setting]:
        """Those that can be tried; the faster by prediction first, where it tells them apart."""
        steps: list[tuple[float, Setting]] = []
        limit = self.memory or self._first.device_bytes
        for setting in settings:
            if setting in self.not_tried or setting in self._failed:
                continue
            if refusal := self.tools.refusal(setting):
                self.not_tried[setting] = f"refused: {refusal}"
                continue
            forecast = self.tools.forecast(setting, self._first)
            if isinstance(forecast, str):
                self.not_tried[setting] = forecast
            elif forecast and limit and forecast.num_bytes > limit:
                self.not_tried[setting] = (
                    f"needs {forecast.num_bytes / 1e9:.2f} GB a rank by prediction; there are {limit / 1e9:.2f} GB"
                )
            else:
                steps.append((forecast.seconds if forecast else math.inf, setting))
        fastest = min((seconds for seconds, _ in steps), default=1.0)

        def place(step: tuple[float, Setting]) -> tuple[float, bool]:
            share = (step[0] / fastest - 1) // _TOLD_APART if step[0] < math.inf else math.inf
            return share, "offload" in step[1].deepspeed  # which saves memory, and seldom time

        return [setting for _, setting in sorted(steps, key=place)]

    def _first_rung(self) -> list[Setting]:
        shipped = self.space.shipped()
        pool = self.space.samples(_POOL - len(shipped), self.seed)
        settings = [*self._ordered(shipped[:2]), *self._ordered([*shipped[2:], *pool])]
        end = self.spent + self._left() / 2
        records: list[Record] = []
        for setting in settings:
            if len([one for one in records if one.rate]) >= 2 and self.spent + self._typical() > end:
                break
            records.append(self._measure(setting, "0", 0))
        return self._ranked(records)

    def _rung(self, number: int, alive: Sequence[Setting], room: int) -> list[Setting]:
        seconds, rung, start = _FIRST_SECONDS * 2**number, str(number), self.space.start
        kept = [setting for setting in alive[: max(1, (len(alive) + 1) // 2, room // 2)] if setting != start][:room]
        neighbours = [setting for setting in self.space.moves(alive[0]) if setting not in self._tried]
        Random(f"{self.seed} {number}").shuffle(neighbours)
        members = [*kept, *self._ordered(neighbours)][:room]
        records = [self._measure(start, rung, 0, seconds)] if self.start_works else []
        reserve = self.spent + self._left()
        for setting in members:
            if len(records) > 2 and self.spent + self._typical() > reserve:
                break
            records.append(self._measure(setting, rung, 0, seconds))
        return self._ranked(records) or list(alive)

    def _ranked(self, records: Sequence[Record]) -> list[Setting]:
        """The settings of these trials without failures, the fastest first."""
        ranked = sorted(records, key=lambda record: -record.rate)
        return [record.setting for record in ranked if record.setting not in self._failed]

    def _last_rung(self, alive: Sequence[Setting]) -> tuple[Setting, Gain | None]:
        start = self.space.start
        finalists = [setting for setting in alive if setting not in self._failed | {start}][: self._num_finalists()]
        members = [*[start] * self.start_works, *finalists]
        if not members:
            raise ValueError(
                f"no setting could be measured; the start: {self.journal.records[0].outcome.failure}. See the logs of "
                "the trials, and give --budget more minutes if they needed more time"
            )
        for repeat in self._repeats(len(finalists)) if finalists else ():
            for i in range(len(members)):
                setting = members[(i + repeat) % len(members)]
                if setting not in self._failed:
                    self._measure(setting, LAST, repeat, 2 * _FIRST_SECONDS)
        candidates = [setting for setting in finalists if setting not in self._failed]
        if not self.start_works:
            if not candidates:
                raise ValueError("every setting that could run has failed in the last rung; see the report's trials")
            return max(candidates, key=lambda one: statistics.median(rates(self.journal.records, one))), None
        gains = {setting: gain(self.journal.records, setting, start) for setting in candidates}
        winner = max(candidates, key=lambda setting: gains[setting].ratio, default=start)
        if not candidates or gains[winner].ratio <= 1:
            return start, None
        return winner, gains[winner]

    def _repeats(self, num_finalists: int) -> Iterator[int]:
        for repeat in count():
            if repeat >= MAX_REPEATS or (
                repeat >= NUM_REPEATS and self.spent + self._turn(num_finalists) > self.budget
            ):
                return
            yield repeat

    def _line(self, record: Record) -> str:
        minutes = f"{int(record.spent) // 60}:{int(record.spent) % 60:02d} of {self.budget / 60:g} min"
        what = record.setting.short_from(self.space.start) or "the start setting"
        found = record.outcome.failure or f"{record.rate:,.0f} tokens/s"
        return f"{minutes}  trial {record.number}, rung {record.rung}: {found}  ({what})"


def rates(records: Sequence[Record], setting: Setting, rung: str = LAST) -> list[float]:
    """Of a setting in a rung, by repeat."""
    return [record.rate for record in records if (record.setting, record.rung) == (setting, rung) and record.rate]


def gain(records: Sequence[Record], setting: Setting, start: Setting) -> Gain:
    """Of the last rung, turn by turn."""
    found: dict[int, dict[Setting, float]] = {}
    for record in records:
        if record.rung == LAST and record.rate:
            found.setdefault(record.repeat, {})[record.setting] = record.rate
    ratios = [turn[setting] / turn[start] for turn in found.values() if {setting, start} <= turn.keys()]
    return Gain(statistics.median(ratios), min(ratios), max(ratios), len(ratios))
