import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve.engine.residency import Residency, last_resume_point, resume_points

LENGTHS = st.integers(0, 5000)
RULES = st.builds(Residency, st.integers(1, 4).map(lambda n: n * 64), st.integers(1, 8).map(lambda n: n * 64))


def tokens_read(rules: Residency, position: int) -> set[int]:
    """DESIGN.md section 4, word for word."""
    return {i for i in range(position + 1) if i < rules.sink_size or position - i < rules.local_window}


def full_pages(tokens: set[int], length: int) -> set[int]:
    return {token // 64 for token in tokens if token < length // 64 * 64}


@pytest.mark.parametrize(
    ("prompt_length", "points"),
    [
        (0, []),
        (1, []),
        (128, []),
        (129, [128]),
        (1024, [896]),
        (1025, [1024]),
        (1152, [1024]),
        (1153, [1024, 1152]),
        (2500, [1024, 2048, 2432]),
    ],
)
def test_resume_points_are_every_1024_tokens_and_the_last_multiple_of_128(
    prompt_length: int, points: list[int]
) -> None:
    assert resume_points(prompt_length) == points


@given(LENGTHS)
def test_a_resume_point_leaves_a_token_to_compute(prompt_length: int) -> None:
    points = resume_points(prompt_length)
    assert all(0 < point < prompt_length and point % 128 == 0 for point in points)
    assert points == sorted(set(points))
    assert last_resume_point(prompt_length) == (points[-1] if points else 0)
    assert prompt_length - last_resume_point(prompt_length) <= 128


@given(RULES, LENGTHS)
def test_resuming_needs_exactly_the_full_pages_that_the_next_token_reads(rules: Residency, position: int) -> None:
    needed = rules.streaming_pages_to_resume(position)
    assert set(needed) == full_pages(tokens_read(rules, position), position)
    assert needed == sorted(needed)


@given(RULES, st.integers(0, 1500), st.integers(0, 600))
def test_a_page_that_left_the_window_is_never_read_again(rules: Residency, position: int, later: int) -> None:
    dropped = set(range(rules.window_pages(position).start)) - set(rules.sink_pages(position))
    assert not dropped & full_pages(tokens_read(rules, position + later), position + later)


@given(RULES, LENGTHS)
def test_the_prefix_cache_keeps_what_every_resume_point_and_the_end_need(rules: Residency, prompt_length: int) -> None:
    kept = rules.streaming_pages_kept(prompt_length)
    wanted = set(rules.streaming_pages_to_resume(prompt_length)) | set(rules.sink_pages(prompt_length))
    for point in resume_points(prompt_length):
        wanted |= set(rules.streaming_pages_to_resume(point))
    assert kept == sorted(wanted)
    assert all(page < prompt_length // 64 for page in kept)


@given(RULES, LENGTHS)
def test_a_handoff_moves_what_decode_reads_and_what_the_last_resume_point_needs(
    rules: Residency, prompt_length: int
) -> None:
    moved = set(rules.streaming_pages_for_decode(prompt_length))
    assert moved >= set(rules.streaming_pages_to_resume(prompt_length))
    assert moved >= set(rules.streaming_pages_to_resume(last_resume_point(prompt_length)))
    assert len(moved) <= (rules.sink_size + rules.local_window) // 64 + 128 // 64


def test_the_default_window_before_a_resume_point_is_four_pages() -> None:
    rules = Residency(sink_size=128, local_window=256)
    assert rules.window_pages(1024) == range(12, 16)
    assert rules.streaming_pages_to_resume(1024) == [0, 1, 12, 13, 14, 15]
    assert rules.streaming_pages_to_resume(256) == [0, 1, 2, 3]
    assert rules.streaming_pages_for_decode(2500) == [0, 1, *range(34, 39)]
