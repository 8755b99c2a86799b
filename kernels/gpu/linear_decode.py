"""Linear layers for small batches: the weights are read once, and that is what takes the time.

A program owns a tile of output channels, all tokens of the batch (or 64 of them) and one part of K. Where K has
several parts, each leaves its sums in a workspace; the last to finish a tile adds them up in order and resets the
tile's semaphore.
Weights are the left operand of the matrix unit, whose tile is 16 or 64 rows high there; tokens are its narrow side.
"""

import triton
import triton.language as tl

from .overlap import after_previous, let_next_start, prefetch_lines

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
def _finish(
    acc, tile, part, tokens, columns, num_tokens, num_columns, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    workspace_ptr, semaphores_ptr, num_parts,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    done = True
    if SPLIT:
        cells = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shared = workspace_ptr + tile * num_parts * (BLOCK_M * BLOCK_N) + cells
        tl.store(shared + part * (BLOCK_M * BLOCK_N), acc)
        tl.debug_barrier()
        done = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == num_parts - 1
        if done:
            acc = tl.zeros_like(acc)
            for other in tl.range(0, num_parts):
                acc += tl.load(shared + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
            tl.store(semaphores_ptr + tile, 0)
    if done:
        present = tokens < num_tokens
        kept = columns < num_columns
        out = acc.to(tl.float32) * tl.load(x_scale_ptr + tokens, mask=present, other=0.0)[None, :]
        out = out * tl.load(w_scale_ptr + columns, mask=kept, other=0.0)[:, None]
        if BIAS:
            out += tl.load(bias_ptr + columns, mask=kept, other=0.0).to(tl.float32)[:, None]
        target = out_ptr + tokens.to(tl.int64)[None, :] * num_columns + columns[:, None]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=kept[:, None] & present[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_chunks", "chunks_per_part"])
def w4a8_decode_kernel(
    x_ptr, x_sums_ptr, x_scale_ptr, codes_ptr, levels_ptr, w_scale_ptr, bias_ptr, out_ptr,
    workspace_ptr, semaphores_ptr, num_tokens, num_columns, num_channels, num_groups, num_chunks, chunks_per_part,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    part = tl.program_id(1)
    tile_m = tl.program_id(2)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, GROUP)
    x_rows = x_ptr + tokens.to(tl.int64)[None, :] * num_channels + inner[:, None]
    present = tokens < num_tokens
    codes_tile = codes_ptr + columns[:, None] * GROUP + inner[None, :]
    kept = columns < num_columns
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    first = part * chunks_per_part
    let_next_start(PDL)
    if PDL:
        real_columns = tl.minimum(columns, num_columns - 1)
        for step in tl.range(0, tl.minimum(chunks_per_part, num_chunks - first)):
            prefetch_lines(codes_ptr + ((first + step).to(tl.int64) * num_columns + real_columns) * GROUP)
    after_previous(PDL)
    for step in tl.range(0, tl.minimum(chunks_per_part, num_chunks - first), num_stages=STAGES):
        chunk = first + step
        base = chunk.to(tl.int64) * num_columns
        if EVEN_N:
            packed = tl.load(codes_tile + base * GROUP)
            levels = tl.load(levels_ptr + base + columns)
        else:
            packed = tl.load(codes_tile + base * GROUP, mask=kept[:, None], other=0)
            levels = tl.load(levels_ptr + base + columns, mask=kept, other=0)
        inside, inside_next = present[None, :], present[None, :]
        if not EVEN_K:
            inside &= (chunk * CHUNK + inner < num_channels)[:, None]
            inside_next &= (chunk * CHUNK + GROUP + inner < num_channels)[:, None]
        x_low = tl.load(x_rows + chunk * CHUNK, mask=inside, other=0)
        x_high = tl.load(x_rows + chunk * CHUNK + GROUP, mask=inside_next, other=0)
        sums = x_sums_ptr + tokens * num_groups + 2 * chunk
        sums_low = tl.load(sums, mask=present, other=0)
        sums_high = tl.load(sums + 1, mask=present & (2 * chunk + 1 < num_groups), other=0)
        low = tl.dot(low_nibbles(packed), x_low, out_dtype=tl.int32)
        high = tl.dot(high_nibbles(packed), x_high, out_dtype=tl.int32)
        acc += low * (levels & 255)[:, None] + high * ((levels >> 16) & 255)[:, None]
        acc += ((levels << 16) >> 24)[:, None] * sums_low[None, :] + (levels >> 24)[:, None] * sums_high[None, :]
    _finish(
        acc, tile_m * tl.num_programs(0) + tile_n, part, tokens, columns, num_tokens, num_columns, x_scale_ptr,
        w_scale_ptr, bias_ptr, out_ptr, workspace_ptr, semaphores_ptr, tl.num_programs(1),
        SPLIT, BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "chunks_per_part"])
def w8a8_decode_kernel(
    x_ptr, x_scale_ptr, codes_ptr, w_scale_ptr, bias_ptr, out_ptr, workspace_ptr, semaphores_ptr,
    num_tokens, num_columns, num_channels, num_chunks, chunks_per_part,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    part = tl.program_id(1)
    tile_m = tl.program_id(2)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tokens.to(tl.int64)[None, :] * num_channels + inner[:, None]
    codes_tile = codes_ptr + columns.to(tl.int64)[:, None] * num_channels + inner[None, :]
    present = tokens < num_tokens
    kept = columns < num_columns
    acc = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    first = part * chunks_per_part
    let_next_start(PDL)
    if PDL:
        real_columns = tl.minimum(columns, num_columns - 1)
        for step in tl.range(0, tl.minimum(chunks_per_part, num_chunks - first)):
            prefetch_lines(codes_ptr + real_columns.to(tl.int64) * num_channels + (first + step) * BLOCK_K)
    after_previous(PDL)
    for chunk in tl.range(first, tl.minimum(first + chunks_per_part, num_chunks), num_stages=STAGES):
        channel = chunk * BLOCK_K
        inside = channel + inner < num_channels
        if EVEN_N and EVEN_K:
            codes = tl.load(codes_tile + channel)
        else:
            codes = tl.load(codes_tile + channel, mask=kept[:, None] & inside[None, :], other=0.0)
        if EVEN_K:
            x = tl.load(x_rows + channel, mask=present[None, :], other=0.0)
        else:
            x = tl.load(x_rows + channel, mask=present[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(codes, x, acc=acc, out_dtype=SUM, max_num_imprecise_acc=BLOCK_K)
    _finish(
        acc, tile_m * tl.num_programs(0) + tile_n, part, tokens, columns, num_tokens, num_columns, x_scale_ptr,
        w_scale_ptr, bias_ptr, out_ptr, workspace_ptr, semaphores_ptr, tl.num_programs(1),
        SPLIT, BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
