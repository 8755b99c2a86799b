"""Attention density against counting token by token."""

import pytest

from lserve.engine.density import AttentionDensity
from lserve.engine.request import Request
from lserve.engine.sequence import PrefillChunk, Sequence

SINK, WINDOW = 128, 256
DENSITY = AttentionDensity(num_retrieval=3, num_streaming=1, sink_size=SINK, local_window=WINDOW)


def sequence(length: int) -> Sequence:
    return Sequence(Request("r", tuple(range(length))), 0, list(range(length)), length)


def streaming_keys(position: int) -> int:
    return sum(i < SINK or position - i < WINDOW for i in range(position + 1))


@pytest.mark.parametrize(("start", "length"), [(0, 100), (0, 1000), (384, 200), (1024, 77)])
def test_prefill(start: int, length: int) -> None:
    positions = range(start, start + length)
    dense = sum(t + 1 for t in positions)
    windowed = sum(streaming_keys(t) for t in positions)
    chunk = PrefillChunk(sequence(start + length), start, length)
    assert DENSITY.prefill([chunk]) == pytest.approx(0.75 + 0.25 * windowed / dense)


@pytest.mark.parametrize(("length", "budget"), [(1, 8), (100, 8), (1000, 8), (1024, 8), (1025, 8), (1000, 2**30)])
def test_decode(length: int, budget: int) -> None:
    position = length - 1
    pages = range(position // 64 + 1)
    read = pages if len(pages) <= budget else [*range(budget - 1), pages[-1]]
    keys = sum(min(64, length - 64 * page) for page in read)
    expected = (0.75 * keys + 0.25 * streaming_keys(position)) / length
    assert DENSITY.decode([(sequence(length), budget)]) == pytest.approx(expected)


def test_a_batch_weighs_by_length() -> None:
    short, long = sequence(64), sequence(6400)
    both = DENSITY.decode([(short, 16), (long, 16)])
    alone = DENSITY.decode([(long, 16)])
    assert alone < both < DENSITY.decode([(short, 16)])
    assert both == pytest.approx((64 + 6400 * alone) / 6464)
