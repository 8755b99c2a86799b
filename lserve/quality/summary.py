"""From results to figures: recall per task and length, the loss against dense, and what gates are judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import Interval, paired_difference, share
from .suite import COMPARED_FROM, Result


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task at one length. recall: per arm, in the order of the arms. pooled: whether it counts for the loss."""

    task: str
    length: int
    cases: int
    recall: tuple[Interval, ...]
    pooled: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """The baseline's mean score less an arm's, in points (hundredths), over the pooled tasks. length None: of all."""

    arm: str
    length: int | None
    cases: int
    documents: int
    points: Interval
    same_reply: float


@dataclass(frozen=True, slots=True)
class TextRow:
    """Bits per character of one arm, and how often its most likely token is the baseline's (when decoding)."""

    arm: str
    prompt: float
    decode: float
    prompt_rise: float
    decode_rise: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that a run found. arms: the first one is the baseline, the second the one under test."""

    arms: tuple[str, ...]
    tasks: tuple[TaskRow, ...]
    losses: tuple[Loss, ...]
    text: tuple[TextRow, ...] = ()
    num_errors: int = 0


def summarize(arms: Sequence[str], results: Sequence[Result], text: Sequence[TextRow] = ()) -> Summary:
    """The figures of a run. results: the same cases for every arm."""
    scores = {(r.arm, r.length, r.document_id, r.case_id): r for r in results}
    cells = list(dict.fromkeys((r.task, r.length) for r in results))
    rows = []
    for task, length in sorted(cells, key=lambda cell: (cell[1], [c[0] for c in cells].index(cell[0]))):
        of_cell = [r for r in results if (r.task, r.length) == (task, length)]
        recall = tuple(share([r.score for r in of_cell if r.arm == arm]) for arm in arms)
        rows.append(TaskRow(task, length, len(of_cell) // len(arms), recall, recall[0].value >= COMPARED_FROM))
    pooled = {(row.task, row.length) for row in rows if row.pooled}
    lengths = sorted({row.length for row in rows})
    losses = []
    for arm in arms[1:]:
        for chosen in [None] if len(lengths) < 2 else [*lengths, None]:
            base = [
                r for r in results if r.arm == arms[0] and (r.task, r.length) in pooled and chosen in (None, r.length)
            ]
            if base:
                losses.append(_loss(arm, chosen, base, [scores[arm, r.length, r.document_id, r.case_id] for r in base]))
    errors = sum(r.error is not None for r in results)
    return Summary(tuple(arms), tuple(rows), tuple(losses), tuple(text), errors)


def _loss(arm: str, length: int | None, base: Sequence[Result], ours: Sequence[Result]) -> Loss:
    differences = [b.score - o.score for b, o in zip(base, ours, strict=True)]
    documents = [b.document_id for b in base]
    same = sum(b.reply == o.reply for b, o in zip(base, ours, strict=True)) / len(base)
    points = paired_difference(differences, documents).scaled(100)
    return Loss(arm, length, len(base), len(set(documents)), points, same)
