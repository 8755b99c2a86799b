"""The gate measures whole profiles and finds the largest that passes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_engines import tokens

from lserve.engine.model import Model
from lserve.engine.profile_gate import FactDocument, Gate, Measurement, Question, largest_passing, with_more, within
from lserve.engine.whole_sequence import Reach, WholeSequence

REACH = Reach(64, 128)
TEXTS = (tokens(700, 1), tokens(300, 2))
DENSE, ALL = ((False, False),) * 3, ((True, True),) * 3


def greedy(model: Model, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    answer: tuple[int, ...] = ()
    for _ in range(count):
        ids = torch.tensor(prompt + answer)
        hidden = model.forward(ids, torch.arange(len(ids)), WholeSequence(DENSE, REACH, 0.25))
        answer += (int(model.logits(hidden[-1:]).argmax()),)
    return answer


def test_dense_loses_nothing_and_streaming_does(tiny: tuple[Model, Any]) -> None:
    model, question = tiny[0], tokens(9, 4)
    answer = greedy(model, TEXTS[0] + question, 3)
    wrong = (*answer[:2], (answer[2] + 1) % 512)
    documents = [
        FactDocument(TEXTS[0], (Question(question, answer), Question(question, wrong))),
        FactDocument(TEXTS[1], (Question(question, wrong),)),
    ]
    gate = Gate(model, documents, REACH)
    dense, streaming = gate.measure(DENSE), gate.measure(ALL)
    assert (dense.num_streaming, dense.loss_rise, dense.right, dense.asked) == (0, 0.0, 1, 3)
    assert (dense.lost, dense.gained, dense.answer_divergence) == (0, 0, 0.0)
    assert streaming.answer_divergence > 0
    assert streaming.num_streaming == 6
    assert streaming.right == dense.right - streaming.lost + streaming.gained
    losses = []
    for text in TEXTS:
        ids = torch.tensor(text)
        for flags in (DENSE, ALL):
            hidden = model.forward(ids, torch.arange(len(ids)), WholeSequence(flags, REACH, 0.25))[191:-1]
            losses.append(torch.nn.functional.cross_entropy(model.logits(hidden), ids[192:], reduction="sum").item())
    rise = (losses[1] + losses[3]) / (losses[0] + losses[2]) - 1
    assert streaming.loss_rise == pytest.approx(rise, abs=1e-6)
    assert streaming.standard_error > 0


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n + 1))))
def test_the_search_finds_the_largest_that_passes(case: tuple[int, int, int]) -> None:
    num_heads, limit, guess = case
    asked: list[int] = []

    def passes(count: int) -> bool:
        asked.append(count)
        return count <= limit

    assert largest_passing(num_heads, guess, passes) == limit
    assert len(set(asked)) == len(asked) <= 14
    assert all(1 <= count <= num_heads for count in asked)


def test_a_good_guess_takes_few_measurements() -> None:
    asked: list[int] = []
    assert largest_passing(90, 33, lambda count: (asked.append(count), count <= 29)[1]) == 29
    assert asked == [33, 26, 29, 31, 30]


@pytest.mark.parametrize(
    ("loss_rise", "lost", "gained", "max_loss", "passes"),
    [
        (0.003, 0, 0, 0.003, True),
        (0.0031, 0, 0, 0.003, False),
        (0.001, 4, 0, 0.003, True),  # answers near the edge
        (0.001, 5, 0, 0.003, False),
        (0.001, 9, 3, 0.003, True),
        (0.001, 10, 2, 0.003, False),
        (0.001, 6, 0, 0.1, True),  # a tenth of 24 is allowed
    ],
)
def test_loss_and_recall_must_both_hold(
    loss_rise: float, lost: int, gained: int, max_loss: float, passes: bool
) -> None:
    measured = Measurement(30, loss_rise, 0.0, 20 - lost + gained, 24, lost, gained, 1.0, 0.0)
    assert within(measured, max_loss) == passes
    assert not within(replace(measured, answer_divergence=0.02), max_loss)


def test_heads_behind_one_that_fails_are_tried_beside_those_that_passed() -> None:
    asked: list[list[int]] = []

    def passes(heads: list[int]) -> bool:
        asked.append(heads)
        return sum(heads) <= 10

    assert with_more([1, 2], [9, 3, 5, 4], passes) == [1, 2, 3, 4]
    assert asked == [[1, 2, 9], [1, 2, 3], [1, 2, 3, 5], [1, 2, 3, 4]]
