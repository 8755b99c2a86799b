"""Linear layers for small batches: the weights are read once, and that is what takes the time.

A program owns a block of output channels for all tokens of the batch (or BLOCK_M of them). Its warps share K between
them: slot s takes every SLOTS-th chunk from the s-th on, as one batch of a batched matrix product, and the slots'
sums are added at the end. So a program's loads are spread over K, and no two programs have to meet. Weights are the
left operand, whose tile is 16 rows high in the matrix unit; tokens are its narrow side of 8.
"""

import triton
import triton.language as tl

from .overlap import let_next_start, prefetch_run, zero_after_previous

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
CHUNK = tl.constexpr(256)
GROUP = tl.constexpr(128)


@triton.jit
def low_nibbles(packed):
    """uint8 to int8, four at a time."""
    if INTERPRET:
        return (packed & 15).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def high_nibbles(packed):
    """uint8 to int8, four at a time."""
    if INTERPRET:
        return (packed >> 4).to(tl.int8)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _column_factors(columns, num_columns, w_scale_ptr, bias_ptr, BIAS: tl.constexpr):
    """Scale and bias of a tile's columns: asked for before the loop, whose end would otherwise wait for them."""
    kept = columns < num_columns
    w_scale = tl.load(w_scale_ptr + columns, mask=kept, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=kept, other=0.0).to(tl.float32) if BIAS else w_scale
    return w_scale, bias


