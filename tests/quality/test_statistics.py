"""Intervals: what must hold for any scores, and that they cover the truth as often as they say."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.quality.statistics import paired_difference, share

scores = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=60)
pairs = st.lists(st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=60)


@given(scores)
def test_a_share_lies_in_its_interval_and_between_0_and_1(values: list[float]) -> None:
    interval = share(values)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high


@given(scores)
def test_what_was_not_found_has_the_mirrored_share(values: list[float]) -> None:
    ours, theirs = share(values), share([1 - value for value in values])
    assert ours.value == pytest.approx(1 - theirs.value)
    assert ours.low == pytest.approx(1 - theirs.high)


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_a_difference_lies_in_its_interval(values: list[tuple[float, int]]) -> None:
    differences, clusters = [d for d, _ in values], [c for _, c in values]
    interval = paired_difference(differences, clusters, resamples=300)
    assert interval.value == pytest.approx(sum(differences) / len(differences))
    assert -1 <= interval.low <= interval.value <= interval.high <= 1
    assert interval == paired_difference(differences, clusters, resamples=300), "the same draw every time"


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_swapping_the_sides_turns_the_sign(values: list[tuple[float, int]]) -> None:
    differences, clusters = [d for d, _ in values], [c for _, c in values]
    interval = paired_difference(differences, clusters, resamples=300)
    swapped = paired_difference([-d for d in differences], clusters, resamples=300)
    assert swapped.value == pytest.approx(-interval.value)
    assert swapped.low == pytest.approx(-interval.high)


def test_no_difference_is_no_certainty() -> None:
    few, many = paired_difference([0.0] * 10, range(10)), paired_difference([0.0] * 400, range(400))
    assert few.value == many.value == 0.0
    assert few.high > 0.25
    assert 0 < many.high < 0.01


def test_questions_of_one_document_are_not_independent() -> None:
    differences = [1.0] * 10 + [0.0] * 90
    together = paired_difference(differences, [i // 10 for i in range(100)])
    apart = paired_difference(differences, range(100))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = random.Random(1), 0
    for _ in range(150):
        differences, clusters = [], []
        for document in range(20):
            hardness = draw.choice((0.0, 0.1, 0.2))  # 0.1 on average
            for _ in range(10):
                differences.append(float(draw.random() < hardness))
                clusters.append(document)
        interval = paired_difference(differences, clusters, resamples=400)
        covered += interval.low <= 0.1 <= interval.high
    assert covered / 150 > 0.88


@pytest.mark.parametrize("call", [lambda: share([]), lambda: paired_difference([], [])])
def test_nothing_has_no_value(call: object) -> None:
    with pytest.raises(ValueError, match="nothing"):
        call()  # type: ignore[operator]
