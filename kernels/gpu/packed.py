"""Pieces of kernels that read quantized pages with one warp a program, in Gluon: layouts are chosen so that codes,
once in shared memory, go straight to the matrix unit's registers.

- Codes are multiplied as they are: under a zero exponent a code c is the fp16 subnormal c * 2**-24, exact, so that
  unpacking is one `and` for two codes. Steps are folded into the other operand: the key step into the query, per
  logical page; the value step into the probability. Key minima come first, as the accumulator's start; value minima
  last, as one number per query head.
- Scores are computed transposed, tokens x query heads (8 or 16 columns), so that little of the matrix unit is padding.
- A lane loads 16 contiguous bytes of a row. What the matrix unit calls channel or token k is then whatever the lane
  holds: the orders of contracted channels and tokens are free as long as both operands agree.
- Pages wait in a ring in shared memory, several copies in flight, so that registers hold only the page at work.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..slot_layout import SlotLayout
from .packed_operands import (
    and_pairs,
    four_times,
    halves,
    in_key_order,
    key_layout,
    key_operand,
    like,
    power_of_two_above,
    split_tokens,
    times,
    token_pairs,
    value_layout,
    value_operand,
)


def supports(layout: SlotLayout, query: torch.Tensor, tail: torch.Tensor, group_size: int) -> bool:
    """Whether these kernels cover a case; larger heads or groups would spill registers. The portable kernels cover
    all.
    """
    return (
        layout.key_bits <= 8
        and layout.head_dim in (64, 128)
        and layout.logical_page_size >= 32
        and query.dtype == tail.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and group_size <= 8
    )


def programs_per_multiprocessor(ring_bytes: int, most: int) -> int:
    """Programs of one warp that fit a multiprocessor's 227 KB of shared memory, each with a ring and a tile for the
    tail beside it.
    """
    return max(min(227 * 1024 // (ring_bytes + 3072), most), 1)


@gluon.constexpr_function
def copy_layout(words):
    """How a tile of rows of `words` words is copied: 16 bytes a lane."""
    lanes = min(words // 4, 32)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [1, 1], [1, 0])


@gluon.constexpr_function
def line_layout(words):
    """How a line of words is copied."""
    return gl.BlockedLayout([min(max(words // 32, 1), 4)], [32], [1], [0])


@gluon.constexpr_function
def channel_layout(words):
    """Per-channel fp16 pairs [words], as `in_key_order` and the right operand want them: lane bits 0, 1 choose 8
    words.
    """
    far = [[32 << i] for i in range((words // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout([[1], [2], [4], *far], [[8], [16], [0], [0], [0]], [], [], [words])


KEY_SHARED = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
VALUE_SHARED = gl.constexpr(gl.SwizzledSharedLayout(4, 8, 4, [1, 0]))
LINE_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
TOKEN_LAYOUT = gl.constexpr(gl.DistributedLinearLayout([[1]], [[0], [0], [2], [4], [8]], [], [], [16]))


@gluon.jit
def copy_tile(shared, words, keep):
    """Starts copying words (a pointer) to a tile [rows, words]."""
    LAYOUT: gl.constexpr = copy_layout(shared.shape[1])
    row = gl.arange(0, shared.shape[0], gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, shared.shape[1], gl.SliceLayout(0, LAYOUT))
    at = gl.expand_dims(row, 1) * shared.shape[1] + gl.expand_dims(column, 0)
    async_copy.async_copy_global_to_shared(shared, words + at, mask=keep & (at >= 0))


@gluon.jit
def copy_line(shared, words, keep):
    """Starts copying words (a pointer) to a line [words]."""
    at = gl.arange(0, shared.shape[0], line_layout(shared.shape[0]))
    async_copy.async_copy_global_to_shared(shared, words + at, mask=keep & (at >= 0))


@gluon.jit
def minima_scores(
    key_range,
    q_unit,
    HIGH_FACTOR: gl.constexpr,
    D: gl.constexpr,
    GROUPS: gl.constexpr,
    A: gl.constexpr,
    C: gl.constexpr,
):
    """Products of query and key minima, times 2**-24, as the scores' start: [32, N] of either half page (the high one
    times HIGH_FACTOR). One product of 16 rows, eight equal ones of each half.
    """
    n: gl.constexpr = q_unit.shape[1]
    CHANNELS: gl.constexpr = channel_layout(D // 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, A)
    tile = gl.full([16, D], 0.0, gl.float16, A)
    minimum = halves(key_range.slice(0, D // 2).load(CHANNELS))
    rows = like(gl.expand_dims(gl.convert_layout(in_key_order(minimum, D), ACROSS), 0), tile)
    if GROUPS > 1:
        minimum = halves(key_range.slice((GROUPS - 1) * (D // 2), D // 2).load(CHANNELS))
        high_rows = like(gl.expand_dims(gl.convert_layout(in_key_order(minimum, D), ACROSS), 0), tile)
        is_low = gl.arange(0, 16, gl.SliceLayout(1, A)) < 8
        rows = gl.where(gl.expand_dims(is_low, 1), rows, high_rows)
    first = mma_v2(rows, q_unit, gl.full([16, n], 0.0, gl.float32, C)) * 5.9604644775390625e-08
    low, high = gl.split(gl.permute(gl.reshape(first, [2, 8, n]), [1, 2, 0]))
    return four_times(low, C), four_times(high * HIGH_FACTOR, C)


@gluon.jit
def scores(
    k, key_range, GROUP: gl.constexpr, q_unit, first, D: gl.constexpr, GROUPS: gl.constexpr, B: gl.constexpr
):  # fmt: skip
    """Raw scores [32, N] of a half page, times 2**-24: codes times (query times step), added to `first`.

    k: the codes as left operand. key_range: the page's minima then steps in shared memory, [GROUPS * D] words; GROUP
    is the logical page.
    """
    CHANNELS: gl.constexpr = channel_layout(D // 2)
    step = halves(key_range.slice((GROUPS + GROUP) * (D // 2), D // 2).load(CHANNELS))
    step = gl.convert_layout(in_key_order(step, D), gl.SliceLayout(1, B))
    return mma_v2(k, times(q_unit, gl.expand_dims(step, 1)), first)


@gluon.jit
def page_scores(
    keys, key_range, q_unit, BITS: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    A: gl.constexpr, B: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Scores of both half pages, [32, N] each, times 2**-24, from a page's key words [32 or 64, D / 4] and ranges in
    shared memory.
    """
    LAYOUT: gl.constexpr = key_layout(D // 4)
    if BITS == 4:
        low, high = minima_scores(key_range, q_unit, 16.0, D, GROUPS, A, C)
        b0, b1, b2, b3, c0, c1, c2, c3 = and_pairs(keys.load(LAYOUT), 4)
        low = scores(key_operand(b0, b1, b2, b3, A), key_range, 0, q_unit, low, D, GROUPS, B)
        high = scores(key_operand(c0, c1, c2, c3, A), key_range, GROUPS - 1, q_unit, high, D, GROUPS, B)
        return low, high * 0.0625
    else:
        low, high = minima_scores(key_range, q_unit, 1.0, D, GROUPS, A, C)
        b0, b1, b2, b3 = and_pairs(keys.slice(0, 32).load(LAYOUT), 8)
        low = scores(key_operand(b0, b1, b2, b3, A), key_range, 0, q_unit, low, D, GROUPS, B)
        c0, c1, c2, c3 = and_pairs(keys.slice(32, 32).load(LAYOUT), 8)
        high = scores(key_operand(c0, c1, c2, c3, A), key_range, GROUPS - 1, q_unit, high, D, GROUPS, B)
        return low, high


@gluon.jit
def weighted_values(values, p_low, p_high, acc, BITS: gl.constexpr, D: gl.constexpr, A: gl.constexpr):
    """acc [D, N] plus values times probabilities (right operands [32, N] of both halves, value step folded in), times
    2**-24.

    At 4 bits the high half's codes come times 16.
    """
    LAYOUT: gl.constexpr = value_layout(D // 4)
    if BITS == 4:
        even, odd = split_tokens(values.load(LAYOUT))
        a0, b0, a1, b1, a2, b2, a3, b3, c0, d0, c1, d1, c2, d2, c3, d3 = token_pairs(even, odd, 4)
        acc = mma_v2(value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_low, acc)
        return mma_v2(value_operand(c0, d0, c1, d1, c2, d2, c3, d3, A), p_high, acc)
    else:
        even, odd = split_tokens(values.slice(0, 32).load(LAYOUT))
        a0, b0, a1, b1, a2, b2, a3, b3 = token_pairs(even, odd, 8)
        acc = mma_v2(value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_low, acc)
        even, odd = split_tokens(values.slice(32, 32).load(LAYOUT))
        a0, b0, a1, b1, a2, b2, a3, b3 = token_pairs(even, odd, 8)
        return mma_v2(value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_high, acc)


@gluon.jit
def unit_query(q):
    """fp16 q over a power of two per head (column) that brings it below 1, and those powers; q float32 [D, N]."""
    unit = power_of_two_above(gl.max(gl.abs(q), 0))
    return (q / gl.expand_dims(unit, 0)).to(gl.float16), unit
