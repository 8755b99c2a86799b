"""What a run prints, and what it writes as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .gates import Verdict
from .statistics import Interval
from .summary import Loss, Summary


def task_table(summary: Summary) -> Table:
    """Recall per task, length and arm."""
    table = Table(
        title=f"found, with 95 % intervals; compared where {summary.arms[0]} finds half or more",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("task", "tokens", "cases", *summary.arms, ""):
        table.add_column(heading, justify="left" if heading in ("task", "") else "right", no_wrap=True)
    for row in summary.tasks:
        recall = [_percent(interval) for interval in row.recall]
        note = "" if row.pooled else "not compared"
        table.add_row(row.task, f"{row.length:,}", str(row.cases), *recall, note)
    return table


def loss_table(summary: Summary) -> Table:
    """The pooled loss of every arm."""
    title = f"points lost against {summary.arms[0]}, paired, over the compared tasks"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("arm", "tokens", "cases", "documents", "loss", "95 % interval", "same reply"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for loss in summary.losses:
        length = "all" if loss.length is None else f"{loss.length:,}"
        interval = f"{loss.points.low:+.2f} to {loss.points.high:+.2f}"
        figures = f"{loss.points.value:+.2f}", interval, f"{loss.same_reply:.0%}"
        table.add_row(loss.arm, length, str(loss.cases), str(loss.documents), *figures)
    return table


def text_table(summary: Summary) -> Table:
    """Bits per character of every arm."""
    title = "bits per character of text that is there, read as a prompt and token by token"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("arm", "prompt", "rise", "decode", "rise", "same next token"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in summary.text:
        rises = f"{row.prompt_rise:+.2%}", f"{row.decode_rise:+.2%}"
        figures = f"{row.prompt:.4f}", rises[0], f"{row.decode:.4f}", rises[1]
        table.add_row(row.arm, *figures, f"{row.agreement:.1%}")
    return table


def gate_line(verdict: Verdict) -> str:
    """How a gate ended, in one line."""
    value = "not measured" if verdict.value is None else f"{verdict.value:.4g}"
    return f"gate {verdict.gate}: {'held' if verdict.passed else 'FAILED'}, {value}"


def headline(loss: Loss, baseline: str) -> str:
    """The one sentence that most people want."""
    points = loss.points
    return (
        f"{loss.arm} loses {points.value:.2f} points against {baseline} ({points.low:+.2f} to {points.high:+.2f}) over"
        f" {loss.cases} cases in {loss.documents} documents"
    )


def as_json(summary: Summary, verdicts: Sequence[Verdict], run: dict[str, Any]) -> dict[str, Any]:
    """The whole run as plain data. run: what it was: settings, hardware, seconds."""
    return {**run, **asdict(summary), "gates": [asdict(verdict) for verdict in verdicts]}


def _percent(interval: Interval) -> str:
    return f"{interval.value * 100:.1f} % ({interval.low * 100:.0f} to {interval.high * 100:.0f})"
