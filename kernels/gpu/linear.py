"""Which kernel a quantized linear layer runs on a GPU, and its launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation_format import QuantizedActivation
from ..weight_format import CHUNK, W4Weight, W8Weight
from .linear_decode import w4a8_decode_kernel, w4a8_wide_kernel, w8a8_decode_kernel
from .linear_prefill import decode_w4_kernel, w8a8_prefill_kernel
from .overlap import can_overlap

DECODE_TOKENS = 64
"""Batches up to here read weights at memory speed; larger ones go to the prefill kernels."""

FP8_DECODE_TOKENS = 32
"""The same for fp8 where torch's scaled matmul can take over: at 64 tokens our decode kernel is slower than bf16."""

WIDE = 16384
"""Columns from which a W4A8 matrix fills the chip with tiles that do not share K."""

W8_BLOCK_K = 128


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a small batch is cut: a tile's tokens and columns, slots that share K, warps, pipeline stages.

    One slot means that warps share the columns instead (W4A8: `w4a8_wide_kernel`). prefetch: chunks of a W4A8 tile that
    are asked for while the kernel ahead still runs.
    """

    block_m: int
    block_n: int
    slots: int
    num_warps: int
    stages: int
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How a large batch is cut: a tile's tokens, columns and channels, rows of tiles walked together, warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    stages: int


def decode_tiles(num_tokens: int, num_columns: int, num_channels: int, dtype: torch.dtype) -> DecodeTiles:
    """Tiles of a decode launch; dtype: of the weight's codes (uint8: W4A8). Chosen from sweeps on an H200."""
    block_m = min(max(triton.next_power_of_2(num_tokens), 8), 64)
    wide, tall = num_columns >= WIDE, num_channels >= 2 * num_columns
    if dtype != torch.uint8:
        if wide:
            return DecodeTiles(block_m, 16, 4, 4, 4) if block_m < 16 else DecodeTiles(block_m, 32, 4, 4, 3)
        if block_m > 16:
            return DecodeTiles(block_m, 32, 4, 4, 3)
        if num_columns > num_channels:
            return DecodeTiles(block_m, 16, 8, 8, 3) if block_m > 8 else DecodeTiles(block_m, 16, 8, 4, 4)
        return DecodeTiles(block_m, 32, 8, 4, 4)
    if wide and block_m > 32:
        return DecodeTiles(64, 64, 1, 4, 3)
    if wide and block_m > 8:
        return DecodeTiles(block_m, 128, 1, 4, 6)
    if wide:
        return DecodeTiles(block_m, 32, 2, 4, 3)
    if block_m > 16:
        return DecodeTiles(32, 32, 4, 4, 3)
    if tall:
        return DecodeTiles(block_m, 32, 8, 4, 3, 8) if block_m > 8 else DecodeTiles(block_m, 32, 4, 4, 4, 8)
    if num_columns > num_channels:
        return DecodeTiles(block_m, 32, 8, 4, 2) if block_m > 8 else DecodeTiles(block_m, 16, 8, 4, 3)
    return DecodeTiles(block_m, 32, 8, 8, 3, 8) if block_m > 8 else DecodeTiles(block_m, 32, 8, 4, 4, 8)


def prefill_tiles(num_tokens: int) -> PrefillTiles:
    """Tiles of a prefill launch."""
    if num_tokens <= 512:
        return PrefillTiles(64, 128, 128, 8, 4, 4)
    return PrefillTiles(128, 128, 128, 8, 4, 3)


