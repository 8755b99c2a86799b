"""Runs the comparison: measures first how long things take, plans by it, and stops when the time is up."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from lserve.engine.errors import LServeError
from lserve.quality.asker import Asker
from lserve.quality.cases import Case, Document, score
from lserve.quality.registry import TASKS
from lserve.quality.suite import Result
from lserve.quality.tasks import Plan, build_document, mixed

from .findings import Findings, TraceFinding, doubling
from .position import position
from .questions import TASK, Places, Question, question_documents
from .readers import Tell
from .settings import Setting

PLANS: dict[str, Plan] = {
    "one fact": mixed,
    "one of several like facts": TASKS["multi-key words"],
    "people": TASKS["people"],
    "extraction": TASKS["quote"],
    "position": position,
}
"""What is asked of every document, by the names of the report."""

NAMES = {"single": "one fact", "multi-key words": "one of several like facts", "quote": "extraction"}
QUESTIONS = 2
"""Of each task in a document."""

MIN_ROUNDS = 3
"""Further documents of each of the longest lengths that must fit in the time, or the prompts stay shorter."""

DROP_FROM, DROP_BELOW = 6, 0.2
TIMED_DOCUMENTS, TIMED_TOGETHER = 4, 2
ALONE_TOKENS, TOGETHER_TOKENS, TOGETHER_LAST, BATCH = 33, 21, 16, 4
TRACED_TOKENS = 24
OWN_QUESTIONS_SHARE = 0.4
SUMMARY = "Summarise the text in a few sentences."


class TimeUpError(Exception):
    """The time is up in the middle of a document, which then does not count."""


class Say(Protocol):
    """Told what goes on."""

    def __call__(self, doing: str, seconds: float) -> None:
        """doing: in a few words. seconds: since the start."""


class Study:
    """One run. make_settings: token budgets' longest prompt to the settings to compare, the baseline first."""

    def __init__(
        self,
        make_settings: Callable[[int], list[Setting]],
        limit: int,
        places: Places,
        questions: Sequence[Question],
        minutes: float,
        tell: Tell,
        say: Say,
        seed: int = 0,
    ) -> None:
        self._make_settings, self._limit, self._places, self._questions = make_settings, limit, places, questions
        self._tell, self._say, self._seed = tell, say, seed
        self._total_s, self._started = minutes * 60, time.monotonic()
        self._costs_s: dict[int, float] = {}
        self._plans = dict(PLANS)
        self._count = 0
        self._told: set[str] = set()
        self.settings = make_settings(limit)
        self.findings = Findings()

    def run(self) -> Findings:
        """Everything that fits in the time. An interrupt ends it early; what was found by then is returned."""
        try:
            self._warm_up()
            self._pilot()
            self._own_questions()
            self._rounds()
        except TimeUpError:
            self._tell("the last document took longer than expected and is left out")
        except KeyboardInterrupt:
            self.findings.interrupted = True
        finally:
            _close(self.settings)
        self.findings.seconds = self._elapsed()
        return self.findings

    def _warm_up(self) -> None:
        """The first answer of an engine compiles kernels and touches memory: nobody should be timed on it."""
        for setting in self.settings:
            self._now(f"{setting.name}: warming up")
            try:
                setting.probe.time(self._places.text[:1000], 5, BATCH)
            except LServeError as error:
                self._tell_once(f"{setting.name}: {error.message}")

    def _pilot(self) -> None:
        """One document of each length, shortest first, as long as there will be time for more of them."""
        done = self.findings.lengths
        for length in doubling(self._limit):
            if done:
                last = [self._costs_s[one] for one in done[-2:]]
                growth = min(max(1.15 * last[-1] / last[0], 2.0), 4.0) if len(last) > 1 else 2.5
                needed = last[-1] * growth + MIN_ROUNDS * (last[-1] * growth + sum(last))
                if self._elapsed() + needed > self._total_s:
                    words = f"prompts of {length:,} tokens would take longer than {self._total_s / 60:g} minutes"
                    self._tell(f"{words}: the longest have {done[-1]:,}")
                    break
            self._one(length)
            done.append(length)
        settings = self._make_settings(done[-1])
        same = [setting.name for setting in settings] == [setting.name for setting in self.settings]
        if same or self._elapsed() + 1.1 * self._costs_s[done[-1]] > self._total_s:
            _close(settings)
            return
        _close(self.settings)
        names = {setting.name for setting in settings}
        self.settings = settings  # other budgets suit shorter prompts: what was asked of the first ones is left out
        self.findings.results, self.findings.trace = [], None
        for key in [key for key in self.findings.timings if key[0] not in names]:
            del self.findings.timings[key]

    def _rounds(self) -> None:
        while self._plans:
            for length in self.findings.lengths:
                if self._elapsed() + 1.1 * self._costs_s[length] > self._total_s:
                    return
                self._one(length)
            self._drop_tasks()

    def _one(self, length: int) -> None:
        """One document of planted facts."""
        started = self._elapsed()
        plans, number = list(self._plans.values()), self._count
        self._count += 1
        name = f"{self._seed}.{number}.{length}"
        # golden-ratio steps: any number of passages is spread evenly over the documents
        place = int((number * 0.6180339887 % 1) * 10_000), 10_000
        document = build_document(name, length, plans, QUESTIONS, self._places.text, place, self.settings[0].asker)
        self._ask(document, timed=True)
        self._costs_s[length] = self._elapsed() - started

    def _own_questions(self) -> None:
        """The user's questions, at the greatest length first, for a part of the time that is left."""
        if not self._questions:
            return
        until = self._elapsed() + (self._total_s - self._elapsed()) * OWN_QUESTIONS_SHARE
        for length in reversed(self.findings.lengths):
            documents = question_documents(self._questions, self._places, length, self.settings[0].asker)
            for number, document in enumerate(documents):
                if self._elapsed() + self._costs_s[length] > until and length != self.findings.lengths[-1]:
                    return
                if self._elapsed() + self._costs_s[length] > self._total_s:
                    self._tell(f"{len(documents) - number} groups of your questions found no time: give more --minutes")
                    return
                self._ask(document, timed=False)

    def _ask(self, document: Document, timed: bool) -> None:
        """A document and its questions, with every setting."""
        rows: list[Result] = []
        readings: set[str] = set()
        timings, length = self.findings.timings, document.length
        for setting in self.settings:
            self._now(f"{length:,} tokens, {setting.name}: reading")
            primed = setting.asker.prime(document)
            if primed.error is not None:
                self._tell_once(f"{setting.name}: a document of {length:,} tokens is left out: {primed.error}")
                return
            if setting.reading not in readings:
                readings.add(setting.reading)
                for other in self.settings:
                    if other.reading == setting.reading:
                        timings[other.name, length].read_s.append(primed.ttft_s)
            self._now(f"{length:,} tokens, {setting.name}: {len(document.cases)} questions")
            for case, reply in zip(document.cases, setting.asker.ask(document, document.cases), strict=True):
                if reply.error is not None:
                    self._tell_once(f"{setting.name}: a question counts as wrong: {reply.error}")
                points = 0.0 if reply.error is not None else score(case, reply.text)
                task = NAMES.get(case.task, case.task)
                place = setting.name, task, length, document.document_id, case.case_id, case.depth
                rows.append(Result(*place, points, reply.text, reply.error))
            if timed:
                self._time(setting, document)
        self.findings.results += rows
        self._trace(document, rows)
        for setting in self.settings:
            _forget(setting.asker)

    def _time(self, setting: Setting, document: Document) -> None:
        timing = self.findings.timings[setting.name, document.length]
        message = document.prompt(SUMMARY)
        try:
            if len(timing.gap_s) < TIMED_DOCUMENTS:
                self._now(f"{document.length:,} tokens, {setting.name}: timing")
                alone = setting.probe.time(message, ALONE_TOKENS, 1)[0]
                timing.again_s.append(alone.ttft_s)
                timing.gap_s.append(sum(alone.gaps_s) / len(alone.gaps_s))
            if len(timing.together_s) < TIMED_TOGETHER:
                answers = setting.probe.time(message, TOGETHER_TOKENS, BATCH)
                gaps = [gap for answer in answers for gap in answer.gaps_s[-TOGETHER_LAST:]]
                timing.together_s.append(sum(gaps) / len(gaps))
                timing.batch = BATCH
        except (LServeError, ZeroDivisionError) as error:
            self._tell_once(f"{setting.name}: not timed at {document.length:,} tokens: {error}")

    def _trace(self, document: Document, rows: Sequence[Result]) -> None:
        """Keeps the trace of one answer that is right sparsely, over the longest prompt there is."""
        sparse = [setting for setting in self.settings if setting.budget is not None]
        best = self.findings.trace
        if not sparse or (best is not None and best.length >= document.length):
            return
        setting = sparse[0]
        right = {(row.arm, row.case_id) for row in rows if row.score == 1.0}
        wanted = [c for c in document.cases if (setting.name, c.case_id) in right and _can_be_shown(c, document)]
        wanted.sort(key=lambda case: (case.task not in ("single", TASK), abs((case.depth or 0.0) - 0.4)))
        if not wanted:
            return
        case, message = wanted[0], document.prompt(wanted[0].question)
        try:
            traced = setting.probe.trace(message, TRACED_TOKENS)
        except LServeError as error:
            self._tell_once(f"{setting.name}: no trace: {error}")
            return
        at = document.text.casefold().find(case.answers[0].casefold())
        evidence = (at, at + len(case.answers[0])) if at >= 0 else None
        self.findings.trace = TraceFinding(
            setting.name, document.length, case.question, case.answers[0], message, evidence, traced
        )

    def _drop_tasks(self) -> None:
        """Stops asking what even the baseline cannot answer: it tells nothing about the other settings."""
        for name in list(self._plans):
            scores = [r.score for r in self.findings.results if (r.arm, r.task) == (self.settings[0].name, name)]
            if len(scores) >= DROP_FROM and sum(scores) / len(scores) < DROP_BELOW:
                del self._plans[name]
                self.findings.dropped.append(name)

    def _now(self, doing: str) -> None:
        """Before each piece of work: says so, or ends the run when the time is up and there is something to report."""
        self._say(doing, self._elapsed())
        if self.findings.results and self._elapsed() > self._total_s:
            raise TimeUpError

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._tell(text)


def _can_be_shown(case: Case, document: Document) -> bool:
    return len(case.answers) == 1 and case.answers[0].casefold() in document.text.casefold()


def _close(settings: Sequence[Setting]) -> None:
    for setting in settings:
        setting.close()


def _forget(asker: Asker) -> None:
    """Gives back the pages of a document that is done with, in this process; an endpoint looks after itself."""
    from lserve.quality.engine_asker import EngineAsker

    if isinstance(asker, EngineAsker):
        asker.close()
