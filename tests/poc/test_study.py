"""The study's plan, and what is concluded from it: with settings that answer out of the document."""

import itertools
from collections.abc import Iterator

import pytest
from poc_documents import prose
from stub_settings import stub_settings

from lserve.poc import study as study_module
from lserve.poc.advice import Advice
from lserve.poc.findings import doubling
from lserve.poc.questions import TASK, Places, Question
from lserve.poc.readers import SourceDocument
from lserve.poc.report import headline
from lserve.poc.settings import Setting
from lserve.poc.study import MIN_ROUNDS, Study


class Clock:
    """Stands in for the `time` module: each look at it takes some seconds."""

    def __init__(self, step_s: float) -> None:
        self._ticks: Iterator[float] = (step_s * n for n in itertools.count())
        self.late_s = 0.0

    def monotonic(self) -> float:
        return next(self._ticks) + self.late_s


def places() -> Places:
    text = prose("Oslo", 200) + "\n\nThe mayor of Bergen is called Solveig.\n\n" + prose("Lisbon", 200)
    return Places([SourceDocument("a.txt", "text", text)])


def study(
    monkeypatch: pytest.MonkeyPatch,
    settings: list[Setting],
    minutes: float = 5.0,
    step_s: float = 0.5,
    questions: tuple[Question, ...] = (),
    limit: int = 4_000,
) -> tuple[Study, list[str]]:
    told: list[str] = []
    monkeypatch.setattr(study_module, "time", Clock(step_s))
    made = Study(lambda length: settings, limit, places(), questions, minutes, told.append, lambda doing, seconds: None)
    return made, told


def test_it_fills_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = study(monkeypatch, stub_settings())
    findings = made.run()
    assert findings.lengths == [1_000, 2_000, 4_000] and told == []
    assert 4 * 60 < findings.seconds <= 5 * 60 + 5
    documents = {(r.length, r.document_id) for r in findings.results}
    assert all(sum(length == n for n, _ in documents) >= 1 + MIN_ROUNDS for length in findings.lengths)
    cases = {(r.arm, r.document_id, r.case_id) for r in findings.results}
    assert len(cases) == len(findings.results), "nobody is asked twice"
    for setting in made.settings[1:]:
        assert {(d, c) for arm, d, c in cases if arm == setting.name} == {
            (d, c) for arm, d, c in cases if arm == "Full"
        }


def test_prompts_stay_shorter_where_long_ones_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = study(monkeypatch, stub_settings(), minutes=0.8)
    findings = made.run()
    longest = findings.lengths[-1]
    assert longest < 4_000 and findings.seconds <= 53
    words = f"prompts of {2 * longest:,} tokens would take longer than 0.8 minutes: the longest have {longest:,}"
    assert told == [words]


def test_a_kind_of_question_that_nobody_can_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = study(monkeypatch, stub_settings())
    findings = made.run()
    assert findings.dropped == ["position"]
    asked = [r.task for r in findings.results]
    assert 0 < asked.count("position") < asked.count("people")


def test_own_questions_are_put_to_where_the_answer_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("Who is the mayor of Bergen?", "Solveig")
    made, _ = study(monkeypatch, stub_settings(), questions=(question,))
    findings = made.run()
    own = [r for r in findings.results if r.task == TASK]
    assert {r.arm for r in own} == {"Full", "Sparse 512", "Sparse 1,024"} and {r.length for r in own} >= {4_000}
    assert all(r.score == 1.0 for r in own)


def test_a_setting_that_cannot_read_ends_a_document_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = study(monkeypatch, stub_settings(fails="too long"), minutes=0.8)
    findings = made.run()
    assert findings.results == []
    assert any(line.endswith("is left out: too long") for line in told)


def test_the_cheapest_setting_that_keeps_the_quality_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = study(monkeypatch, stub_settings())
    advice = Advice(made.settings, made.run(), max_loss=2.0, answer_tokens=100)
    assert advice.chosen is not None and advice.chosen.setting.name == "Sparse 512"
    assert advice.chosen.speedup == pytest.approx(2.5) and advice.chosen.pays_from == 1_000
    title, reason = headline(advice)
    assert title.endswith("Sparse 512, from prompts of 1,000 tokens on")
    assert "writes answers 2.50 times as fast" in reason and "as many right answers" in reason


def test_one_that_loses_too_much_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = study(monkeypatch, stub_settings(forgets=4))
    advice = Advice(made.settings, made.run(), max_loss=2.0, answer_tokens=100)
    small = advice.verdicts[0]
    assert small.loss is not None and 15 < small.loss.points.value < 35
    assert advice.chosen is not None and advice.chosen.setting.name == "Sparse 1,024"
    strict = Advice(made.settings[:2], made.findings, max_loss=2.0, answer_tokens=100)
    assert strict.chosen is None and headline(strict)[0] == "No, not with these settings"


def test_cost_is_reading_and_a_share_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = study(monkeypatch, stub_settings())
    findings = made.run()
    advice = Advice(made.settings, findings, 2.0, answer_tokens=100)
    doubled = Advice(made.settings, findings, 2.0, answer_tokens=100, machines=2)
    full = made.settings[0]
    cost, timing = advice.cost(full, 4_000), findings.timing("Full", 4_000)
    assert cost is not None
    together = advice.gap_s(full, 4_000, together=True)
    assert together is not None
    assert cost.known_s == pytest.approx(1000 * (0.05 + 100 * together / timing.batch))
    assert cost.fresh_s - cost.known_s == pytest.approx(1000 * (0.4 - 0.05))
    assert doubled.cost(full, 4_000).known_s == pytest.approx(2 * cost.known_s)  # type: ignore[union-attr]


def test_a_document_that_takes_too_long_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stub_settings()
    made, told = study(monkeypatch, settings)
    original = settings[1].asker.ask
    calls = iter(range(100))

    def slow(document, cases):  # type: ignore[no-untyped-def]
        if next(calls) == 5:
            study_module.time.late_s = 1e4  # type: ignore[attr-defined]
        return original(document, cases)

    monkeypatch.setattr(settings[1].asker, "ask", slow)
    findings = made.run()
    assert told == ["the last document took longer than expected and is left out"]
    assert len({r.document_id for r in findings.results}) == 5
    assert {r.arm for r in findings.results} == {setting.name for setting in settings}


def test_other_budgets_for_shorter_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked with the budgets of the longest prompts is left out, and the run goes on with the others."""
    made, _ = study(monkeypatch, stub_settings())
    made._make_settings = lambda length: stub_settings()[:2]
    findings = made.run()
    assert [setting.name for setting in made.settings] == ["Full", "Sparse 512"]
    assert {r.arm for r in findings.results} == {"Full", "Sparse 512"}
    assert {name for name, _ in findings.timings} == {"Full", "Sparse 512"}


def test_an_interrupt_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = stub_settings()
    made, _ = study(monkeypatch, settings)
    original = settings[0].asker.ask
    calls = iter(range(100))

    def interrupted(document, cases):  # type: ignore[no-untyped-def]
        if next(calls) == 6:
            raise KeyboardInterrupt
        return original(document, cases)

    monkeypatch.setattr(settings[0].asker, "ask", interrupted)
    findings = made.run()
    assert findings.interrupted and len({r.document_id for r in findings.results}) == 6


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (8_000, [1_000, 2_000, 4_000, 8_000]),
        (1_000, [1_000]),
        (300, [300]),
        (131_000, [16_000, 32_000, 65_000, 130_000]),
    ],
)
def test_lengths_double(limit: int, expected: list[int]) -> None:
    assert doubling(limit) == expected
