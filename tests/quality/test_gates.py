"""Gates: what they accept, and what they hold against."""

import pytest

from lserve.engine.errors import SettingsError
from lserve.quality.gates import parse_gate
from lserve.quality.statistics import Interval
from lserve.quality.suite import Result
from lserve.quality.summary import TextRow, summarize


def results(found: dict[str, int], task: str = "words", cases: int = 20) -> list[Result]:
    """`found` of 20 cases right for each arm, in two documents."""
    return [
        Result(arm, task, 1000, f"d{i % 2}", f"{task}-{i}", 0.5, float(i < right), "reply")
        for arm, right in found.items()
        for i in range(cases)
    ]


def test_gates_judge_the_arm_under_test() -> None:
    text = (TextRow("dense", 0.7, 0.7, 0, 0, 1.0), TextRow("sparse", 0.707, 0.714, 0.01, 0.02, 0.95))
    summary = summarize(("dense", "sparse", "other"), results({"dense": 20, "sparse": 18, "other": 0}), text)
    held = {
        gate: parse_gate(gate).judge(summary).passed
        for gate in (
            "loss<=10", "loss<=9.9", "loss.high>=10", "recall>=0.9", "recall>=0.91", "bpc<=1%", "bpc <= 0.99",
            "bpc_decode<=2", "agreement>=0.95", "cases>=20", "same_reply>=1",
        )
    }  # fmt: skip
    assert [gate for gate, passed in held.items() if not passed] == ["loss<=9.9", "recall>=0.91", "bpc <= 0.99"]


def test_what_dense_does_not_find_is_reported_and_not_compared() -> None:
    rows = results({"dense": 20, "sparse": 20}) + results({"dense": 9, "sparse": 0}, "quote")
    summary = summarize(("dense", "sparse"), rows)
    assert [(row.task, row.pooled, row.recall[0].value) for row in summary.tasks] == [
        ("words", True, 1.0),
        ("quote", False, 0.45),
    ]
    assert [(loss.cases, loss.points.value) for loss in summary.losses] == [(20, 0.0)]


def test_nothing_to_judge_is_a_failure() -> None:
    summary = summarize(("dense", "sparse"), results({"dense": 0, "sparse": 0}))
    verdict = parse_gate("loss<=2").judge(summary)
    assert (verdict.value, verdict.passed) == (None, False)


@pytest.mark.parametrize("gate", ["loss", "loss<2", "loss<=", "loss<=two", "<=2", "speed<=2"])
def test_a_gate_that_makes_no_sense_is_refused_in_one_line(gate: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse_gate(gate)
    assert repr(gate) in error.value.message and "\n" not in error.value.message


def test_an_interval_can_be_told_in_points() -> None:
    assert Interval(0.01, -0.02, 0.03).scaled(100) == Interval(1.0, -2.0, 3.0)
