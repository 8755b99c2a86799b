"""One answer's trace as the report shows it: a map of the prompt's pages, and the text of those that mattered."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from .charts import WIDTH
from .findings import TraceFinding

LABEL, ROW, CELLS = 200, 22, 424
SHOWN_PAGES = 4
EXCERPT = 420


@dataclass(frozen=True, slots=True)
class PageText:
    """A page of the prompt. heads: share of the heads that read it while answering, at most. before, found, after: its
    text, with the answer in the middle where it stands there.
    """

    number: int
    heads: float
    attention: float
    before: str
    found: str
    after: str


@dataclass(frozen=True, slots=True)
class TraceView:
    """What the template needs. read: mean share of the pages that a head reads; kept: of its attention, if sampled."""

    finding: TraceFinding
    num_pages: int
    read: float
    kept: float | None
    untouched: int
    picture: Markup
    pages: tuple[PageText, ...]


def view(finding: TraceFinding) -> TraceView | None:
    """The view of a trace; None when no choice was recorded."""
    trace = finding.traced.trace
    choices, heads = trace["choices"], max(trace["num_heads"], 1)
    if not choices:
        return None
    num_pages = choices[0]["num_pages"]
    shares = [_shares(choice, heads, num_pages) for choice in choices]
    most = [max(column) for column in zip(*shares, strict=True)]
    attention = [0.0] * num_pages
    sampled = [choice["mass"] for choice in choices if "mass" in choice]
    for mass in sampled:
        for page, share in mass["attended"]:
            if page < num_pages:
                attention[page] += share / len(sampled)
    evidence = _evidence(finding, trace.get("pages"), num_pages)
    chosen = [page for page in range(num_pages) if 0 < min(share[page] for share in shares) < 1]
    order = sorted(chosen, key=lambda page: (-attention[page], -most[page]))[: SHOWN_PAGES - len(evidence[:2])]
    shown = sorted({*evidence[:2], *order}) if "pages" in trace else []
    kept = [mass["kept"] for mass in sampled]
    return TraceView(
        finding,
        num_pages,
        sum(map(sum, shares)) / len(shares) / max(num_pages, 1),
        sum(kept) / len(kept) if kept else None,
        sum(share == 0 for share in most),
        _picture(_labels(finding, choices), shares, evidence),
        tuple(_page(finding, trace["pages"], page, most[page], attention[page]) for page in shown),
    )


def _shares(choice: dict[str, Any], heads: int, num_pages: int) -> list[float]:
    """Per page, the share of the heads that read it."""
    shares = [1.0 if choice["everything"] else 0.0] * num_pages
    for page, count in choice.get("read", ()):
        if page < num_pages:
            shares[page] = count / heads
    return shares


def _labels(finding: TraceFinding, choices: Sequence[dict[str, Any]]) -> list[str]:
    """The words of the answer that each choice of pages was made for."""
    pieces = finding.traced.pieces
    starts = [choice["token"] for choice in choices]
    ends = [*starts[1:], len(pieces)]
    return ["".join(pieces[start:end]).strip() for start, end in zip(starts, ends, strict=True)]


def _evidence(finding: TraceFinding, pages: Sequence[Any] | None, num_pages: int) -> list[int]:
    """Pages in which the answer stands."""
    if finding.evidence is None or pages is None:
        return []
    first, last = finding.evidence
    return [i for i, spans in enumerate(pages[:num_pages]) if any(s < last and e > first for _, s, e in spans)]


def _page(finding: TraceFinding, pages: Sequence[Any], page: int, heads: float, attention: float) -> PageText:
    start, end = pages[page][0][1], pages[page][-1][2]
    text, found, after = finding.message[start:end], "", ""
    if finding.evidence is not None and start <= finding.evidence[0] < end:
        first, last = (at - start for at in finding.evidence)
        text, found, after = text[:first], text[first:last], text[last:]
        text = text[-EXCERPT:]
    text, after = (re.sub(r"\n\s*\n", "\n", part) for part in (text, after))
    return PageText(page + 1, heads, attention, text[:EXCERPT], found, after[:EXCERPT])


def _picture(labels: Sequence[str], shares: Sequence[Sequence[float]], evidence: Sequence[int]) -> Markup:
    """Rows: parts of the answer. Columns: pages of the prompt, the darker the more heads read them."""
    width, top = CELLS / max(len(shares[0]), 1), 26
    height = top + ROW * len(labels) + 26
    parts = []
    for row, (label, columns) in enumerate(zip(labels, shares, strict=True)):
        y = top + ROW * row
        text = label if len(label) <= 29 else label[:28] + "…"
        parts.append(f'<text x="{LABEL - 10}" y="{y + 14}" text-anchor="end">{escape(text)}</text>')
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{CELLS}" height="{ROW - 4}" fill="#f3f4f6"/>')
        for page, share in enumerate(columns):
            if share:
                x = LABEL + width * page
                parts.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.6):.2f}" height="{ROW - 4}" fill="#1d4ed8" '
                    f'opacity="{0.12 + 0.88 * share:.2f}"/>'
                )
    bottom = top + ROW * len(labels)
    for page in evidence[:1]:
        x = LABEL + width * (page + 0.5)
        parts.append(f'<path d="M{x - 6:.1f} {top - 14}h12l-6 10z" fill="#dc2626"/>')
        parts.append(f'<path d="M{x:.1f} {top - 4}V{bottom}" stroke="#dc2626" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{LABEL}" y="{bottom + 14}">start of the prompt</text>')
    parts.append(f'<text x="{LABEL + CELLS}" y="{bottom + 14}" text-anchor="end">end of the prompt</text>')
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="pages of the prompt that the answer read">'
    return Markup(head + "".join(parts) + "</svg>")
