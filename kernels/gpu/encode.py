"""Numbers to codes inside kernels: ranges, their fp16 minimum and step rounded outward, and rounding to codes.

16-bit floats are compared two at a time, and a code is read off a float's own bits: no number is converted to an
integer.
"""

import triton
import triton.language as tl


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
def scale(low, high, LEVELS: tl.constexpr, ASM: tl.constexpr):
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
    if ASM:  # no step is subnormal in float32
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [width], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / tl.where(width == 0, 1.0, width)
    return minimum, step, tl.where(width == 0, 0.0, inverse)


@triton.jit
def _pair_extremes_bf16(a_small, a_large, b_small, b_large):
    return tl.inline_asm_elementwise(
        "min.bf16x2 $0, $2, $4; max.bf16x2 $1, $3, $5;", "=&r,=r,r,r,r,r", [a_small, a_large, b_small, b_large],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _pair_extremes_fp16(a_small, a_large, b_small, b_large):
    return tl.inline_asm_elementwise(
        "min.f16x2 $0, $2, $4; max.f16x2 $1, $3, $5;", "=&r,=r,r,r,r,r", [a_small, a_large, b_small, b_large],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _pair_of(words, DTYPE: tl.constexpr):
    """The two 16-bit floats of each word, as float32."""
    if tl.bfloat16 == DTYPE:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
        return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def extremes(x, ALONG_COLUMNS: tl.constexpr, ASM: tl.constexpr):
    """Minimum and maximum of x [groups, rows, columns] along rows or along columns, float32; 16-bit floats go two at a
    time.
    """
    groups: tl.constexpr = x.shape[0]
    rows: tl.constexpr = x.shape[1]
    columns: tl.constexpr = x.shape[2]
    axis: tl.constexpr = 2 if ALONG_COLUMNS else 1
    if ASM and x.dtype.primitive_bitwidth == 16:
        even, odd = tl.split(tl.reshape(x, (groups, rows, columns // 2, 2)))
        words = tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
        if x.dtype == tl.bfloat16:
            small, large = tl.reduce((words, words), axis, _pair_extremes_bf16)
        else:
            small, large = tl.reduce((words, words), axis, _pair_extremes_fp16)
        s0, s1 = _pair_of(small, x.dtype)
        l0, l1 = _pair_of(large, x.dtype)
        if ALONG_COLUMNS:
            return tl.minimum(s0, s1), tl.maximum(l0, l1)
        else:
            return tl.reshape(tl.join(s0, s1), (groups, columns)), tl.reshape(tl.join(l0, l1), (groups, columns))
    else:
        x = x.to(tl.float32)
        return tl.min(x, axis), tl.max(x, axis)


@triton.jit
def _codes(x, minimum, factor, FUSED: tl.constexpr, ASM: tl.constexpr):
    """Codes of x: steps from the minimum, half up, uint8. x never exceeds the range, so neither do they.

    FUSED: x is a 16-bit float, so that x * factor - minimum * factor does not cancel too many digits; what it does lose
    is made good by 2**-14, so that halves go up (the next number of 16 bits is further away than that).
    A number below 256 added to 2**23 and rounded down has its floor as the low byte.
    """
    distance = tl.fma(x, factor, 0.50006103515625 - minimum * factor) if FUSED else (x - minimum) * factor + 0.5
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
            [distance],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return distance.to(tl.uint8)


@triton.jit
def _merge_nibbles(low, high, ASM: tl.constexpr):
    """Two 4-bit codes in one byte."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mad.lo.u32 $0, $2, 16, $1;", "=r,r,r", [low, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        return low | (high << 4)


@triton.jit
def store_codes(
    target, low, high, low_scale, high_scale, mask,
    SPAN: tl.constexpr, BITS: tl.constexpr, FUSED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes of both half pages, float32 tiles, packed as `SlotLayout` says; the high half's bytes lie SPAN further on.

    low_scale, high_scale: (minimum, factor), tiles or what broadcasts to them.
    """
    low_codes = _codes(low, low_scale[0], low_scale[1], FUSED, ASM)
    high_codes = _codes(high, high_scale[0], high_scale[1], FUSED, ASM)
    if BITS == 4:
        tl.store(target, _merge_nibbles(low_codes, high_codes, ASM), mask=mask)
    else:
        tl.store(target, low_codes, mask=mask)
        tl.store(target + SPAN, high_codes, mask=mask)
