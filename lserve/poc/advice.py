"""From findings to figures that can be decided by: costs, gains, losses, and one recommendation. No torch."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lserve.quality.statistics import Interval, share
from lserve.quality.summary import Loss, Summary, summarize

from .findings import Findings
from .settings import Setting

PAYS_BELOW = 0.95
"""A setting pays at a length when it takes less than this share of the baseline's time."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Machine-seconds per 1,000 requests of one setting at one length, the answer's writing shared by a batch.

    fresh: every request brings a prompt that must be read. known: its pages are there from an earlier request.
    """

    fresh_s: float
    known_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One setting against the baseline.

    pays_from: shortest measured prompt from which on its answers are written faster, None where they are not.
    loss: points lost over all lengths, None where nothing could be compared. speedup, cheaper: the baseline's figure
    as a multiple of this setting's, at the longest prompt. memory: its share of the baseline's memory there.
    """

    setting: Setting
    pays_from: int | None
    loss: Loss | None
    speedup: float | None
    cheaper: float | None
    memory: float | None

    def is_acceptable(self, max_loss: float) -> bool:
        """Whether the measured loss stays within what may be lost."""
        return self.loss is not None and self.loss.points.value <= max_loss

    def is_sure(self, max_loss: float) -> bool:
        """Whether the loss's whole interval does."""
        return self.loss is not None and self.loss.points.high <= max_loss


class Advice:
    """All figures of a run.

    max_loss: points that may be lost. answer_tokens: length of the answers that are priced. machines: that are paid
    for while one answers.
    """

    def __init__(
        self, settings: Sequence[Setting], findings: Findings, max_loss: float, answer_tokens: int, machines: int = 1
    ) -> None:
        self.settings, self.findings, self._machines = list(settings), findings, machines
        self.max_loss, self.answer_tokens = max_loss, answer_tokens
        self.baseline = self.settings[0]
        self.summary: Summary = summarize([setting.name for setting in settings], findings.results)
        self.longest = max(findings.lengths)
        self.verdicts = [self._verdict(setting) for setting in self.settings[1:]]
        self.chosen = self._choose()

    def gap_s(self, setting: Setting, length: int, together: bool = False) -> float | None:
        """Median seconds between an answer's tokens."""
        timing = self.findings.timing(setting.name, length)
        values = timing.together_s if together else timing.gap_s
        return statistics.median(values) if values else None

    def cost(self, setting: Setting, length: int) -> Cost | None:
        """What 1,000 requests take; None where something was not timed."""
        timing, gap = self.findings.timing(setting.name, length), self.gap_s(setting, length, together=True)
        if gap is None or not timing.read_s or not timing.again_s:
            return None
        writing, scale = self.answer_tokens * gap / timing.batch, 1000 * self._machines
        read_s, again_s = (statistics.median(seconds) + writing for seconds in (timing.read_s, timing.again_s))
        return Cost(scale * read_s, scale * again_s)

    def score(self, setting: Setting, length: int | None = None) -> Interval | None:
        """Share of the compared questions that were answered right, at one length or over all."""
        pooled = {(row.task, row.length) for row in self.summary.tasks if row.pooled and length in (None, row.length)}
        scores = [r.score for r in self.findings.results if r.arm == setting.name and (r.task, r.length) in pooled]
        return share(scores) if scores else None

    def loss(self, setting: Setting, length: int | None = None) -> Loss | None:
        """Points that a setting loses."""
        return next((x for x in self.summary.losses if (x.arm, x.length) == (setting.name, length)), None)

    def memory(self, setting: Setting, length: int) -> int | None:
        """Bytes that one request holds."""
        return None if setting.costs is None else setting.costs.memory(length)

    def _verdict(self, setting: Setting) -> Verdict:
        base, longest = self.baseline, self.longest
        pays_from = None
        for length in reversed(self.findings.lengths):
            ours, theirs = self.gap_s(setting, length), self.gap_s(base, length)
            if ours is None or theirs is None or ours > PAYS_BELOW * theirs:
                break
            pays_from = length
        known = [cost.known_s if (cost := self.cost(one, longest)) else None for one in (base, setting)]
        return Verdict(
            setting,
            pays_from,
            self.loss(setting),
            _ratio(self.gap_s(base, longest), self.gap_s(setting, longest)),
            _ratio(*known),
            _ratio(self.memory(setting, longest), self.memory(base, longest)),
        )

    def _choose(self) -> Verdict | None:
        """The cheapest of the settings that lose little enough; first among those that are sure to."""
        acceptable = [v for v in self.verdicts if v.is_acceptable(self.max_loss) and (v.cheaper or 0) > 1]
        sure = [v for v in acceptable if v.is_sure(self.max_loss)]
        best = max(acceptable, key=lambda v: v.cheaper or 0.0, default=None)
        return max(sure, key=lambda v: v.cheaper or 0.0, default=best)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
