"""From words of codes to operands of the matrix unit and back, all within a lane's registers (see `packed.py`).

Word w of a row holds channels 4w to 4w + 3. In a half page, token t = 4j + i is row r = 8i + j of the scores.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
    """Value words [32 tokens, words]: lane bits 0, 1 choose the token's high bits, bits 2 to 4 a column of up to 16
    bytes.
    """
    inner = min(4, words // 8)
    near = [1 << i for i in range(inner.bit_length() - 1)]
    far = [8 * inner << i for i in range((words // (8 * inner)).bit_length() - 1)]
    lanes = [inner, 2 * inner, 4 * inner]
    return gl.DistributedLinearLayout(
        bases((1, near), (1, far), (0, [1, 2, 4])), bases((0, [8, 16]), (1, lanes)), [], [], [32, words]
    )


@gluon.jit
def and_pairs(words, BITS: gl.constexpr):
    """Codes of words as subnormal fp16, by byte: the low nibbles' four, then (4 bits only) the high nibbles', times
    16.
    """
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
    """Codes of words of two tokens as subnormal fp16, by byte: (token a, token b) four times; at 4 bits then the high
    nibbles'.
    """
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
    """Words [32 tokens, words] to those of tokens with bit 2 clear and set, [4 (bits 4, 3), 4 (bits 1, 0), words]
    each.
    """
    x = gl.reshape(words, [4, 2, 4, words.shape[1]])
    return gl.split(gl.permute(x, [0, 2, 3, 1]))


@gluon.jit
def value_operand(a0, b0, a1, b1, a2, b2, a3, b3, LAYOUT: gl.constexpr):
    """Codes of tokens a, b by byte to the left operand [D rows, 32 tokens in the scores' row order]; row m is channel
    `value_channel(m)`.
    """
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
    """Probabilities fp16 [32 rows, N] from the accumulator's layout to the right operand's: each 8 x 8 tile turned
    within the warp.
    """
    n: gl.constexpr = p.shape[1]
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=gl.float16, is_pure=True, pack=2
    )
    x = gl.permute(gl.reshape(turned, [4, 8, n // 8, 8]), [0, 3, 2, 1])
    return gl.convert_layout(gl.reshape(x, [32, n]), LAYOUT)


@gluon.jit
def times(x, y):
    """fp16 product, two at a time."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def like(x, y):
    """fp16 x, broadcast to y's shape."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def in_row_order(x):
    """A vector over a half page's 32 tokens to one over the scores' rows."""
    return gl.reshape(gl.permute(gl.reshape(x, [8, 4]), [1, 0]), [32])


@gluon.jit
def four_times(x, LAYOUT: gl.constexpr):
    """[8, N] stacked four times, [32, N]."""
    x = gl.join(gl.join(x, x), gl.join(x, x))
    return gl.convert_layout(gl.reshape(gl.permute(x, [2, 3, 0, 1]), [32, x.shape[1]]), LAYOUT)


@gluon.jit
def folded(x):
    """[32, N] summed to [8, N] within each lane."""
    return gl.sum(gl.reshape(x, [4, 8, x.shape[1]]), 0)


@gluon.jit
def power_of_two_above(x):
    """A power of two above x (float32, not negative): 1 for 0 and for subnormals."""
    bits = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return gl.where(bits < 0x01000000, 1.0, bits.to(gl.float32, bitcast=True))