@triton.jit
def _sum_slots(acc):
    """The slots' sums [SLOTS, BLOCK_N, BLOCK_M] added up: [BLOCK_N, BLOCK_M].

    Splitting halves off brings all slots of a value into one thread at once. `tl.sum` over warps takes about 1 us more:
    it goes through shared memory in many small steps.
    """
    parts = tl.permute(acc, (1, 2, 0))
    for _ in tl.static_range(16):
        if parts.shape[2] > 1:
            first, second = tl.split(tl.reshape(parts, (parts.shape[0], parts.shape[1], parts.shape[2] // 2, 2)))
            parts = first + second
    return tl.reshape(parts, (parts.shape[0], parts.shape[1]))


@triton.jit
def _finish(total, tokens, columns, num_tokens, num_columns, x_scale, w_scale, bias, out_ptr, BIAS: tl.constexpr):
    """Scales, bias and store of a tile's sums [BLOCK_N, BLOCK_M]."""
    out = total.to(tl.float32) * x_scale[None, :] * w_scale[:, None]
    if BIAS:
        out += bias[:, None]
    target = out_ptr + tokens.to(tl.int64)[None, :] * num_columns + columns[:, None]
    inside = (columns < num_columns)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_chunks"])
def w4a8_wide_kernel(
    x_ptr, x_sums_ptr, x_scale_ptr, codes_ptr, levels_ptr, w_scale_ptr, bias_ptr, out_ptr,
    num_tokens, num_columns, num_channels, num_groups, num_chunks,
    BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """As w4a8_decode_kernel with one slot: for matrices with enough columns to fill the chip without sharing K."""
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, GROUP)
    x_rows = x_ptr + (tokens.to(tl.int64) * num_channels)[None, :] + inner[:, None]
    present = tokens < num_tokens
    kept = columns < num_columns
    let_next_start(PDL)
    for chunk in tl.static_range(PREFETCH):
        prefetch_run(codes_ptr + ((chunk + 1) * num_columns + first_column).to(tl.int64) * GROUP, BLOCK_N * GROUP)
    w_scale, bias = _column_factors(columns, num_columns, w_scale_ptr, bias_ptr, BIAS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in tl.range(0, num_chunks, num_stages=STAGES):
        rows = (step * num_columns + columns).to(tl.int64)
        codes = codes_ptr + rows[:, None] * GROUP + inner[None, :]
        if EVEN_N:
            packed = tl.load(codes)
            levels = tl.load(levels_ptr + rows)
        else:
            packed = tl.load(codes, mask=kept[:, None], other=0)
            levels = tl.load(levels_ptr + rows, mask=kept, other=0)
        waited = CHUNK * zero_after_previous(step, PDL)
        low_inside = present[None, :]
        high_inside = low_inside
        if not EVEN_K:
            low_inside &= (step * CHUNK + inner < num_channels)[:, None]
            high_inside &= (step * CHUNK + GROUP + inner < num_channels)[:, None]
        x = x_rows + (step * CHUNK + waited)
        x_low = tl.load(x, mask=low_inside, other=0)
        x_high = tl.load(x + GROUP, mask=high_inside, other=0)
        sums = x_sums_ptr + tokens * num_groups + (2 * step + waited)
        sums_low = tl.load(sums, mask=present, other=0)
        sums_high = tl.load(sums + 1, mask=present & (2 * step + 1 < num_groups), other=0)
        low = tl.dot(low_nibbles(packed), x_low, out_dtype=tl.int32)
        high = tl.dot(high_nibbles(packed), x_high, out_dtype=tl.int32)
        acc += low * (levels & 255)[:, None] + high * ((levels >> 16) & 255)[:, None]
        acc += ((levels << 16) >> 24)[:, None] * sums_low[None, :] + (levels >> 24)[:, None] * sums_high[None, :]
    x_scale = tl.load(x_scale_ptr + tokens, mask=present, other=0.0)
    _finish(acc, tokens, columns, num_tokens, num_columns, x_scale, w_scale, bias, out_ptr, BIAS)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_chunks"])
def w4a8_decode_kernel(
    x_ptr, x_sums_ptr, x_scale_ptr, codes_ptr, levels_ptr, w_scale_ptr, bias_ptr, out_ptr,
    num_tokens, num_columns, num_channels, num_groups, num_chunks,
    BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, GROUP)
    slots = tl.arange(0, SLOTS)
    x_rows = x_ptr + (tokens.to(tl.int64) * num_channels)[None, None, :] + inner[None, :, None]
    present = tokens < num_tokens
    kept = columns < num_columns
    let_next_start(PDL)
    for chunk in tl.static_range(PREFETCH):
        prefetch_run(codes_ptr + ((chunk + SLOTS) * num_columns + first_column).to(tl.int64) * GROUP, BLOCK_N * GROUP)
    w_scale, bias = _column_factors(columns, num_columns, w_scale_ptr, bias_ptr, BIAS)
    acc = tl.zeros((SLOTS, BLOCK_N, BLOCK_M), tl.int32)
    for step in tl.range(0, tl.cdiv(num_chunks, SLOTS), num_stages=STAGES):
        chunks = step * SLOTS + slots
        rows = (chunks.to(tl.int64) * num_columns)[:, None] + columns[None, :]
        codes = codes_ptr + rows[:, :, None] * GROUP + inner[None, None, :]
        if EVEN_K & EVEN_N:
            packed = tl.load(codes)
            levels = tl.load(levels_ptr + rows)
        else:
            real = (chunks < num_chunks)[:, None] & kept[None, :]
            packed = tl.load(codes, mask=real[:, :, None], other=0)
            levels = tl.load(levels_ptr + rows, mask=real, other=0)
        waited = CHUNK * zero_after_previous(step, PDL)
        low_inside = present[None, None, :]
        high_inside = low_inside
        sums_inside = present[None, :]
        sums_next = sums_inside
        if not EVEN_K:
            channels = (chunks * CHUNK)[:, None, None] + inner[None, :, None]
            low_inside &= channels < num_channels
            high_inside &= channels + GROUP < num_channels
            sums_inside &= 2 * chunks[:, None] < num_groups
            sums_next &= 2 * chunks[:, None] + 1 < num_groups
        x = x_rows + (chunks * CHUNK + waited)[:, None, None]
        sums = x_sums_ptr + (tokens * num_groups)[None, :] + (2 * chunks + waited)[:, None]
        x_low = tl.load(x, mask=low_inside, other=0)
        x_high = tl.load(x + GROUP, mask=high_inside, other=0)
        sums_low = tl.load(sums, mask=sums_inside, other=0)
        sums_high = tl.load(sums + 1, mask=sums_next, other=0)
        low = tl.dot(low_nibbles(packed), x_low, out_dtype=tl.int32)
        high = tl.dot(high_nibbles(packed), x_high, out_dtype=tl.int32)
        acc += low * (levels & 255)[:, :, None] + high * ((levels >> 16) & 255)[:, :, None]
        acc += ((levels << 16) >> 24)[:, :, None] * sums_low[:, None, :]
        acc += (levels >> 24)[:, :, None] * sums_high[:, None, :]
    x_scale = tl.load(x_scale_ptr + tokens, mask=present, other=0.0)
    total = _sum_slots(acc)
    _finish(total, tokens, columns, num_tokens, num_columns, x_scale, w_scale, bias, out_ptr, BIAS)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks"])
def w8a8_decode_kernel(
    x_ptr, x_scale_ptr, codes_ptr, w_scale_ptr, bias_ptr, out_ptr, num_tokens, num_columns, num_channels, num_chunks,
    BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SUM: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    slots = tl.arange(0, SLOTS)
    x_rows = x_ptr + (tokens.to(tl.int64) * num_channels)[None, None, :] + inner[None, :, None]
    code_rows = codes_ptr + (columns.to(tl.int64) * num_channels)[None, :, None] + inner[None, None, :]
    present = tokens < num_tokens
    kept = columns < num_columns
    let_next_start(PDL)
    w_scale, bias = _column_factors(columns, num_columns, w_scale_ptr, bias_ptr, BIAS)
    acc = tl.zeros((SLOTS, BLOCK_N, BLOCK_M), SUM)
    for step in tl.range(0, tl.cdiv(num_chunks, SLOTS), num_stages=STAGES):
        channels = (step * SLOTS + slots) * BLOCK_K
        if EVEN_K & EVEN_N:
            codes = tl.load(code_rows + channels[:, None, None])
        else:
            inside = (channels[:, None] + inner[None, :] < num_channels)[:, None, :]
            codes = tl.load(code_rows + channels[:, None, None], mask=inside & kept[None, :, None], other=0.0)
        waited = CHUNK * zero_after_previous(step, PDL)
        x_inside = present[None, None, :]
        if not EVEN_K:
            x_inside &= (channels[:, None] + inner[None, :] < num_channels)[:, :, None]
        x = tl.load(x_rows + (channels + waited)[:, None, None], mask=x_inside, other=0.0)
        acc = tl.dot(codes, x, acc=acc, out_dtype=SUM)
    x_scale = tl.load(x_scale_ptr + tokens, mask=present, other=0.0)
    total = _sum_slots(acc)
    _finish(total, tokens, columns, num_tokens, num_columns, x_scale, w_scale, bias, out_ptr, BIAS)
