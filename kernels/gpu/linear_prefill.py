"""Linear layers for many tokens: bound by the matrix unit. Tiles come through tensor descriptors (TMA on Hopper)."""

import triton
import triton.language as tl

from .linear_decode import CHUNK, GROUP


@triton.jit(do_not_specialize=["num_tokens"])
def w8a8_prefill_kernel(
    x_desc, codes_desc, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, num_tokens, num_columns, num_channels,
    BIAS: tl.constexpr, SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # GROUP_M rows of tiles are walked column by column, so that what runs together shares operands in the L2
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(num_columns, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP_M * tiles_n)
    rows_in_band = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    row = (band * GROUP_M + within % rows_in_band) * BLOCK_M
    column = (within // rows_in_band) * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for channel in tl.range(0, num_channels, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([row, channel])
        codes = codes_desc.load([column, channel])
        acc = tl.dot(x, codes.T, acc=acc, out_dtype=SUM)

    tokens = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    present = tokens < num_tokens
    kept = columns < num_columns
    out = acc.to(tl.float32) * tl.load(x_scale_ptr + tokens, mask=present, other=0.0)[:, None]
    out = out * tl.load(w_scale_ptr + columns, mask=kept, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=kept, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + tokens.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=present[:, None] & kept[None, :])


@triton.jit
def decode_w4_kernel(
    codes_ptr, levels_ptr, out_ptr, num_columns, num_channels, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """4-bit weights to int8 codes [N, K]; one program per chunk of 256 channels and BLOCK_N rows."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, GROUP)
    kept = columns < num_columns
    base = chunk.to(tl.int64) * num_columns
    packed = tl.load(codes_ptr + (base + columns)[:, None] * GROUP + inner[None, :], mask=kept[:, None], other=0)
    levels = tl.load(levels_ptr + base + columns, mask=kept, other=0)
    low = (packed & 15).to(tl.int32) * (levels & 255)[:, None] + ((levels << 16) >> 24)[:, None]
    high = (packed >> 4).to(tl.int32) * ((levels >> 16) & 255)[:, None] + (levels >> 24)[:, None]
    channels = chunk * CHUNK + inner
    target = out_ptr + columns.to(tl.int64)[:, None] * num_channels + channels[None, :]
    if EVEN_K:
        tl.store(target, low.to(tl.int8), mask=kept[:, None])
        tl.store(target + GROUP, high.to(tl.int8), mask=kept[:, None])
    else:
        tl.store(target, low.to(tl.int8), mask=kept[:, None] & (channels < num_channels)[None, :])
        tl.store(target + GROUP, high.to(tl.int8), mask=kept[:, None] & (channels + GROUP < num_channels)[None, :])
