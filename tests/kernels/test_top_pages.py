"""The largest scores of a row without sorting: what is taken, in which places, with ties to the lower index."""

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels.gpu.top_pages import keys_of, take

BLOCK = 64


@triton.jit
def _take_kernel(scores, classes, taken_out, place_out, total_out, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    kind = tl.load(classes + i)
    taken, place, total = take(keys_of(tl.load(scores + i), kind == 2, kind == 1), count)
    tl.store(taken_out + i, taken.to(tl.int32))
    tl.store(place_out + i, place)
    tl.store(total_out, total)


def expected(scores: list[float], kinds: list[int], count: int) -> list[int]:
    """Entries taken: all kept ones (kind 2), then of the others (kind 1) the largest, `count` in all."""
    kept = [i for i, kind in enumerate(kinds) if kind == 2]
    others = sorted((i for i, kind in enumerate(kinds) if kind == 1), key=lambda i: (-scores[i], i))
    return sorted(kept + others[: max(count - len(kept), 0)])


@settings(deadline=None, max_examples=25)
@given(
    scores=st.one_of(
        st.lists(st.sampled_from([-1.5, 0.0, 2.0, 2.0000002]), min_size=BLOCK, max_size=BLOCK),
        st.lists(st.floats(width=32, allow_nan=False), min_size=BLOCK, max_size=BLOCK),
        st.lists(st.floats(1.0, 1.0009765625, width=32), min_size=BLOCK, max_size=BLOCK),
    ),
    kinds=st.lists(st.integers(0, 2), min_size=BLOCK, max_size=BLOCK),
    count=st.integers(-1, BLOCK + 2),
)
def test_the_largest_are_taken_in_order(device, scores, kinds, count):
    scores = [score + 0.0 for score in scores]  # no negative zero, whose key is below zero's
    taken, place = torch.full((2, BLOCK), -1, dtype=torch.int32, device=device)
    total = torch.full((1,), -1, dtype=torch.int32, device=device)
    rows = torch.tensor(scores, device=device), torch.tensor(kinds, dtype=torch.int32, device=device)
    _take_kernel[(1,)](*rows, taken, place, total, count, BLOCK=BLOCK)
    chosen = taken.nonzero().flatten()
    assert chosen.tolist() == expected(scores, kinds, count)
    assert place[chosen].tolist() == list(range(len(chosen)))
    assert total.item() == len(chosen)
