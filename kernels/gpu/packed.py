"""Pieces of kernels that read quantized pages with one warp a program, in Gluon: layouts are chosen so that codes, once in shared
memory, go straight to the matrix unit's registers.

- Codes are multiplied as they are: under a zero exponent a code c is the fp16 subnormal c * 2**-24, exact, so that unpacking is
  one `and` for two codes. Steps are folded into the other operand: the key step into the query, per logical page; the value step into the
  probability. Key minima come first, as the accumulator's start; value minima last, as one number per query head.
- Scores are computed transposed, tokens x query heads (8 or 16 columns), so that little of the matrix unit is padding.
- A lane loads 16 contiguous bytes of a row. What the matrix unit calls channel or token k is then whatever the lane holds: the
  orders of contracted channels and tokens are free as long as both operands agree.
- Pages wait in a ring in shared memory, several copies in flight, so that registers hold only the page at work.

Word w of a row holds channels 4w to 4w + 3. In a half page, token t = 4j + i is row r = 8i + j of the scores.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..slot_layout import SlotLayout

def supports(layout: SlotLayout, query: torch.Tensor, tail: torch.Tensor, group_size: int) -> bool:
    """Whether this kernel covers a case; the portable one covers all."""
    return (
        layout.key_bits <= 8
        and layout.head_dim in (64, 128, 256)
        and layout.logical_page_size >= 32
        and query.dtype == tail.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and group_size <= 16
    )


def programs_per_multiprocessor(ring_bytes: int, most: int) -> int:
    """Programs of one warp that fit a multiprocessor's 227 KB of shared memory, each with a ring and a tile for the tail beside it."""
    return max(min(227 * 1024 // (ring_bytes + 3072), most), 1)


@gluon.constexpr_function
def bases(*parts):
    """Layout bases: (stride, first bit, number of bits, dim) runs, as pairs for two dims."""
    bases = []
    for dim, values in parts:
        for value in values:
            bases.append([value, 0] if dim == 0 else [0, value])
    return bases


@gluon.constexpr_function
def key_layout(words):
    """Key words [32 tokens, words]: lane bits 0, 1 choose a 16-byte column, bits 2 to 4 the token's j."""
    far = [16 << i for i in range((words // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        bases((1, [1, 2]), (1, far), (0, [1, 2])), bases((1, [4, 8]), (0, [4, 8, 16])), [], [], [32, words]
    )


@gluon.constexpr_function
def value_layout(words):
    """Value words [32 tokens, words]: lane bits 0, 1 choose the token's high bits, bits 2 to 4 a column of up to 16 bytes."""
    inner = min(4, words // 8)
    near = [1 << i for i in range(inner.bit_length() - 1)]
    far = [8 * inner << i for i in range((words // (8 * inner)).bit_length() - 1)]
    lanes = [inner, 2 * inner, 4 * inner]
    return gl.DistributedLinearLayout(
        bases((1, near), (1, far), (0, [1, 2, 4])), bases((0, [8, 16]), (1, lanes)), [], [], [32, words]
    )


@gluon.jit
def and_pairs(words, BITS: gl.constexpr):
    """Codes of words as subnormal fp16, by byte: the low nibbles' four, then (4 bits only) the high nibbles', times 16."""
    if BITS == 4:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 s, t;
            shr.u32 s, $8, 8;
            and.b32 t, $8, 0x000F000F;
            mov.b32 {$0, $2}, t;
            and.b32 t, s, 0x000F000F;
            mov.b32 {$1, $3}, t;
            and.b32 t, $8, 0x00F000F0;
            mov.b32 {$4, $6}, t;
            and.b32 t, s, 0x00F000F0;
            mov.b32 {$5, $7}, t;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r",
            [words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 s, t;
            shr.u32 s, $4, 8;
            and.b32 t, $4, 0x00FF00FF;
            mov.b32 {$0, $2}, t;
            and.b32 t, s, 0x00FF00FF;
            mov.b32 {$1, $3}, t;
            }""",
            "=&h,=&h,=&h,=&h,r",
            [words],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=1,
        )


@gluon.jit
def key_operand(b0, b1, b2, b3, LAYOUT: gl.constexpr):
    """Four bytes' codes [32, words] to the left operand [32 rows, D]; column k is channel `key_channel(k)`."""
    words: gl.constexpr = b0.shape[1]
    x = gl.join(gl.join(b0, b1), gl.join(b2, b3))
    x = gl.reshape(x, [8, 4, words // 16, 4, 4, 2, 2])
    x = gl.permute(x, [1, 0, 2, 4, 5, 3, 6])
    return gl.convert_layout(gl.reshape(x, [32, words * 4]), LAYOUT)


@gluon.jit
def key_channel(k):
    """The channel that column k of a key operand holds."""
    return k // 64 * 64 + k // 2 % 4 * 16 + k // 16 % 4 * 4 + k % 2 * 2 + k // 8 % 2


@gluon.jit
def halves(words):
    """int32 [n] to the fp16 [2n] that it holds."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [2 * words.shape[0]])


@gluon.jit
def in_key_order(x, D: gl.constexpr):
    """A vector [D] by channel to one by column k."""
    x = gl.reshape(x, [D // 64, 4, 4, 2, 2])
    return gl.reshape(gl.permute(x, [0, 2, 4, 1, 3]), [D])


@gluon.jit
def token_pairs(a, b, BITS: gl.constexpr):
    """Codes of words of two tokens as subnormal fp16, by byte: (token a, token b) four times; at 4 bits then the high nibbles'."""
    if BITS == 4:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 p, t;
            prmt.b32 p, $16, $17, 0x4440;
            and.b32 t, p, 0x000F000F;
            mov.b32 {$0, $1}, t;
            and.b32 t, p, 0x00F000F0;
            mov.b32 {$8, $9}, t;
            prmt.b32 p, $16, $17, 0x5551;
            and.b32 t, p, 0x000F000F;
            mov.b32 {$2, $3}, t;
            and.b32 t, p, 0x00F000F0;
            mov.b32 {$10, $11}, t;
            prmt.b32 p, $16, $17, 0x6662;
            and.b32 t, p, 0x000F000F;
            mov.b32 {$4, $5}, t;
            and.b32 t, p, 0x00F000F0;
            mov.b32 {$12, $13}, t;
            prmt.b32 p, $16, $17, 0x7773;
            and.b32 t, p, 0x000F000F;
            mov.b32 {$6, $7}, t;
            and.b32 t, p, 0x00F000F0;
            mov.b32 {$14, $15}, t;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [a, b],
            dtype=(
                gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16,
                gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16,
            ),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 p, t;
            prmt.b32 p, $8, $9, 0x4440;
            and.b32 t, p, 0x00FF00FF;
            mov.b32 {$0, $1}, t;
            prmt.b32 p, $8, $9, 0x5551;
            and.b32 t, p, 0x00FF00FF;
            mov.b32 {$2, $3}, t;
            prmt.b32 p, $8, $9, 0x6662;
            and.b32 t, p, 0x00FF00FF;
            mov.b32 {$4, $5}, t;
            prmt.b32 p, $8, $9, 0x7773;
            and.b32 t, p, 0x00FF00FF;
            mov.b32 {$6, $7}, t;
            }""",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r",
            [a, b],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True,
            pack=1,
        )


@gluon.jit
def split_tokens(words):
    """Words [32 tokens, words] to those of tokens with bit 2 clear and set, [4 (bits 4, 3), 4 (bits 1, 0), words] each."""
    x = gl.reshape(words, [4, 2, 4, words.shape[1]])
    return gl.split(gl.permute(x, [0, 2, 3, 1]))


@gluon.jit
def value_operand(a0, b0, a1, b1, a2, b2, a3, b3, LAYOUT: gl.constexpr):
    """Codes of tokens a, b by byte to the left operand [D rows, 32 tokens in the scores' row order]; row m is channel `value_channel(m)`."""
    words: gl.constexpr = a0.shape[2]
    inner: gl.constexpr = 4 if words >= 32 else words // 8
    x = gl.join(gl.join(gl.join(a0, b0), gl.join(a1, b1)), gl.join(gl.join(a2, b2), gl.join(a3, b3)))
    # dims: bits 4, 3 | bits 1, 0 | outer words, 8 words, inner words | bit 2 | byte bit 0 | byte bit 1
    x = gl.reshape(x, [4, 4, words // (8 * inner), 8, inner, 2, 2, 2])
    x = gl.permute(x, [2, 7, 6, 4, 3, 1, 0, 5])
    return gl.convert_layout(gl.reshape(x, [words * 4, 32]), LAYOUT)


@gluon.jit
def value_channel(m, D: gl.constexpr):
    """The channel that row m of a value operand holds."""
    inner: gl.constexpr = 4 if D >= 128 else D // 32
    word = m // (32 * inner) * (8 * inner) + m % 8 * inner + m // 8 % inner
    return word * 4 + m // (16 * inner) % 2 * 2 + m // (8 * inner) % 2


@gluon.jit
def in_value_order(x, D: gl.constexpr):
    """A tile [tokens, D] by channel to [D, tokens] by row m."""
    inner: gl.constexpr = 4 if D >= 128 else D // 32
    tokens: gl.constexpr = x.shape[0]
    x = gl.reshape(x, [tokens, D // (32 * inner), 8, inner, 2, 2])
    return gl.reshape(gl.permute(x, [1, 4, 5, 3, 2, 0]), [D, tokens])


@gluon.jit
def as_operand(p, LAYOUT: gl.constexpr):
    """Probabilities fp16 [32 rows, N] from the accumulator's layout to the right operand's: each 8 x 8 tile turned within the warp."""
    n: gl.constexpr = p.shape[1]
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=gl.float16, is_pure=True, pack=2
    )
    x = gl.permute(gl.reshape(turned, [4, 8, n // 8, 8]), [0, 3, 2, 1])
    return gl.convert_layout(gl.reshape(x, [32, n]), LAYOUT)


@gluon.jit
def times(x, y):
    """fp16 product, two at a time."""
    return gl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def like(x, y):
    """fp16 x, broadcast to y's shape."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def in_row_order(x):
    """A vector over a half page's 32 tokens to one over the scores' rows."""
    return gl.reshape(gl.permute(gl.reshape(x, [8, 4]), [1, 0]), [32])


@gluon.jit
def twice(x, LAYOUT: gl.constexpr):
    """[16, N] stacked on itself, [32, N]."""
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(x, x), [2, 0, 1]), [32, x.shape[1]]), LAYOUT)


@gluon.jit
def folded(x):
    """[32, N] summed to [8, N] within each lane."""
    return gl.sum(gl.reshape(x, [4, 8, x.shape[1]]), 0)


@gluon.jit
def power_of_two_above(x):
    """A power of two above x (float32, not negative): 1 for 0 and for subnormals."""
    bits = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return gl.where(bits < 0x01000000, 1.0, bits.to(gl.float32, bitcast=True))


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
    """Per-channel fp16 pairs [words], as `in_key_order` and the right operand want them: lane bits 0, 1 choose 8 words."""
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
def scores(
    k, key_range, GROUP: gl.constexpr, q_unit, FACTOR: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    A: gl.constexpr, B: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Raw scores [32, N] of a half page: codes times (query times step), from the minima on; times 2**-24 (and FACTOR).

    k: the codes as left operand. key_range: the page's minima then steps in shared memory, [GROUPS * D] words; GROUP is the logical page.
    """
    n: gl.constexpr = q_unit.shape[1]
    CHANNELS: gl.constexpr = channel_layout(D // 2)
    minimum = halves(key_range.slice(GROUP * (D // 2), D // 2).load(CHANNELS))
    minimum = gl.convert_layout(in_key_order(minimum, D), gl.SliceLayout(0, A))
    rows = like(gl.expand_dims(minimum, 0), gl.full([16, D], 0.0, gl.float16, A))
    first = mma_v2(rows, q_unit, gl.full([16, n], 0.0, gl.float32, C))
    first = twice(first * (FACTOR * 5.9604644775390625e-08), C)
    step = halves(key_range.slice((GROUPS + GROUP) * (D // 2), D // 2).load(CHANNELS))
    step = gl.convert_layout(in_key_order(step, D), gl.SliceLayout(1, B))
    return mma_v2(k, times(q_unit, gl.expand_dims(step, 1)), first)


@gluon.jit
def page_scores(
    keys, key_range, q_unit, BITS: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    A: gl.constexpr, B: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Scores of both half pages, [32, N] each, times 2**-24, from a page's key words [32 or 64, D / 4] and ranges in shared memory."""
    LAYOUT: gl.constexpr = key_layout(D // 4)
    if BITS == 4:
        b0, b1, b2, b3, c0, c1, c2, c3 = and_pairs(keys.load(LAYOUT), 4)
        low = scores(key_operand(b0, b1, b2, b3, A), key_range, 0, q_unit, 1.0, D, GROUPS, A, B, C)
        high = scores(key_operand(c0, c1, c2, c3, A), key_range, GROUPS - 1, q_unit, 16.0, D, GROUPS, A, B, C)
        return low, high * 0.0625
    else:
        b0, b1, b2, b3 = and_pairs(keys.slice(0, 32).load(LAYOUT), 8)
        low = scores(key_operand(b0, b1, b2, b3, A), key_range, 0, q_unit, 1.0, D, GROUPS, A, B, C)
        c0, c1, c2, c3 = and_pairs(keys.slice(32, 32).load(LAYOUT), 8)
        high = scores(key_operand(c0, c1, c2, c3, A), key_range, GROUPS - 1, q_unit, 1.0, D, GROUPS, A, B, C)
        return low, high


@gluon.jit
def weighted_values(values, p_low, p_high, acc, BITS: gl.constexpr, D: gl.constexpr, A: gl.constexpr):
    """acc [D, N] plus values times probabilities (right operands [32, N] of both halves, value step folded in), times 2**-24.

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
