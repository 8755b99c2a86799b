"""Triton kernels of `kv_write`: the tail's newest token, and quantizing whole pages."""

import torch
import triton
import triton.language as tl

from ..slot_layout import SlotLayout
from .codec import INTERPRETED, pool_views
from .encode import extremes, scale, store_codes
from .overlap import after_previous, can_overlap, let_next_start

KEY_CONTIGUOUS: tl.constexpr = tl.constexpr(4)
"""Channels of a key that a thread takes: the fewer, the more rows, and the fewer threads repeat a channel's range."""
PART_CHANNELS = 64
"""Channels of a whole page's keys that one program takes, or as many values."""


@triton.jit
def _append_tail_kernel(
    key, value, tail_key, tail_value, rows, positions,
    key_stride_b, key_stride_h, value_stride_b, value_stride_h,
    tk_stride_r, tk_stride_h, tk_stride_t, tv_stride_r, tv_stride_h, tv_stride_t,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    after_previous(PDL)
    let_next_start(PDL)
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + b).to(tl.int64)
    token = (tl.load(positions + b) % P).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < HEADS) & (columns < D)
    x = tl.load(key + b * key_stride_b + heads * key_stride_h + columns, mask=mask)
    tl.store(tail_key + row * tk_stride_r + token * tk_stride_t + heads * tk_stride_h + columns, x, mask=mask)
    x = tl.load(value + b * value_stride_b + heads * value_stride_h + columns, mask=mask)
    tl.store(tail_value + row * tv_stride_r + token * tv_stride_t + heads * tv_stride_h + columns, x, mask=mask)


