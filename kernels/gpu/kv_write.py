"""Triton kernels of `kv_write`: the tail's newest token, and quantizing whole pages."""

import torch
import triton
import triton.language as tl

from ..slot_layout import SlotLayout
from .codec import INTERPRETED, pool_views


@triton.jit
def _append_tail_kernel(
    key, value, tail_key, tail_value, rows, positions,
    key_stride_b, key_stride_h, value_stride_b, value_stride_h,
    tk_stride_r, tk_stride_h, tk_stride_t, tv_stride_r, tv_stride_h, tv_stride_t,
    HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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
def _half_below(x, ASM: tl.constexpr):
    """Largest fp16 that is at most x (float32)."""
    if ASM:
        return tl.inline_asm_elementwise("cvt.rm.f16.f32 $0, $1;", "=h,f", [x], dtype=tl.float16, is_pure=True, pack=1)
    else:
        half = x.to(tl.float16)
        bits = half.to(tl.int16, bitcast=True)
        below = tl.where(bits > 0, bits - 1, tl.where(bits == 0, -32767, bits + 1)).to(tl.int16)
        return tl.where(half.to(tl.float32) > x, below.to(tl.float16, bitcast=True), half)


@triton.jit
def _half_above(x, ASM: tl.constexpr):
    """Smallest fp16 that is at least x (float32, not negative)."""
    if ASM:
        return tl.inline_asm_elementwise("cvt.rp.f16.f32 $0, $1;", "=h,f", [x], dtype=tl.float16, is_pure=True, pack=1)
    else:
        half = x.to(tl.float16)
        above = (half.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where(half.to(tl.float32) < x, above, half)


@triton.jit
def _scale(low, high, LEVELS: tl.constexpr, ASM: tl.constexpr):
    """fp16 minimum and step whose range covers [low, high], and the factor from distance to codes (0 for a range of
    one point).
    """
    minimum = _half_below(low, ASM)
    width = high - minimum.to(tl.float32)
    if ASM:  # a division by a constant, rounded correctly (the plain one is an approximation there)
        step = width * (1.0 / LEVELS)
        step = tl.fma(tl.fma(step, -1.0 * LEVELS, width), 1.0 / LEVELS, step)
    else:
        step = width / LEVELS
    step = _half_above(step, ASM)
    width = step.to(tl.float32)
    return minimum, step, tl.where(width == 0, 0.0, 1.0 / tl.where(width == 0, 1.0, width))


@triton.jit
def _distance(x, minimum, factor):
    """Steps from the minimum, plus a half: codes are its floor. x never exceeds the range, so neither do they."""
    return (x - minimum.to(tl.float32)) * factor + 0.5


@triton.jit
def _floor_bytes(x, ASM: tl.constexpr):
    """floor(x) of float32 in [0, 256) as uint8; added to 2**23 and rounded down, the number's low byte is the code."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, c, d;
            .reg .b32 p, q;
            add.rm.f32 a, $1, 0f4B000000;
            add.rm.f32 b, $2, 0f4B000000;
            add.rm.f32 c, $3, 0f4B000000;
            add.rm.f32 d, $4, 0f4B000000;
            prmt.b32 p, a, b, 0x0040;
            prmt.b32 q, c, d, 0x0040;
            prmt.b32 $0, p, q, 0x5410;
            }""",
            "=r,f,f,f,f",
            [x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return x.to(tl.uint8)


@triton.jit
def _store_halves(
    pool, offset, rows, columns, low, high, mask, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr
):
    """Codes of both half pages, uint8 [HALF, D] (or floats), packed as `SlotLayout` says."""
    target = pool + offset + rows * D + columns
    if BITS == 4:
        tl.store(target, low | (high << 4), mask=mask)
    else:
        tl.store(target, low, mask=mask)
        tl.store(target + HALF * D, high, mask=mask)


@triton.jit
def _ranges(x, LOGICAL: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Minimum and maximum of each logical page of a half page [HALF, D], float32 [groups, D]."""
    grouped = tl.reshape(x, (HALF // LOGICAL, LOGICAL, BLOCK_D))
    return tl.min(grouped, axis=1), tl.max(grouped, axis=1)


@triton.jit
def _per_token(x, LOGICAL: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """[groups, D] to [HALF, D]."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], (HALF // LOGICAL, LOGICAL, BLOCK_D)), (HALF, BLOCK_D))


@triton.jit
def _write_keys(
    source, stride_t, pool_u8, pool_codes, pool_half, slot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr, KEY_BITS: tl.constexpr,
    KEY_LEVELS: tl.constexpr, KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One slot's keys [P, D] from `source`: codes, and minimum and step per channel and logical page."""
    rows = tl.arange(0, HALF)[:, None]
    channels = tl.arange(0, BLOCK_D)
    columns = channels[None, :]
    in_head = columns < D
    mask = in_head & (rows >= 0)
    source += rows.to(tl.int64) * stride_t + columns
    low_raw = tl.load(source, mask=mask, other=0)
    high_raw = tl.load(source + HALF * stride_t, mask=mask, other=0)
    low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
    statistics = pool_half + slot // 2
    if LOGICAL == 2 * HALF:
        minimum, step, factor = _scale(
            tl.minimum(tl.min(low, 0), tl.min(high, 0)), tl.maximum(tl.max(low, 0), tl.max(high, 0)), KEY_LEVELS, ASM
        )
        tl.store(statistics + KEY_MIN // 2 + channels, minimum, mask=channels < D)
        tl.store(statistics + KEY_STEP // 2 + channels, step, mask=channels < D)
        low_codes = _distance(low, minimum[None, :], factor[None, :])
        high_codes = _distance(high, minimum[None, :], factor[None, :])
    else:
        groups = tl.arange(0, HALF // LOGICAL)[:, None]
        target = statistics + groups * D + columns
        half_groups: tl.constexpr = HALF // LOGICAL * D
        small, large = _ranges(low, LOGICAL, BLOCK_D, HALF)
        minimum, step, factor = _scale(small, large, KEY_LEVELS, ASM)
        group_mask = in_head & (groups >= 0)
        tl.store(target + KEY_MIN // 2, minimum, mask=group_mask)
        tl.store(target + KEY_STEP // 2, step, mask=group_mask)
        low_codes = _distance(
            low, _per_token(minimum, LOGICAL, BLOCK_D, HALF), _per_token(factor, LOGICAL, BLOCK_D, HALF)
        )
        small, large = _ranges(high, LOGICAL, BLOCK_D, HALF)
        minimum, step, factor = _scale(small, large, KEY_LEVELS, ASM)
        tl.store(target + half_groups + KEY_MIN // 2, minimum, mask=group_mask)
        tl.store(target + half_groups + KEY_STEP // 2, step, mask=group_mask)
        high_codes = _distance(
            high, _per_token(minimum, LOGICAL, BLOCK_D, HALF), _per_token(factor, LOGICAL, BLOCK_D, HALF)
        )
    if KEY_BITS >= 16:
        element = slot * 8 // KEY_BITS
        _store_halves(pool_codes, element, rows, columns, low_raw, high_raw, mask, D, HALF, KEY_BITS)
    else:
        low_codes, high_codes = _floor_bytes(low_codes, ASM), _floor_bytes(high_codes, ASM)
        _store_halves(pool_u8, slot, rows, columns, low_codes, high_codes, mask, D, HALF, KEY_BITS)


@triton.jit
def _write_values(
    source, stride_t, pool_u8, pool_codes, pool_half, slot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_LEVELS: tl.constexpr,
    VALUE_CODES: tl.constexpr, VALUE_MIN: tl.constexpr, VALUE_STEP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One slot's values [P, D] from `source`: codes, and minimum and step per token."""
    rows = tl.arange(0, HALF)[:, None]
    channels = tl.arange(0, BLOCK_D)
    columns = channels[None, :]
    mask = (columns < D) & (rows >= 0)
    statistics = pool_half + slot // 2
    source += rows.to(tl.int64) * stride_t + columns
    low_raw = tl.load(source, mask=mask, other=0)
    high_raw = tl.load(source + HALF * stride_t, mask=mask, other=0)
    if VALUE_BITS >= 16:
        element = (slot + VALUE_CODES) * 8 // VALUE_BITS
        _store_halves(pool_codes, element, rows, columns, low_raw, high_raw, mask, D, HALF, VALUE_BITS)
    else:
        tokens = tl.arange(0, HALF)
        low, high = low_raw.to(tl.float32), high_raw.to(tl.float32)
        minimum, step, factor = _scale(
            tl.min(tl.where(mask, low, float("inf")), 1),
            tl.max(tl.where(mask, low, float("-inf")), 1),
            VALUE_LEVELS,
            ASM,
        )
        tl.store(statistics + VALUE_MIN // 2 + tokens, minimum)
        tl.store(statistics + VALUE_STEP // 2 + tokens, step)
        low_codes = _floor_bytes(_distance(low, minimum[:, None], factor[:, None]), ASM)
        minimum, step, factor = _scale(
            tl.min(tl.where(mask, high, float("inf")), 1),
            tl.max(tl.where(mask, high, float("-inf")), 1),
            VALUE_LEVELS,
            ASM,
        )
        tl.store(statistics + VALUE_MIN // 2 + HALF + tokens, minimum)
        tl.store(statistics + VALUE_STEP // 2 + HALF + tokens, step)
        high_codes = _floor_bytes(_distance(high, minimum[:, None], factor[:, None]), ASM)
        _store_halves(pool_u8, slot + VALUE_CODES, rows, columns, low_codes, high_codes, mask, D, HALF, VALUE_BITS)


@triton.jit
def _write_pages_kernel(
    key, value, heads, pool_u8, pool_codes, pool_half, page_ids, slots, valid,
    key_stride_n, key_stride_t, key_stride_h, value_stride_n, value_stride_t, value_stride_h,
    page_stride, slot_stride,
    HAS_VALID: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr,
    KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_CODES: tl.constexpr, VALUE_MIN: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    if HAS_VALID and tl.load(valid + n) == 0:
        return
    slot = tl.load(page_ids + n).to(tl.int64) * page_stride + tl.load(slots + h).to(tl.int64) * slot_stride
    slot = tl.multiple_of(slot, 16)
    head = tl.load(heads + h).to(tl.int64)
    if tl.program_id(2) == 0:
        _write_keys(
            key + n * key_stride_n + head * key_stride_h, key_stride_t, pool_u8, pool_codes, pool_half, slot,
            D, BLOCK_D, HALF, LOGICAL, KEY_BITS, KEY_LEVELS, KEY_MIN, KEY_STEP, ASM,
        )  # fmt: skip
    else:
        _write_values(
            value + n * value_stride_n + head * value_stride_h, value_stride_t, pool_u8, pool_codes, pool_half, slot,
            D, BLOCK_D, HALF, VALUE_BITS, VALUE_LEVELS, VALUE_CODES, VALUE_MIN, VALUE_STEP, ASM,
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
    _append_tail_kernel[(num_batch,)](
        key, value, tail_key, tail_value, rows, positions,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *tail_key.stride()[:3], *tail_value.stride()[:3],
        HEADS=heads, D=head_dim, P=tail_key.shape[2],
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(head_dim),
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
    # narrow programs repeat least work when ranges are rounded; the cap (no spills at these sizes) lets six of them
    # share a multiprocessor
    narrow = layout.head_dim <= 128 and key.element_size() == 2
    _write_pages_kernel[(num_pages, num_heads, 2)](
        key, value, heads, pool, codes, half, page_ids, slots, page_ids if valid is None else valid,
        *key.stride()[:3], *value.stride()[:3], pool.stride(0), pool.stride(1),
        HAS_VALID=valid is not None, D=layout.head_dim, BLOCK_D=triton.next_power_of_2(layout.head_dim),
        HALF=layout.page_size // 2, LOGICAL=layout.logical_page_size,
        KEY_BITS=layout.key_bits, VALUE_BITS=layout.value_bits,
        KEY_LEVELS=layout.key_levels, VALUE_LEVELS=15 if layout.value_bits == 4 else 255,
        KEY_MIN=layout.key_min, KEY_STEP=layout.key_step, VALUE_CODES=layout.value_codes,
        VALUE_MIN=layout.value_min, VALUE_STEP=layout.value_step, ASM=not INTERPRETED,
        num_warps=2 if narrow else 4, maxnreg=168 if narrow else None,
    )  # fmt: skip