def linear_w4a8(x: QuantizedActivation, weight: W4Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See lserve.kernels.linear.linear_w4a8. Larger batches decode the weight to int8 first."""
    num_tokens = x.codes.shape[0]
    if num_tokens > DECODE_TOKENS:
        return linear_w8a8(x, decode_w4(weight), bias, out_dtype)
    tiles = decode_tiles(num_tokens, weight.out_features, weight.in_features, weight.codes.dtype)
    return launch_w4a8_decode(x, weight, bias, out_dtype, tiles)


def linear_w8a8(x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See lserve.kernels.linear.linear_w8a8. fp8 for many tokens is torch's scaled matmul where it gives out_dtype."""
    num_tokens = x.codes.shape[0]
    by_torch = x.codes.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16 and weight.out_features % 16 == 0
    if num_tokens <= (FP8_DECODE_TOKENS if by_torch else DECODE_TOKENS):
        tiles = decode_tiles(num_tokens, weight.out_features, weight.in_features, weight.codes.dtype)
        return launch_w8a8_decode(x, weight, bias, out_dtype, tiles)
    if by_torch:
        return scaled_mm(x, weight, bias)
    return launch_w8a8_prefill(x, weight, bias, out_dtype, prefill_tiles(num_tokens))


def scaled_mm(x: QuantizedActivation, weight: W8Weight, bias: Tensor | None) -> Tensor:
    """fp8 through torch (cuBLASLt or CUTLASS): bfloat16 out."""
    return torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scale,
        scale_b=weight.scale[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def launch_w4a8_decode(
    x: QuantizedActivation, weight: W4Weight, bias: Tensor | None, out_dtype: torch.dtype, tiles: DecodeTiles
) -> Tensor:
    """W4A8 for a small batch with given tiles."""
    num_tokens, num_channels = x.codes.shape
    num_columns = weight.out_features
    assert x.sums is not None
    out = torch.empty((num_tokens, num_columns), dtype=out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    num_chunks = triton.cdiv(num_channels, CHUNK)
    overlap = can_overlap(out.device)
    even = num_columns % tiles.block_n == 0
    grid = (triton.cdiv(num_columns, tiles.block_n), triton.cdiv(num_tokens, tiles.block_m))
    arguments = (
        x.codes, x.sums, x.scale, weight.codes, weight.levels, weight.scale, bias, out,
        num_tokens, num_columns, num_channels, x.sums.shape[1], num_chunks,
    )  # fmt: skip
    options = {
        "BIAS": bias is not None,
        "EVEN_N": even,
        "EVEN_K": num_channels % (CHUNK * tiles.slots) == 0,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "STAGES": tiles.stages,
        "PDL": overlap,
        "PREFETCH": min(tiles.prefetch, max(num_chunks - tiles.slots, 0)) if overlap and even else 0,
        "num_warps": tiles.num_warps,
        "launch_pdl": overlap,
    }
    if tiles.slots == 1:
        w4a8_wide_kernel[grid](*arguments, **options)
    else:
        w4a8_decode_kernel[grid](*arguments, SLOTS=tiles.slots, **options)
    return out


def launch_w8a8_decode(
    x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype, tiles: DecodeTiles
) -> Tensor:
    """W8A8 for a small batch with given tiles."""
    num_tokens, num_channels = x.codes.shape
    num_columns = weight.out_features
    out = torch.empty((num_tokens, num_columns), dtype=out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    overlap = can_overlap(out.device)
    grid = (triton.cdiv(num_columns, tiles.block_n), triton.cdiv(num_tokens, tiles.block_m))
    w8a8_decode_kernel[grid](
        x.codes, x.scale, weight.codes, weight.scale, bias, out,
        num_tokens, num_columns, num_channels, triton.cdiv(num_channels, W8_BLOCK_K), BIAS=bias is not None,
        EVEN_N=num_columns % tiles.block_n == 0, EVEN_K=num_channels % (W8_BLOCK_K * tiles.slots) == 0,
        SUM=tl.int32 if x.codes.dtype == torch.int8 else tl.float32, SLOTS=tiles.slots,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=W8_BLOCK_K, STAGES=tiles.stages,
        PDL=overlap, num_warps=tiles.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


def launch_w8a8_prefill(
    x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype, tiles: PrefillTiles
) -> Tensor:
    """W8A8 for many tokens with given tiles. K must be a multiple of 16."""
    num_tokens, num_channels = x.codes.shape
    num_columns = weight.out_features
    out = torch.empty((num_tokens, num_columns), dtype=out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(num_tokens, tiles.block_m) * triton.cdiv(num_columns, tiles.block_n),)
    w8a8_prefill_kernel[grid](
        TensorDescriptor.from_tensor(x.codes, [tiles.block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight.codes, [tiles.block_n, tiles.block_k]),
        x.scale, weight.scale, bias, out, num_tokens, num_columns, num_channels,
        BIAS=bias is not None, SUM=tl.int32 if x.codes.dtype == torch.int8 else tl.float32,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m, STAGES=tiles.stages,
        num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def decode_w4(weight: W4Weight) -> W8Weight:
    """lserve.kernels.weight_format.decode_w4 in one pass on the device."""
    num_columns, num_channels = weight.out_features, weight.in_features
    codes = torch.empty((num_columns, num_channels), dtype=torch.int8, device=weight.codes.device)
    block_n = 32
    decode_w4_kernel[(weight.codes.shape[0], triton.cdiv(num_columns, block_n))](
        weight.codes, weight.levels, codes, num_columns, num_channels,
        EVEN_K=num_channels % CHUNK == 0, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return W8Weight(codes, weight.scale)