@triton.jit
def _per_row(x, ROWS: tl.constexpr):
    """[groups, columns] to [ROWS, columns]."""
    groups: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    x = tl.broadcast_to(tl.expand_dims(x, 1), (groups, ROWS // groups, columns))
    return tl.reshape(x, (ROWS, columns))


@triton.jit
def _write_keys(
    source, stride_t, pool_u8, pool_codes, pool_half, slot, first,
    D: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr, BITS: tl.constexpr,
    LEVELS: tl.constexpr, MIN: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One slot's keys [P, COLUMNS] from channel `first` on: codes; minimum and step per channel and logical page."""
    rows = tl.arange(0, HALF)[:, None]
    columns = tl.max_contiguous(first + tl.arange(0, COLUMNS), KEY_CONTIGUOUS)[None, :]
    mask = (columns < D) & (rows >= 0)
    source += rows.to(tl.int64) * stride_t + columns
    low = tl.load(source, mask=mask, other=0)
    high = tl.load(source + HALF * stride_t, mask=mask, other=0)
    FUSED: tl.constexpr = low.dtype.primitive_bitwidth == 16
    GROUPS: tl.constexpr = HALF // LOGICAL if LOGICAL < HALF else 1
    low_least, low_most = extremes(tl.reshape(low, (GROUPS, HALF // GROUPS, COLUMNS)), False, ASM)
    high_least, high_most = extremes(tl.reshape(high, (GROUPS, HALF // GROUPS, COLUMNS)), False, ASM)
    groups = tl.arange(0, GROUPS)[:, None]
    statistics = pool_half + slot // 2 + groups * D + columns
    in_head = (columns < D) & (groups >= 0)
    if LOGICAL > HALF:
        low_least, low_most = tl.minimum(low_least, high_least), tl.maximum(low_most, high_most)
    low_min, step, low_factor = scale(low_least, low_most, LEVELS, ASM)
    tl.store(statistics + MIN // 2, low_min, mask=in_head)
    tl.store(statistics + STEP // 2, step, mask=in_head)
    high_min, high_factor = low_min, low_factor
    if LOGICAL <= HALF:
        high_min, step, high_factor = scale(high_least, high_most, LEVELS, ASM)
        tl.store(statistics + GROUPS * D + MIN // 2, high_min, mask=in_head)
        tl.store(statistics + GROUPS * D + STEP // 2, step, mask=in_head)
    if BITS >= 16:
        target = pool_codes + slot * 8 // BITS + rows * D + columns
        tl.store(target, low, mask=mask)
        tl.store(target + HALF * D, high, mask=mask)
    else:
        low_scale = (_per_row(low_min.to(tl.float32), HALF), _per_row(low_factor, HALF))
        high_scale = (_per_row(high_min.to(tl.float32), HALF), _per_row(high_factor, HALF))
        target = pool_u8 + slot + rows * D + columns
        low, high = low.to(tl.float32), high.to(tl.float32)
        store_codes(target, low, high, low_scale, high_scale, mask, HALF * D, BITS, FUSED, ASM)


@triton.jit
def _write_values(
    source, stride_t, pool_u8, pool_codes, pool_half, slot, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr,
    LEVELS: tl.constexpr, CODES: tl.constexpr, MIN: tl.constexpr, STEP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One slot's values of ROWS tokens from `first` on in either half page: codes, and minimum and step per token."""
    tokens = first + tl.arange(0, ROWS)
    rows = tokens[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (columns < D) & (rows >= 0)
    source += rows.to(tl.int64) * stride_t
    low = tl.load(source + columns, mask=mask, other=0)
    high = tl.load(source + HALF * stride_t + columns, mask=mask, other=0)
    if BLOCK_D != D:  # a row's first number, repeated past its end, changes no range
        low = tl.where(mask, low, tl.load(source))
        high = tl.where(mask, high, tl.load(source + HALF * stride_t))
    if BITS >= 16:
        target = pool_codes + (slot + CODES) * 8 // BITS + rows * D + columns
        tl.store(target, low, mask=mask)
        tl.store(target + HALF * D, high, mask=mask)
    else:
        FUSED: tl.constexpr = low.dtype.primitive_bitwidth == 16
        statistics = pool_half + slot // 2 + tokens
        least, most = extremes(tl.reshape(low, (1, ROWS, BLOCK_D)), True, ASM)
        low_min, step, low_factor = scale(tl.reshape(least, (ROWS,)), tl.reshape(most, (ROWS,)), LEVELS, ASM)
        tl.store(statistics + MIN // 2, low_min)
        tl.store(statistics + STEP // 2, step)
        least, most = extremes(tl.reshape(high, (1, ROWS, BLOCK_D)), True, ASM)
        high_min, step, high_factor = scale(tl.reshape(least, (ROWS,)), tl.reshape(most, (ROWS,)), LEVELS, ASM)
        tl.store(statistics + HALF + MIN // 2, high_min)
        tl.store(statistics + HALF + STEP // 2, step)
        low_scale = (low_min.to(tl.float32)[:, None], low_factor[:, None])
        high_scale = (high_min.to(tl.float32)[:, None], high_factor[:, None])
        target = pool_u8 + slot + CODES + rows * D + columns
        low, high = low.to(tl.float32), high.to(tl.float32)
        store_codes(target, low, high, low_scale, high_scale, mask, HALF * D, BITS, FUSED, ASM)


@triton.jit
def _write_pages_kernel(
    key, value, heads, pool_u8, pool_codes, pool_half, page_ids, slots, valid,
    key_stride_n, key_stride_t, key_stride_h, value_stride_n, value_stride_t, value_stride_h,
    page_stride, slot_stride,
    HAS_VALID: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr,
    LOGICAL: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr, KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_MIN: tl.constexpr, VALUE_STEP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One warp a part, so that no range needs a barrier: keys are cut by channel, values by token."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    part = tl.program_id(2)
    if HAS_VALID and tl.load(valid + n) == 0:
        return
    slot = tl.load(page_ids + n).to(tl.int64) * page_stride + tl.load(slots + h).to(tl.int64) * slot_stride
    slot = tl.multiple_of(slot, 16)
    head = tl.load(heads + h).to(tl.int64)
    if part < PARTS:
        _write_keys(
            key + n * key_stride_n + head * key_stride_h, key_stride_t, pool_u8, pool_codes, pool_half, slot,
            part * (BLOCK_D // PARTS), D, BLOCK_D // PARTS, HALF, LOGICAL, KEY_BITS, KEY_LEVELS, KEY_MIN, KEY_STEP, ASM,
        )  # fmt: skip
    else:
        _write_values(
            value + n * value_stride_n + head * value_stride_h, value_stride_t, pool_u8, pool_codes, pool_half, slot,
            (part - PARTS) * (HALF // PARTS), D, BLOCK_D, HALF // PARTS, HALF, VALUE_BITS, VALUE_LEVELS, VALUE_CODES,
            VALUE_MIN, VALUE_STEP, ASM,
        )  # fmt: skip


def append_tail(
    key: torch.Tensor,
    value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See `kernels.kv_write.append_tail`."""
    num_batch, heads, head_dim = key.shape
    if not num_batch:
        return
    overlap = can_overlap(key.device)
    _append_tail_kernel[(num_batch,)](
        key, value, tail_key, tail_value, rows, positions,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *tail_key.stride()[:3], *tail_value.stride()[:3],
        HEADS=heads, D=head_dim, P=tail_key.shape[2],
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(head_dim),
        PDL=overlap, launch_pdl=overlap,
    )  # fmt: skip


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor,
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    slots: torch.Tensor,
    layout: SlotLayout,
    valid: torch.Tensor | None = None,
) -> None:
    """See `kernels.kv_write.write_pages`."""
    num_pages, num_heads = page_ids.numel(), heads.numel()
    if not num_pages or not num_heads:
        return
    codes, half = pool_views(pool, layout)
    block_d = triton.next_power_of_2(layout.head_dim)
    parts = max(block_d // PART_CHANNELS, 1)
    _write_pages_kernel[(num_pages, num_heads, 2 * parts)](
        key, value, heads, pool, codes, half, page_ids, slots, page_ids if valid is None else valid,
        *key.stride()[:3], *value.stride()[:3], pool.stride(0), pool.stride(1),
        HAS_VALID=valid is not None, D=layout.head_dim, BLOCK_D=block_d, PARTS=parts,
        HALF=layout.page_size // 2, LOGICAL=layout.logical_page_size,
        KEY_BITS=layout.key_bits, VALUE_BITS=layout.value_bits,
        KEY_LEVELS=layout.key_levels, VALUE_LEVELS=15 if layout.value_bits == 4 else 255,
        KEY_MIN=layout.key_min, KEY_STEP=layout.key_step, VALUE_CODES=layout.value_codes,
        VALUE_MIN=layout.value_min, VALUE_STEP=layout.value_step, ASM=not INTERPRETED,
        num_warps=1 if key.element_size() == 2 else 2,
    )  # fmt: skip
