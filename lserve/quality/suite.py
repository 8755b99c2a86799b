"""Runs documents x askers, so that it can be interrupted and taken up again. No torch."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lserve.engine.errors import SettingsError

from .asker import Asker
from .cases import Document, score
from .registry import TASKS
from .statistics import share
from .tasks import build_document

Tell = Callable[[str], None]

COMPARED_FROM = 0.5
"""Tasks count towards the loss where the baseline scores at least this: below, it is luck that is compared."""

ENOUGH_CASES, MANY_CASES = 10, 30
"""After so many cases a task may be given up whose baseline is clearly below that, or just below it."""


@dataclass(frozen=True, slots=True)
class Design:
    """What is asked.

    layouts: names of tasks that share documents; every layout gets `documents` documents of each length, with
    `questions` questions of each of its tasks.
    """

    lengths: tuple[int, ...]
    layouts: tuple[tuple[str, ...], ...]
    documents: int = 10
    questions: int = 10
    seed: int = 0

    @property
    def num_documents(self) -> int:
        """Documents in all."""
        return len(self.lengths) * len(self.layouts) * self.documents

    def document_ids(self) -> Iterator[tuple[str, int, int, int]]:
        """(document id, length, layout, number), those of one number together, so that a part is a fair sample."""
        for number in range(self.documents):
            for length in self.lengths:
                for layout in range(len(self.layouts)):
                    yield f"{self.seed}.{layout}.{number}.{length}", length, layout, number


@dataclass(frozen=True, slots=True)
class Result:
    """How one case went for one asker."""

    arm: str
    task: str
    length: int
    document_id: str
    case_id: str
    depth: float | None
    score: float
    reply: str
    error: str | None = None


class State:
    """What has been done, in a file of JSON lines: the run's identity first, then one line a piece of work.

    Without a path nothing is kept. Raises SettingsError when the file belongs to another run, naming what differs.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._done, self._started = path, dict[str, Any](), time.monotonic()
        self.seconds = 0.0
        """What all work has taken so far, that of earlier runs included."""
        if path is None:
            return
        identity = json.loads(json.dumps(identity))
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
            before, *lines = [json.loads(line) for line in whole.splitlines()] or [identity]
            for key, value, seconds in lines:
                self._done[key] = value
                self.seconds += seconds
            if whole != text or not text:
                path.write_text(whole or json.dumps(identity) + "\n", encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"cannot use {path} to keep the state: {error.strerror}") from None
        except (ValueError, TypeError):
            raise SettingsError(f"{path} is not a state file of lserve eval, or is damaged: remove it") from None
        for name in identity.keys() | before.keys():
            if identity.get(name) != before.get(name):
                was, now = before.get(name), identity.get(name)
                raise SettingsError(f"{path} belongs to another run: {name} was {was!r}, is {now!r}; remove it")

    def get(self, key: str) -> Any:
        """What the piece of work gave; None when it was not done."""
        return self._done.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps what a piece of work gave, and the time since the last one."""
        self._done[key] = value
        now = time.monotonic()
        seconds, self._started = round(now - self._started, 3), now
        self.seconds += seconds
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value, seconds]) + "\n")


def run_suite(
    design: Design, askers: Sequence[Asker], source: str, state: State, tell: Tell, done: Callable[[], None]
) -> list[Result]:
    """Asks every case of every asker. done is called after each asker's share of a document, tell gets warnings.

    A document that an asker cannot read (too long, say) is left out for all of them, with a warning. The first asker is
    the baseline: where it finds less than half of a task, clearly after ENOUGH_CASES or at all after MANY_CASES, that
    task is not asked further.
    """
    results: list[Result] = []
    for document_id, length, layout, number in design.document_ids():
        tasks = [task for task in design.layouts[layout] if not _is_hopeless(results, askers[0].name, task, length)]
        rows: dict[str, Any] = {asker.name: state.get(f"{document_id}/{asker.name}") for asker in askers}
        document: Document | None = None
        for asker in askers:
            if rows[asker.name] is None:
                if document is None and tasks:
                    plans = [TASKS[task] for task in design.layouts[layout]]
                    place = number * len(design.layouts) + layout, design.documents * len(design.layouts)
                    document = build_document(document_id, length, plans, design.questions, source, place, askers[0])
                    document = replace(document, cases=tuple(case for case in document.cases if case.task in tasks))
                rows[asker.name] = [] if document is None else _ask(asker, document, tell)
                state.put(f"{document_id}/{asker.name}", rows[asker.name])
            done()
        if all(rows.values()):
            results += [Result(**row) for part in rows.values() for row in part]
    return results


def _is_hopeless(results: Sequence[Result], baseline: str, task: str, length: int) -> bool:
    """Whether the baseline finds less than half: then the task is not compared, and asking on is a waste."""
    scores = [r.score for r in results if (r.arm, r.task, r.length) == (baseline, task, length)]
    if len(scores) < ENOUGH_CASES:
        return False
    found = share(scores)
    return (found.value if len(scores) >= MANY_CASES else found.high) < COMPARED_FROM


def _ask(asker: Asker, document: Document, tell: Tell) -> list[dict[str, Any]]:
    primed = asker.prime(document)
    if primed.error is not None:
        tell(f"{asker.name}: a document of {document.length} tokens is left out: {primed.error}")
        return []
    rows = []
    for case, reply in zip(document.cases, asker.ask(document, document.cases), strict=True):
        if reply.error is not None:
            tell(f"{asker.name}: a question counts as wrong: {reply.error}")
        points = 0.0 if reply.error is not None else score(case, reply.text)
        place = asker.name, case.task, document.length, document.document_id, case.case_id, case.depth
        rows.append(asdict(Result(*place, points, reply.text, reply.error)))
    return rows
