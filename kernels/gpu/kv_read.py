"""Triton kernel of `kv_read`: one program decodes one slot of one page."""

import torch
import triton
import triton.language as tl

from ..slot_layout import SlotLayout
from .codec import load_codes, load_halves, pool_views, tile


@triton.jit
def _small_to_float(codes):
    """uint8 to float32 without an integer conversion: under the exponent of 2**23 a byte is 2**23 + code."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _decode(first, second, low_step, low_min, high_step, high_min, BITS: tl.constexpr, PER_CHANNEL: tl.constexpr):
    if BITS >= 16:
        return first, second
    else:
        if BITS == 4:
            second = first >> 4
            first = first & 15
        low = _small_to_float(first) * tile(low_step, PER_CHANNEL).to(tl.float32)
        low += tile(low_min, PER_CHANNEL).to(tl.float32)
        high = _small_to_float(second) * tile(high_step, PER_CHANNEL).to(tl.float32)
        high += tile(high_min, PER_CHANNEL).to(tl.float32)
        return low, high


@triton.jit
def _read_pages_kernel(
    pool_codes, pool_half, page_ids, slots, heads, token_offsets, scratch_key, scratch_value,
    page_stride, slot_stride, key_stride_h, key_stride_t, value_stride_h, value_stride_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_CODES: tl.constexpr, VALUE_MIN: tl.constexpr,
    VALUE_STEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    h = tl.program_id(1)
    slot = tl.load(page_ids + n).to(tl.int64) * page_stride + tl.load(slots + h).to(tl.int64) * slot_stride
    head = tl.load(heads + h).to(tl.int64)
    token = tl.load(token_offsets + n).to(tl.int64)
    rows = tl.arange(0, HALF)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows >= 0)[:, None] & (columns < D)[None, :]
    tile = rows.to(tl.int64)[:, None]
    statistics = slot // 2
    key_at: tl.constexpr = 8 if KEY_BITS < 16 else KEY_BITS

    first = load_codes(pool_codes, slot * 8 // key_at, D, rows, columns, D, True)
    second = first
    low_min, low_step, high_min, high_step = 0.0, 0.0, 0.0, 0.0
    if KEY_BITS != 4:
        second = load_codes(pool_codes, slot * 8 // key_at + HALF * D, D, rows, columns, D, True)
    if KEY_BITS < 16:
        low_min = load_halves(pool_half, statistics + KEY_MIN // 2, columns, D, LOGICAL, HALF, 0, True)
        low_step = load_halves(pool_half, statistics + KEY_STEP // 2, columns, D, LOGICAL, HALF, 0, True)
        high_min = load_halves(pool_half, statistics + KEY_MIN // 2, columns, D, LOGICAL, HALF, 1, True)
        high_step = load_halves(pool_half, statistics + KEY_STEP // 2, columns, D, LOGICAL, HALF, 1, True)
    low, high = _decode(first, second, low_step, low_min, high_step, high_min, KEY_BITS, True)
    target = scratch_key + head * key_stride_h + (token + tile) * key_stride_t + columns[None, :]
    tl.store(target, low.to(scratch_key.dtype.element_ty), mask=mask)
    tl.store(target + HALF * key_stride_t, high.to(scratch_key.dtype.element_ty), mask=mask)

    value_slot = slot + VALUE_CODES
    first = load_codes(pool_codes, value_slot * 8 // key_at, D, rows, columns, D, True)
    second = first
    low_min, low_step, high_min, high_step = 0.0, 0.0, 0.0, 0.0
    if VALUE_BITS != 4:
        second = load_codes(pool_codes, value_slot * 8 // key_at + HALF * D, D, rows, columns, D, True)
    if VALUE_BITS < 16:
        low_min = tl.load(pool_half + statistics + VALUE_MIN // 2 + rows)
        low_step = tl.load(pool_half + statistics + VALUE_STEP // 2 + rows)
        high_min = tl.load(pool_half + statistics + VALUE_MIN // 2 + HALF + rows)
        high_step = tl.load(pool_half + statistics + VALUE_STEP // 2 + HALF + rows)
    low, high = _decode(first, second, low_step, low_min, high_step, high_min, VALUE_BITS, False)
    target = scratch_value + head * value_stride_h + (token + tile) * value_stride_t + columns[None, :]
    tl.store(target, low.to(scratch_value.dtype.element_ty), mask=mask)
    tl.store(target + HALF * value_stride_t, high.to(scratch_value.dtype.element_ty), mask=mask)


def read_pages(
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    slots: torch.Tensor,
    layout: SlotLayout,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    heads: torch.Tensor,
    token_offsets: torch.Tensor,
) -> None:
    """See `kernels.kv_read.read_pages`."""
    num_pages, num_heads = page_ids.numel(), heads.numel()
    if not num_pages or not num_heads:
        return
    codes, half = pool_views(pool, layout)
    _read_pages_kernel[(num_pages, num_heads)](
        codes, half, page_ids, slots, heads, token_offsets, scratch_key, scratch_value,
        pool.stride(0), pool.stride(1), *scratch_key.stride()[:2], *scratch_value.stride()[:2],
        D=layout.head_dim, BLOCK_D=triton.next_power_of_2(layout.head_dim),
        HALF=layout.page_size // 2, LOGICAL=layout.logical_page_size,
        KEY_BITS=layout.key_bits, VALUE_BITS=layout.value_bits,
        KEY_MIN=layout.key_min, KEY_STEP=layout.key_step, VALUE_CODES=layout.value_codes,
        VALUE_MIN=layout.value_min, VALUE_STEP=layout.value_step,
        num_warps=4,
    )  # fmt: skip
