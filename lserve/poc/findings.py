"""What a run found, as plain data: the report draws it and nothing else."""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from lserve.quality.statistics import Interval
from lserve.quality.suite import Result

from .probes import Traced


@dataclass(slots=True)
class Timings:
    """One setting at one length; each list has one entry a document.

    read_s: first token of a prompt that nobody read before; again_s: of one whose pages are there still.
    gap_s: mean seconds between an answer's tokens, alone; together_s: with `batch` answers at once.
    """

    read_s: list[float] = field(default_factory=list)
    again_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    together_s: list[float] = field(default_factory=list)
    batch: int = 0


@dataclass(frozen=True, slots=True)
class TraceFinding:
    """One answer and what it read. evidence: where in the message the answer stands, if it does."""

    setting: str
    length: int
    question: str
    expected: str
    message: str
    evidence: tuple[int, int] | None
    traced: Traced


@dataclass(slots=True)
class Findings:
    """Everything. lengths: those that were measured, ascending. dropped: tasks that even the baseline fails."""

    lengths: list[int] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    timings: defaultdict[tuple[str, int], Timings] = field(default_factory=lambda: defaultdict(Timings))
    trace: TraceFinding | None = None
    dropped: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def timing(self, setting: str, length: int) -> Timings:
        """Of one setting at one length; empty where nothing was timed."""
        return self.timings.get((setting, length), Timings())


def middle(values: list[float]) -> Interval | None:
    """The median, and the range of what was measured; None of nothing."""
    return Interval(statistics.median(values), min(values), max(values)) if values else None


def doubling(limit: int, smallest: int = 1000, most: int = 4) -> list[int]:
    """Lengths to measure up to a limit, each twice the one before, ascending, in round numbers."""
    lengths: Iterator[int] = (_round(limit >> shift) for shift in range(most))
    return sorted({length for length in lengths if length >= min(smallest, limit)})


def _round(length: int) -> int:
    unit: int = 10 ** max(len(str(length)) - 2, 1)
    return length // unit * unit
