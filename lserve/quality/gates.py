"""Gates: what a run must keep, as written on the command line: `loss<=2`, `loss.high<=4`, `bpc<=1%`, `recall>=0.9`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lserve.engine.errors import SettingsError

from .summary import Loss, Summary, TextRow

_WRITTEN = re.compile(r"([a-z_.]+)\s*(<=|>=)\s*(-?\d+(?:\.\d+)?)\s*%?")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a gate held. value None: there was nothing to judge, so it did not."""

    gate: str
    value: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one figure of the arm under test (METRICS lists them)."""

    metric: str
    is_upper: bool
    bound: float
    written: str

    @property
    def needs_text(self) -> bool:
        """Whether it is about bits per character, which only an engine in this process gives."""
        return self.metric in ("bpc", "bpc_decode", "agreement")

    def judge(self, summary: Summary) -> Verdict:
        """Holds the gate against a run's figures."""
        value = METRICS[self.metric](summary)
        passed = value is not None and (value <= self.bound if self.is_upper else value >= self.bound)
        return Verdict(self.written, value, passed)


def parse_gate(text: str) -> Gate:
    """A gate as written. Raises SettingsError."""
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"a gate is written METRIC<=NUMBER or METRIC>=NUMBER, such as loss<=2, got {text!r}")
    if match[1] not in METRICS:
        raise SettingsError(f"unknown metric {match[1]!r} in gate {text!r}; there are {', '.join(METRICS)}")
    return Gate(match[1], match[2] == "<=", float(match[3]), text.strip())


def _loss(summary: Summary) -> Loss | None:
    return next((loss for loss in summary.losses if loss.arm == summary.arms[1] and loss.length is None), None)


def _text(summary: Summary) -> TextRow | None:
    return next((row for row in summary.text if row.arm == summary.arms[1]), None)


def _of_loss(read: Callable[[Loss], float]) -> Callable[[Summary], float | None]:
    return lambda summary: None if (loss := _loss(summary)) is None else read(loss)


def _of_text(read: Callable[[TextRow], float]) -> Callable[[Summary], float | None]:
    return lambda summary: None if (row := _text(summary)) is None else read(row)


def _recall(summary: Summary) -> float | None:
    rows = [row for row in summary.tasks if row.pooled]
    return sum(row.recall[1].value * row.cases for row in rows) / sum(row.cases for row in rows) if rows else None


METRICS: dict[str, Callable[[Summary], float | None]] = {
    "loss": _of_loss(lambda loss: loss.points.value),
    "loss.high": _of_loss(lambda loss: loss.points.high),
    "cases": _of_loss(lambda loss: loss.cases),
    "same_reply": _of_loss(lambda loss: loss.same_reply),
    "recall": _recall,
    "bpc": _of_text(lambda row: row.prompt_rise * 100),
    "bpc_decode": _of_text(lambda row: row.decode_rise * 100),
    "agreement": _of_text(lambda row: row.agreement),
}
"""Name to figure: loss, its interval's upper end (points), cases pooled, shares from 0 to 1, bpc rises in percent."""
