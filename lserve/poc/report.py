"""The report: one HTML page, self-contained, for somebody who decides about machines and money."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lserve.quality.statistics import Interval

from .advice import Advice, Verdict
from .charts import COLOURS, Series, bars, figure, intervals, lines
from .findings import middle
from .settings import Setting
from .trace_view import view

Point = tuple[float, float, float, float]
MEGABYTE = 1_000_000
MISSED = 6
SMALLER = 0.7
"""A share of the baseline's memory that is worth a sentence."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the run was.

    second: what a second of it is a second of. documents: (kind, how many) pairs. serve_command: what serves the model
    with the recommended settings.
    """

    model: str
    machine: str
    second: str
    version: str
    date: str
    documents: tuple[tuple[str, int], ...]
    characters: int
    minutes: float
    problems: tuple[str, ...]
    url: str | None
    price_note: str
    serve_command: str


def write_report(path: Path, advice: Advice, facts: RunFacts) -> None:
    """Writes the page. Raises OSError."""
    environment = Environment(loader=PackageLoader("lserve.poc"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"figure": figure, "size": size, "percent": percent, "interval": written, "signed": signed}
    template = environment.get_template("report.html.j2")
    names = [setting.name for setting in advice.settings]
    content = {
        "facts": facts,
        "advice": advice,
        "findings": advice.findings,
        "colours": dict(zip(names, COLOURS * (1 + len(names) // len(COLOURS)), strict=False)),
        "headline": headline(advice),
        "charts": charts(advice),
        "rows": {length: [_row(advice, s, length) for s in advice.settings] for length in advice.findings.lengths},
        "missed": missed(advice),
        "trace": view(advice.findings.trace) if advice.findings.trace else None,
        "data": json.dumps(as_json(advice, facts)).replace("<", "\\u003c"),
    }
    path.write_text(template.render(content), encoding="utf-8")


def headline(advice: Advice) -> tuple[str, str]:
    """The answer in a few words, and the sentence after it."""
    chosen = advice.chosen
    if not advice.summary.losses:
        return (
            "This run cannot say",
            "The model, reading everything, answers less than half of the questions of every kind, so there is nothing "
            "that reading less could lose. Try a model that answers them, or questions of your own.",
        )
    if chosen is None:
        lost = min((v.loss.points.value for v in advice.verdicts if v.loss is not None), default=0.0)
        if lost > advice.max_loss:
            return (
                "No, not with these settings",
                f"Every setting that reads less answers worse than {advice.baseline.name} by more than the "
                f"{advice.max_loss:g} points that were allowed.",
            )
        reason = (
            f"Nothing that keeps the quality is cheaper than {advice.baseline.name} for prompts of up to "
            f"{advice.longest:,} tokens on this machine. Longer prompts gain more."
        )
        kept = [v for v in advice.verdicts if v.is_acceptable(advice.max_loss) and v.memory is not None]
        smallest = min(kept, key=lambda v: v.memory or 1.0, default=None)
        if smallest is not None and smallest.memory is not None and smallest.memory < SMALLER:
            name, share = smallest.setting.name, percent(smallest.memory)
            reason += (
                f" Yet {name} holds {share} of the memory for each request, so a machine serves more of them at once."
            )
        return "No gain in time at these lengths", reason
    sure = chosen.is_sure(advice.max_loss)
    start = "Yes" if sure else "Probably"
    from_length = f", from prompts of {chosen.pays_from:,} tokens on" if chosen.pays_from else ""
    return f"{start}: {chosen.setting.name}{from_length}", _because(advice, chosen, sure)


def _because(advice: Advice, chosen: Verdict, sure: bool) -> str:
    assert chosen.loss is not None
    points, parts = chosen.loss.points, []
    if chosen.speedup and chosen.speedup > 1.02:
        parts.append(f"writes answers {figure(chosen.speedup)} times as fast")
    if chosen.cheaper:
        parts.append(f"takes {percent(1 / chosen.cheaper)} of the machine time per request")
    if chosen.memory:
        parts.append(f"holds {percent(chosen.memory)} of the memory")
    gains = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    more, less = f"{points.value:.1f} fewer", f"{-points.value:.1f} more"
    quality = "as many" if points.value == 0 else more if points.value > 0 else less
    end = "" if sure else " More questions would narrow that down: run with more --minutes."
    return (
        f"At {advice.longest:,} tokens {chosen.setting.name} {gains}, compared with {advice.baseline.name}. It gave "
        f"{quality} right answers per hundred (95 % interval: {points.low:+.1f} to {points.high:+.1f} lost, over "
        f"{chosen.loss.cases} questions on {chosen.loss.documents} prompts).{end}"
    )


def charts(advice: Advice) -> dict[str, Any]:
    """Every picture by name."""
    lengths, longest, findings = advice.findings.lengths, advice.longest, advice.findings
    tokens = "length of the prompt, tokens"

    def over(read: Any, scale: float) -> list[Series]:
        return [
            Series(
                s.name,
                colour,
                tuple(
                    (n, *_values(read(findings.timing(s.name, n)), scale))
                    for n in lengths
                    if read(findings.timing(s.name, n))
                ),
            )
            for s, colour in _coloured(advice)
        ]

    def per_setting(read: Any) -> list[Series]:
        return [Series(s.name, c, _single(read(s))) for s, c in _coloured(advice)]

    losses = [Series(s.name, c, _points(advice.loss(s))) for s, c in _coloured(advice)[1:]]
    return {
        "gap": lines(over(lambda t: t.gap_s, 1e3), tokens, "milliseconds per token", "time between words"),
        "together": lines(
            over(lambda t: t.together_s, 1e3), tokens, "milliseconds per token", "several answers at once"
        ),
        "first": lines(over(lambda t: t.read_s, 1.0), tokens, "seconds", "time to the first word, new prompt"),
        "again": lines(over(lambda t: t.again_s, 1.0), tokens, "seconds", "time to the first word, known prompt"),
        "loss": intervals(losses, "points lost, of 100 (fewer is better)", "quality lost", advice.max_loss),
        "memory": bars(
            per_setting(lambda s: (m := advice.memory(s, longest)) and m / MEGABYTE), "memory per request", "MB"
        ),
        "read": bars(
            per_setting(lambda s: s.costs and s.costs.bytes_read(longest) / MEGABYTE), "read per token written", "MB"
        ),
        "cost": bars(per_setting(lambda s: (c := advice.cost(s, longest)) and c.known_s), "cost, known prompts", "s"),
        "cost_fresh": bars(
            per_setting(lambda s: (c := advice.cost(s, longest)) and c.fresh_s), "cost, new prompts", "s"
        ),
    }


def _row(advice: Advice, setting: Setting, length: int) -> dict[str, Any]:
    """Every figure of one setting at one length; None where it was not measured."""
    timing, loss = advice.findings.timing(setting.name, length), advice.loss(setting, length)
    base = advice.gap_s(advice.baseline, length)
    gap = advice.gap_s(setting, length)
    return {
        "setting": setting,
        "gap": middle(timing.gap_s),
        "faster": base / gap if base and gap else None,
        "together": middle(timing.together_s),
        "batch": timing.batch,
        "read": middle(timing.read_s),
        "again": middle(timing.again_s),
        "memory": advice.memory(setting, length),
        "pages": None if setting.costs is None else setting.costs.pages_read(length),
        "bytes": None if setting.costs is None else setting.costs.bytes_read(length),
        "cost": advice.cost(setting, length),
        "score": advice.score(setting, length),
        "loss": None if loss is None else loss.points,
    }


def missed(advice: Advice) -> list[dict[str, Any]]:
    """Questions that the baseline answered and the setting with the smallest budget did not, some of them."""
    sparse = next((setting for setting in advice.settings if setting.budget is not None), None)
    if sparse is None:
        return []
    replies = {(r.arm, r.document_id, r.case_id): r for r in advice.findings.results}
    rows = []
    for (arm, document, case), full in replies.items():
        ours = replies.get((sparse.name, document, case))
        if arm == advice.baseline.name and full.score == 1.0 and ours is not None and ours.score < 1.0:
            rows.append(
                {"task": full.task, "length": full.length, "full": _short(full.reply), "ours": _short(ours.reply)}
            )
    return rows[:MISSED]


def as_json(advice: Advice, facts: RunFacts) -> dict[str, Any]:
    """All figures as plain data; the report carries them for whoever wants to compute with them."""
    return {
        "facts": asdict(facts),
        "lengths": advice.findings.lengths,
        "settings": [{"name": s.name, "budget": s.budget, "block": s.block} for s in advice.settings],
        "timings": [
            {"setting": name, "length": length, **asdict(timing)}
            for (name, length), timing in advice.findings.timings.items()
        ],
        "summary": asdict(advice.summary),
        "recommended": advice.chosen.setting.name if advice.chosen else None,
        "seconds": advice.findings.seconds,
    }


def size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "not known"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{figure(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    """A share for people."""
    return f"{value * 100:.0f} %"


def signed(value: float) -> str:
    """A difference in points."""
    return f"{value:+.1f}" if round(value, 1) else "±0"


def written(interval: Interval | None, scale: float = 1.0, unit: str = "") -> str:
    """A value with its range."""
    if interval is None:
        return "–"
    value, low, high = (figure(x * scale) for x in (interval.value, interval.low, interval.high))
    return f"{value}{unit} ({low} to {high})" if low != high else f"{value}{unit}"


def _coloured(advice: Advice) -> list[tuple[Setting, str]]:
    return [(setting, COLOURS[index % len(COLOURS)]) for index, setting in enumerate(advice.settings)]


def _values(values: list[float], scale: float) -> tuple[float, float, float]:
    found = middle(values)
    assert found is not None
    return found.value * scale, found.low * scale, found.high * scale


def _single(value: float | None) -> tuple[Point, ...]:
    return () if value is None else ((0.0, value, value, value),)


def _points(loss: Any) -> tuple[Point, ...]:
    return () if loss is None else ((0.0, loss.points.value, loss.points.low, loss.points.high),)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:89] + "…"


def problem_lines(lines_: Sequence[str]) -> tuple[str, ...]:
    """Each problem once, in order."""
    return tuple(dict.fromkeys(lines_))
