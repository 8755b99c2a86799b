"""Decode attention of quantized pages, one warp a program, in Gluon: layouts are chosen so that codes go from global memory to the
matrix unit's registers without a detour.

- Codes are multiplied as they are: under a zero exponent a code c is the fp16 subnormal c * 2**-24, exact, so that unpacking is
  one `and` for two codes. Steps are folded into the other operand: the key step into the query, per logical page; the value step into the
  probability. Key minima come first, as the accumulator's start; value minima last, as one number per query head.
- Scores are computed transposed, tokens x query heads (8 or 16 columns), so that little of the matrix unit is padding.
- A lane loads 16 contiguous bytes of a row. What the matrix unit calls channel or token k is then whatever the lane holds: the
  orders of contracted channels and tokens are free as long as both operands agree.

Word w of a row holds channels 4w to 4w + 3. In a half page, token t = 4j + i is row r = 8i + j of the scores.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..slot_layout import SlotLayout
from . import work

always_kept = gluon.jit(work.always_kept.fn)
first_window_page = gluon.jit(work.first_window_page.fn)
listed_pages = gluon.jit(work.listed_pages.fn)
sealed_pages = gluon.jit(work.sealed_pages.fn)
sequence_of = gluon.jit(work.sequence_of.fn)

PROGRAMS_PER_MULTIPROCESSOR = 12


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


@gluon.constexpr_function
def _bases(*parts):
    """Layout bases: (stride, first bit, number of bits, dim) runs, as pairs for two dims."""
    bases = []
    for dim, values in parts:
        for value in values:
            bases.append([value, 0] if dim == 0 else [0, value])
    return bases


@gluon.constexpr_function
def _key_layout(words):
    """Key words [32 tokens, words]: lane bits 0, 1 choose a 16-byte column, bits 2 to 4 the token's j."""
    far = [16 << i for i in range((words // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        _bases((1, [1, 2]), (1, far), (0, [1, 2])), _bases((1, [4, 8]), (0, [4, 8, 16])), [], [], [32, words]
    )


@gluon.constexpr_function
def _value_layout(words):
    """Value words [32 tokens, words]: lane bits 0, 1 choose the token's high bits, bits 2 to 4 a column of up to 16 bytes."""
    inner = min(4, words // 8)
    near = [1 << i for i in range(inner.bit_length() - 1)]
    far = [8 * inner << i for i in range((words // (8 * inner)).bit_length() - 1)]
    lanes = [inner, 2 * inner, 4 * inner]
    return gl.DistributedLinearLayout(
        _bases((1, near), (1, far), (0, [1, 2, 4])), _bases((0, [8, 16]), (1, lanes)), [], [], [32, words]
    )


@gluon.jit
def _and_pairs(words, BITS: gl.constexpr):
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
def _key_operand(b0, b1, b2, b3, LAYOUT: gl.constexpr):
    """Four bytes' codes [32, words] to the left operand [32 rows, D]; column k is channel `_key_channel(k)`."""
    words: gl.constexpr = b0.shape[1]
    x = gl.join(gl.join(b0, b1), gl.join(b2, b3))
    x = gl.reshape(x, [8, 4, words // 16, 4, 4, 2, 2])
    x = gl.permute(x, [1, 0, 2, 4, 5, 3, 6])
    return gl.convert_layout(gl.reshape(x, [32, words * 4]), LAYOUT)


@gluon.jit
def _key_channel(k):
    """The channel that column k of a key operand holds."""
    return k // 64 * 64 + k // 2 % 4 * 16 + k // 16 % 4 * 4 + k % 2 * 2 + k // 8 % 2


@gluon.jit
def _halves(words):
    """int32 [n] to the fp16 [2n] that it holds."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [2 * words.shape[0]])


@gluon.jit
def _in_key_order(x, D: gl.constexpr):
    """A vector [D] by channel to one by column k."""
    x = gl.reshape(x, [D // 64, 4, 4, 2, 2])
    return gl.reshape(gl.permute(x, [0, 2, 4, 1, 3]), [D])


@gluon.jit
def _token_pairs(a, b, BITS: gl.constexpr):
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
def _split_tokens(words):
    """Words [32 tokens, words] to those of tokens with bit 2 clear and set, [4 (bits 4, 3), 4 (bits 1, 0), words] each."""
    x = gl.reshape(words, [4, 2, 4, words.shape[1]])
    return gl.split(gl.permute(x, [0, 2, 3, 1]))


@gluon.jit
def _value_operand(a0, b0, a1, b1, a2, b2, a3, b3, LAYOUT: gl.constexpr):
    """Codes of tokens a, b by byte to the left operand [D rows, 32 tokens in the scores' row order]; row m is channel `_value_channel(m)`."""
    words: gl.constexpr = a0.shape[2]
    inner: gl.constexpr = 4 if words >= 32 else words // 8
    x = gl.join(gl.join(gl.join(a0, b0), gl.join(a1, b1)), gl.join(gl.join(a2, b2), gl.join(a3, b3)))
    # dims: bits 4, 3 | bits 1, 0 | outer words, 8 words, inner words | bit 2 | byte bit 0 | byte bit 1
    x = gl.reshape(x, [4, 4, words // (8 * inner), 8, inner, 2, 2, 2])
    x = gl.permute(x, [2, 7, 6, 4, 3, 1, 0, 5])
    return gl.convert_layout(gl.reshape(x, [words * 4, 32]), LAYOUT)


@gluon.jit
def _value_channel(m, D: gl.constexpr):
    """The channel that row m of a value operand holds."""
    inner: gl.constexpr = 4 if D >= 128 else D // 32
    word = m // (32 * inner) * (8 * inner) + m % 8 * inner + m // 8 % inner
    return word * 4 + m // (16 * inner) % 2 * 2 + m // (8 * inner) % 2


@gluon.jit
def _in_value_order(x, D: gl.constexpr):
    """A tile [tokens, D] by channel to [D, tokens] by row m."""
    inner: gl.constexpr = 4 if D >= 128 else D // 32
    tokens: gl.constexpr = x.shape[0]
    x = gl.reshape(x, [tokens, D // (32 * inner), 8, inner, 2, 2])
    return gl.reshape(gl.permute(x, [1, 4, 5, 3, 2, 0]), [D, tokens])


@gluon.jit
def _as_operand(p, LAYOUT: gl.constexpr):
    """Probabilities fp16 [32 rows, N] from the accumulator's layout to the right operand's: each 8 x 8 tile turned within the warp."""
    n: gl.constexpr = p.shape[1]
    turned = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [p], dtype=gl.float16, is_pure=True, pack=2
    )
    x = gl.permute(gl.reshape(turned, [4, 8, n // 8, 8]), [0, 3, 2, 1])
    return gl.convert_layout(gl.reshape(x, [32, n]), LAYOUT)


@gluon.jit
def _times(x, y):
    """fp16 product, two at a time."""
    return gl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _like(x, y):
    """fp16 x, broadcast to y's shape."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, y], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _in_row_order(x):
    """A vector over a half page's 32 tokens to one over the scores' rows."""
    return gl.reshape(gl.permute(gl.reshape(x, [8, 4]), [1, 0]), [32])


@gluon.jit
def _twice(x, LAYOUT: gl.constexpr):
    """[16, N] stacked on itself, [32, N]."""
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(x, x), [2, 0, 1]), [32, x.shape[1]]), LAYOUT)


@gluon.jit
def _folded(x):
    """[32, N] summed to [8, N] within each lane."""
    return gl.sum(gl.reshape(x, [4, 8, x.shape[1]]), 0)


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _power_of_two_above(x):
    """A power of two above x (float32, not negative): 1 for 0 and for subnormals."""
    bits = (x.to(gl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return gl.where(bits < 0x01000000, 1.0, bits.to(gl.float32, bitcast=True))


@gluon.jit
def _page_id(table, chosen, j, is_chosen, num_first, gap):
    """Page id and index of a list's entry j: chosen pages by the selection; else pages 0, 1, ... with a gap after num_first."""
    index = j + gl.where(j >= num_first, gap, 0)
    if is_chosen:
        index = gl.load(chosen + j)
    return gl.load(table + index).to(gl.int64), index


@gluon.jit
def _scores(k, ks, km, q_unit, FACTOR: gl.constexpr, A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """Raw scores [32, N] of a half page: codes times (query times step), from the minima on; times 2**-24 (and FACTOR)."""
    K_A: gl.constexpr = gl.SliceLayout(0, A)
    K_B: gl.constexpr = gl.SliceLayout(1, B)
    n: gl.constexpr = q_unit.shape[1]
    minimum = gl.convert_layout(_in_key_order(_halves(km), D), K_A)
    rows = _like(gl.expand_dims(minimum, 0), gl.full([16, D], 0.0, gl.float16, A))
    first = mma_v2(rows, q_unit, gl.full([16, n], 0.0, gl.float32, C))
    first = _twice(first * (FACTOR * 5.9604644775390625e-08), C)
    step = gl.expand_dims(gl.convert_layout(_in_key_order(_halves(ks), D), K_B), 1)
    return mma_v2(k, _times(q_unit, step), first)


@gluon.jit
def _decode_packed_kernel(
    query, out, partial_out, partial_max, partial_sum,
    retrieval_words, retrieval_half, streaming_words, streaming_half, head_slots, retrieval_heads, streaming_heads,
    rows_of, positions, budgets, retrieval_table, streaming_table, chosen_pages, chosen_counts, tail_key, tail_value,
    num_batch, scale, sink_size, window,
    query_stride_b, query_stride_h, out_stride_b, out_stride_h,
    retrieval_page_stride, streaming_page_stride, slot_stride, retrieval_table_stride, streaming_table_stride,
    chosen_stride_r, chosen_stride_h, count_stride_r,
    tk_stride_r, tk_stride_h, tk_stride_t, tv_stride_r, tv_stride_h, tv_stride_t,
    RETRIEVAL: gl.constexpr, STREAMING: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, LOGICAL: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    KEY_MIN: gl.constexpr, KEY_STEP: gl.constexpr, VALUE_CODES: gl.constexpr, VALUE_MIN: gl.constexpr, VALUE_STEP: gl.constexpr,
    BLOCK_B: gl.constexpr, MIN_UNITS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    P: gl.constexpr = 64
    W: gl.constexpr = D // 4
    heads: gl.constexpr = RETRIEVAL + STREAMING
    C: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    KEY: gl.constexpr = _key_layout(W)
    VALUE: gl.constexpr = _value_layout(W)
    COLUMN: gl.constexpr = gl.SliceLayout(0, C)
    ROW: gl.constexpr = gl.SliceLayout(1, C)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    CHANNELS: gl.constexpr = gl.BlockedLayout([D // 64], [32], [1], [0])
    TOKENS: gl.constexpr = gl.DistributedLinearLayout([[1], [2]], [[0], [0], [4], [8], [16]], [], [], [32])
    BOOST: gl.constexpr = 14.0

    program = gl.program_id(0)
    sink_pages = (sink_size + P - 1) // P
    lines = gl.arange(0, BLOCK_B, LINE)
    every_position = gl.load(positions + lines, mask=lines < num_batch, other=0)
    every_budget = gl.load(budgets + lines, mask=lines < num_batch, other=0)
    units = RETRIEVAL * (listed_pages(every_position, every_budget, sink_pages, window, P) + 1)
    units += STREAMING * (always_kept(every_position, sink_pages, window, P) + 1)
    ends = gl.associative_scan(gl.where(lines < num_batch, units, 0), 0, _add)
    total = gl.max(ends, 0)
    programs = gl.num_programs(0)
    run = gl.maximum((total + programs - 1) // programs, MIN_UNITS)
    unit = program * run
    last = gl.minimum(unit + run, total)

    n_b = gl.arange(0, N, gl.SliceLayout(0, B))
    k_b = _key_channel(gl.arange(0, D, gl.SliceLayout(1, B)))
    column = gl.arange(0, N, COLUMN)
    m_row = _value_channel(gl.arange(0, D, ROW), D)
    key_token = gl.arange(0, 32, gl.SliceLayout(1, KEY))
    key_word = gl.arange(0, W, gl.SliceLayout(0, KEY))
    key_at = gl.expand_dims(key_token, 1) * W + gl.expand_dims(key_word, 0)
    value_token = gl.arange(0, 32, gl.SliceLayout(1, VALUE))
    value_word = gl.arange(0, W, gl.SliceLayout(0, VALUE))
    value_at = gl.expand_dims(value_token, 1) * W + gl.expand_dims(value_word, 0)
    channel = gl.arange(0, D // 2, CHANNELS)
    token = gl.arange(0, 32, TOKENS)
    row_token = gl.arange(0, 32, ROW)
    row_token = row_token % 8 * 4 + row_token // 8

    while unit < last:
        b, first = sequence_of(ends, unit)
        position = gl.load(positions + b)
        budget = gl.load(budgets + b)
        row = gl.load(rows_of + b).to(gl.int64)
        sealed = sealed_pages(position, P)
        listed = listed_pages(position, budget, sink_pages, window, P)
        offset = unit - first
        is_streaming = offset >= RETRIEVAL * (listed + 1)
        is_chosen = sealed < 0
        if is_streaming:
            length = always_kept(position, sink_pages, window, P)
            offset -= RETRIEVAL * (listed + 1)
            order = RETRIEVAL + offset // (length + 1)
            start = offset % (length + 1)
            head = gl.load(streaming_heads + offset // (length + 1)).to(gl.int32)
            count = length
            num_first = sealed * 0 + sink_pages
            gap = gl.maximum(first_window_page(position, window, P), sink_pages) - sink_pages
            near = sealed * 0 + sink_size
            far = (position - window + 1).to(gl.int32)
        else:
            length = listed
            order = offset // (length + 1)
            start = offset % (length + 1)
            head = gl.load(retrieval_heads + order).to(gl.int32)
            is_chosen = sealed + 1 > budget
            count = length
            if is_chosen:
                count = gl.load(chosen_counts + row * count_stride_r + head)
            num_first = sealed * 0
            gap = sealed * 0
            near = sealed * P
            far = sealed * 0
        words = retrieval_words
        half = retrieval_half
        page_stride = retrieval_page_stride.to(gl.int64)
        table = retrieval_table + b.to(gl.int64) * retrieval_table_stride
        if is_streaming:
            words = streaming_words
            half = streaming_half
            page_stride = streaming_page_stride.to(gl.int64)
            table = streaming_table + b.to(gl.int64) * streaming_table_stride
        chosen = chosen_pages + row * chosen_stride_r + head * chosen_stride_h
        slot = gl.load(head_slots + head).to(gl.int64) * slot_stride
        stop = gl.minimum(start + last - unit, length + 1)
        unit += stop - start
        last_page = gl.minimum(stop, count)

        q_line = query + b.to(gl.int64) * query_stride_b + (head * GROUP + n_b) * query_stride_h
        q_mask = gl.expand_dims(n_b < GROUP, 0) & gl.expand_dims(k_b >= 0, 1)
        q = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_b, 1), mask=q_mask, other=0.0).to(gl.float32)
        unit_of_q = _power_of_two_above(gl.max(gl.abs(q), 0))
        q_unit = (q / gl.expand_dims(unit_of_q, 0)).to(gl.float16)
        factor = gl.expand_dims(gl.convert_layout(unit_of_q, COLUMN) * (scale * 16777216.0), 0)
        highest = gl.full([N], float("-inf"), gl.float32, COLUMN)
        weight = _folded(gl.full([32, N], 0.0, gl.float32, C))
        minima = weight
        acc = gl.full([D, N], 0.0, gl.float32, C)
        value_unit = sealed.to(gl.float32) * 0.0 + 1.1754943508222875e-38

        final = gl.maximum(last_page - 1, 0)
        is_chosen = is_chosen & (start < last_page)
        id_now, index = _page_id(table, chosen, gl.minimum(start, final), is_chosen, num_first, gap)
        at = id_now * page_stride + slot
        keep = start < last_page
        w = gl.multiple_of(words + gl.multiple_of(at // 4, 4), 16)
        h = gl.multiple_of(half + gl.multiple_of(at // 2, 8), 16)
        k0 = gl.load(w + key_at, mask=keep & (key_at >= 0), other=0)
        k1 = k0
        if KEY_BITS == 8:
            k1 = gl.load(w + 32 * W + key_at, mask=keep & (key_at >= 0), other=0)
        in_range = keep & (channel >= 0)
        GROUP_1: gl.constexpr = 32 // LOGICAL * (D // 2)
        ks0 = gl.load(w + KEY_STEP // 4 + channel, mask=in_range, other=0)
        km0 = gl.load(w + KEY_MIN // 4 + channel, mask=in_range, other=0)
        ks1 = gl.load(w + KEY_STEP // 4 + GROUP_1 + channel, mask=in_range, other=0)
        km1 = gl.load(w + KEY_MIN // 4 + GROUP_1 + channel, mask=in_range, other=0)
        v0 = gl.load(w + VALUE_CODES // 4 + value_at, mask=keep & (value_at >= 0), other=0)
        v1 = v0
        if VALUE_BITS == 8:
            v1 = gl.load(w + VALUE_CODES // 4 + 32 * W + value_at, mask=keep & (value_at >= 0), other=0)
        id_next, index_next = _page_id(table, chosen, gl.minimum(start + 1, final), is_chosen, num_first, gap)
        for j in range(start, last_page):
            vs0 = gl.load(h + VALUE_STEP // 2 + token)
            vm0 = gl.load(h + VALUE_MIN // 2 + token)
            vs1 = gl.load(h + VALUE_STEP // 2 + 32 + token)
            vm1 = gl.load(h + VALUE_MIN // 2 + 32 + token)
            page_token = index * P + row_token
            index = index_next
            at = id_next * page_stride + slot
            keep = j + 1 < last_page
            id_next, index_next = _page_id(table, chosen, gl.minimum(j + 2, final), is_chosen, num_first, gap)
            w = gl.multiple_of(words + gl.multiple_of(at // 4, 4), 16)
            h = gl.multiple_of(half + gl.multiple_of(at // 2, 8), 16)

            if KEY_BITS == 4:
                b0, b1, b2, b3, c0, c1, c2, c3 = _and_pairs(k0, 4)
                s_low = _scores(_key_operand(b0, b1, b2, b3, A), ks0, km0, q_unit, 1.0, A, B, C, D)
                s_high = _scores(_key_operand(c0, c1, c2, c3, A), ks1, km1, q_unit, 16.0, A, B, C, D) * 0.0625
            else:
                b0, b1, b2, b3 = _and_pairs(k0, 8)
                s_low = _scores(_key_operand(b0, b1, b2, b3, A), ks0, km0, q_unit, 1.0, A, B, C, D)
                c0, c1, c2, c3 = _and_pairs(k1, 8)
                s_high = _scores(_key_operand(c0, c1, c2, c3, A), ks1, km1, q_unit, 1.0, A, B, C, D)
            k0 = gl.load(w + key_at, mask=keep & (key_at >= 0), other=0)
            if KEY_BITS == 8:
                k1 = gl.load(w + 32 * W + key_at, mask=keep & (key_at >= 0), other=0)
            in_range = keep & (channel >= 0)
            ks0 = gl.load(w + KEY_STEP // 4 + channel, mask=in_range, other=0)
            km0 = gl.load(w + KEY_MIN // 4 + channel, mask=in_range, other=0)
            ks1 = gl.load(w + KEY_STEP // 4 + GROUP_1 + channel, mask=in_range, other=0)
            km1 = gl.load(w + KEY_MIN // 4 + GROUP_1 + channel, mask=in_range, other=0)

            seen = (page_token < near) | (page_token >= far)
            s_low = gl.where(gl.expand_dims(seen, 1), s_low * factor, float("-inf"))
            seen = (page_token + 32 < near) | (page_token + 32 >= far)
            s_high = gl.where(gl.expand_dims(seen, 1), s_high * factor, float("-inf"))
            new_highest = gl.maximum(highest, gl.max(gl.maximum(s_low, s_high), 0))
            base = gl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
            shrink = gl.exp2(highest - BOOST - base)
            highest = new_highest
            p_low = gl.exp2(s_low - gl.expand_dims(base, 0))
            p_high = gl.exp2(s_high - gl.expand_dims(base, 0))

            new_unit = gl.maximum(value_unit, _power_of_two_above(gl.max(gl.maximum(vs0, vs1), 0).to(gl.float32)))
            inverse = 1.0 / new_unit
            acc = acc * gl.expand_dims(shrink * (value_unit * inverse), 0)
            value_unit = new_unit
            step_low = gl.expand_dims(gl.convert_layout(_in_row_order(vs0.to(gl.float32)), ROW), 1)
            step_high = gl.expand_dims(gl.convert_layout(_in_row_order(vs1.to(gl.float32)), ROW), 1)
            min_low = gl.expand_dims(gl.convert_layout(_in_row_order(vm0.to(gl.float32)), ROW), 1)
            min_high = gl.expand_dims(gl.convert_layout(_in_row_order(vm1.to(gl.float32)), ROW), 1)
            shrink = gl.convert_layout(gl.expand_dims(shrink, 0), weight.type.layout)
            weight = weight * shrink + _folded(p_low + p_high)
            minima = minima * shrink + _folded(p_low * min_low + p_high * min_high)
            high_part: gl.constexpr = 0.0625 if VALUE_BITS == 4 else 1.0
            p_low = _as_operand((p_low * (step_low * inverse)).to(gl.float16), B)
            p_high = _as_operand((p_high * (step_high * (inverse * high_part))).to(gl.float16), B)
            e0, o0 = _split_tokens(v0)
            if VALUE_BITS == 4:
                a0, b0, a1, b1, a2, b2, a3, b3, c0, d0, c1, d1, c2, d2, c3, d3 = _token_pairs(e0, o0, 4)
                acc = mma_v2(_value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_low, acc)
                acc = mma_v2(_value_operand(c0, d0, c1, d1, c2, d2, c3, d3, A), p_high, acc)
            else:
                a0, b0, a1, b1, a2, b2, a3, b3 = _token_pairs(e0, o0, 8)
                acc = mma_v2(_value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_low, acc)
                e1, o1 = _split_tokens(v1)
                a0, b0, a1, b1, a2, b2, a3, b3 = _token_pairs(e1, o1, 8)
                acc = mma_v2(_value_operand(a0, b0, a1, b1, a2, b2, a3, b3, A), p_high, acc)
            v0 = gl.load(w + VALUE_CODES // 4 + value_at, mask=keep & (value_at >= 0), other=0)
            if VALUE_BITS == 8:
                v1 = gl.load(w + VALUE_CODES // 4 + 32 * W + value_at, mask=keep & (value_at >= 0), other=0)

        minima = gl.convert_layout(gl.sum(minima, 0), COLUMN)
        acc = acc * (value_unit * 16777216.0) + gl.expand_dims(minima, 0)
        total_weight = gl.convert_layout(gl.sum(weight, 0), COLUMN)
        if stop > length:
            TILE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8] if D <= 256 else [1, 32], [1, 1], [1, 0])
            tile_token = gl.arange(0, 32, gl.SliceLayout(1, TILE))
            tile_channel = gl.arange(0, D, gl.SliceLayout(0, TILE))
            k_plain = gl.arange(0, D, gl.SliceLayout(1, B))
            q_plain = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_plain, 1), mask=q_mask, other=0.0)
            in_page = (position % P).to(gl.int32)
            for part in range(2):
                here = part * 32 + tile_token
                tile_mask = gl.expand_dims(here <= in_page, 1) & gl.expand_dims(tile_channel >= 0, 0)
                tail_at = gl.expand_dims(here.to(gl.int64) * tk_stride_t, 1) + gl.expand_dims(tile_channel, 0)
                key = gl.load(tail_key + row * tk_stride_r + head * tk_stride_h + tail_at, mask=tile_mask, other=0.0)
                tail_at = gl.expand_dims(here.to(gl.int64) * tv_stride_t, 1) + gl.expand_dims(tile_channel, 0)
                value = gl.load(tail_value + row * tv_stride_r + head * tv_stride_h + tail_at, mask=tile_mask, other=0.0)
                s = mma_v2(gl.convert_layout(key, A), q_plain, gl.full([32, N], 0.0, gl.float32, C))
                here_row = part * 32 + gl.arange(0, 32, ROW)
                seen = here_row <= in_page
                if is_streaming:
                    where = sealed * P + here_row
                    seen = seen & ((where < sink_size) | (where >= far))
                s = gl.where(gl.expand_dims(seen, 1), s * scale, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(s, 0))
                base = gl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
                shrink = gl.exp2(highest - BOOST - base)
                highest = new_highest
                p = gl.exp2(s - gl.expand_dims(base, 0))
                total_weight = total_weight * shrink + gl.sum(p, 0)
                p = gl.convert_layout(p.to(q_plain.dtype), B)
                value = gl.convert_layout(_in_value_order(value, D), A)
                acc = mma_v2(value, p, acc * gl.expand_dims(shrink, 0))

        member = gl.expand_dims(column, 0)
        in_out = (member < GROUP) & (gl.expand_dims(m_row, 1) >= 0)
        if (start == 0) & (stop > length):
            result = acc / gl.expand_dims(total_weight, 0)
            target = out + b.to(gl.int64) * out_stride_b + (head * GROUP + member) * out_stride_h + gl.expand_dims(m_row, 1)
            gl.store(target, result.to(out.dtype.element_ty), mask=in_out)
        else:
            place = (program + b * heads + order).to(gl.int64) * GROUP
            gl.store(partial_out + (place + member) * D + gl.expand_dims(m_row, 1), acc, mask=in_out)
            gl.store(partial_max + place + column, highest, mask=column < GROUP)
            gl.store(partial_sum + place + column, total_weight, mask=column < GROUP)


def launch(programs: int, *arguments: object, **constants: int) -> None:
    """Launches the kernel; pools come as uint8 and fp16 views (`decode_attention` says in which order)."""
    query, out, partial_out, partial_max, partial_sum, codes, half, streaming_codes, streaming_half, *rest = arguments
    _decode_packed_kernel[(programs,)](
        query, out, partial_out, partial_max, partial_sum,
        codes.view(torch.int32), half, streaming_codes.view(torch.int32), streaming_half, *rest,
        **constants, num_warps=1,
    )  # fmt: skip
