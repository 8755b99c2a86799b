"""Slot bytes to numbers inside kernels: unpacking and dequantization in registers.

Half pages are the unit: `low` is a page's first P/2 tokens, `high` the rest, because a 4-bit byte holds one token of
each.
In half precision the codes never pass through an integer conversion: a byte b under the high byte 0x64 is the fp16
number 1024 + b (its low nibble alone 1024 + n, its high nibble 1024 + 16 n), so two codes cost a permute, a
subtraction and a fused multiply-add.
"""

import torch
import triton
import triton.language as tl

from ..slot_layout import SlotLayout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows no inline assembly."""


def math_dtype(layout: SlotLayout, query_dtype: torch.dtype) -> tl.dtype:
    """The operand dtype of products with a page's keys and values; products always accumulate in float32.

    Quantized pages are read in fp16 (finer than bf16, and the range is enough by the format: minimum and step are
    fp16); bf16 pages in bf16; anything with float32 in it in float32.
    """
    if query_dtype == torch.float32 or layout.kv_dtype == "float32":
        return tl.float32
    if layout.kv_dtype == "bf16":
        return tl.bfloat16 if query_dtype == torch.bfloat16 else tl.float32
    return tl.float16


def pool_views(pool: torch.Tensor, layout: SlotLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool uint8 [pages, slots, slot_bytes] as its codes' dtype and as fp16 (minimum, step)."""
    return pool if layout.float_dtype is None else pool.view(layout.float_dtype), pool.view(torch.float16)


@triton.jit
def load_codes(base, offset, row_stride: tl.constexpr, rows, columns, COLUMNS: tl.constexpr, keep):
    """A [rows, columns] tile of codes or floats at element `offset`; columns from COLUMNS on and tiles not kept read
    as 0.
    """
    mask = (columns < COLUMNS)[None, :] & keep
    return tl.load(
        base + tl.multiple_of(offset, 16) + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0
    )


@triton.jit
def load_halves(
    base, offset, columns, COLUMNS: tl.constexpr, LOGICAL: tl.constexpr, HALF: tl.constexpr, HIGH: tl.constexpr, keep
):
    """Key minimum or step of the low or high half page, fp16 [columns] or, where a half has several logical pages,
    [HALF, columns].
    """
    if LOGICAL >= HALF:
        group: tl.constexpr = HIGH * HALF // LOGICAL
        return tl.load(
            base + tl.multiple_of(offset, 8) + group * COLUMNS + columns, mask=(columns < COLUMNS) & keep, other=0
        )
    else:
        groups = HIGH * (HALF // LOGICAL) + tl.arange(0, HALF) // LOGICAL
        mask = (columns < COLUMNS)[None, :] & keep
        return tl.load(
            base + tl.multiple_of(offset, 8) + groups[:, None] * COLUMNS + columns[None, :], mask=mask, other=0
        )


@triton.jit
def _dequantize_low_high(low, high, low_step, low_min, high_step, high_min, DTYPE: tl.constexpr):
    low = low.to(tl.float32) * low_step.to(tl.float32) + low_min.to(tl.float32)
    high = high.to(tl.float32) * high_step.to(tl.float32) + high_min.to(tl.float32)
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def _fma4(codes, step, minimum):
    """Four uint8 codes a register to fp16 minimum + step * code."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, bias;
        mov.b32 bias, 0x64006400;
        prmt.b32 a, $2, 0x64646464, 0x4140;
        prmt.b32 b, $2, 0x64646464, 0x4342;
        sub.f16x2 a, a, bias;
        sub.f16x2 b, b, bias;
        fma.rn.f16x2 $0, a, $3, $5;
        fma.rn.f16x2 $1, b, $4, $6;
        }""",
        "=&r,=&r,r,r,r,r,r",
        [codes, step, minimum],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _fma8(codes, low_step, low_min, high_step, high_min):
    """Four bytes of two codes each a register to fp16 minimum + step * code, low and high nibbles apart."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 n, a, b, bias, scale, shift;
        mov.b32 bias, 0x64006400;
        and.b32 n, $4, 0x0F0F0F0F;
        prmt.b32 a, n, 0x64646464, 0x4140;
        prmt.b32 b, n, 0x64646464, 0x4342;
        sub.f16x2 a, a, bias;
        sub.f16x2 b, b, bias;
        fma.rn.f16x2 $0, a, $5, $7;
        fma.rn.f16x2 $1, b, $6, $8;
        mov.b32 scale, 0x2C002C00;
        mov.b32 shift, 0xD400D400;
        and.b32 n, $4, 0xF0F0F0F0;
        prmt.b32 a, n, 0x64646464, 0x4140;
        prmt.b32 b, n, 0x64646464, 0x4342;
        fma.rn.f16x2 a, a, scale, shift;
        fma.rn.f16x2 b, b, scale, shift;
        fma.rn.f16x2 $2, a, $9, $11;
        fma.rn.f16x2 $3, b, $10, $12;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [codes, low_step, low_min, high_step, high_min],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def tile(x, ALONG_COLUMNS: tl.constexpr):
    """A vector as a row or a column of a tile; tiles as they are."""
    if len(x.shape) == 2:
        return x
    elif ALONG_COLUMNS:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def dequantize(
    first, second, low_step, low_min, high_step, high_min,
    BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Both half pages [P/2, D] as DTYPE.

    first, second: the halves' codes (or floats); at 4 bits `first` holds both and `second` is ignored, as are steps
    and minima at 16 and 32 bits, which else are vectors per channel or per token, or whole tiles.
    ASM: use packed arithmetic (fp16 only), which the interpreter lacks.
    """
    if BITS < 16:
        low_step, low_min = tile(low_step, PER_CHANNEL), tile(low_min, PER_CHANNEL)
        high_step, high_min = tile(high_step, PER_CHANNEL), tile(high_min, PER_CHANNEL)
    if BITS >= 16:
        return first.to(DTYPE), second.to(DTYPE)
    elif ASM and tl.float16 == DTYPE and BITS == 8:
        return _fma4(first, low_step, low_min), _fma4(second, high_step, high_min)
    elif ASM and tl.float16 == DTYPE:
        return _fma8(first, low_step, low_min, high_step, high_min)
    elif BITS == 8:
        return _dequantize_low_high(first, second, low_step, low_min, high_step, high_min, DTYPE)
    else:
        return _dequantize_low_high(first & 15, first >> 4, low_step, low_min, high_step, high_min, DTYPE)
