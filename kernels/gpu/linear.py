"""Which kernel a quantized linear layer runs on a GPU, and its launch."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation_format import QuantizedActivation
from ..weight_format import CHUNK, W4Weight, W8Weight
from .linear_decode import w4a8_decode_kernel, w8a8_decode_kernel
from .linear_prefill import decode_w4_kernel, w8a8_prefill_kernel
from .overlap import can_overlap

DECODE_TOKENS = 64
"""Batches up to here read weights at memory speed; larger ones go to the prefill kernels."""

W8_BLOCK_K = 128


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a small batch is cut: tokens and columns of a tile, parts of K, warps, pipeline stages."""

    block_m: int
    block_n: int
    parts: int
    num_warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How a large batch is cut: a tile's tokens, columns and channels, rows of tiles walked together, warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    stages: int


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def decode_tiles(
    num_tokens: int, num_columns: int, num_chunks: int, num_processors: int, narrowest: int = 8
) -> DecodeTiles:
    """Tiles of a decode launch; num_chunks: loop steps that K has; narrowest: least tokens of a tile.

    Parts are chosen so that about three programs stand on each processor, each with at least two steps.
    """
    block_m = min(max(triton.next_power_of_2(num_tokens), narrowest), 64)
    block_n = 64 if block_m == 64 else 128
    tiles = triton.cdiv(num_columns, block_n) * triton.cdiv(num_tokens, block_m)
    wanted = max(1, min(round(3 * num_processors / max(tiles, 1)), num_chunks // 2, 16))
    parts = triton.cdiv(num_chunks, triton.cdiv(num_chunks, wanted))
    return DecodeTiles(block_m, block_n, parts, 4, 4)


def prefill_tiles(num_tokens: int) -> PrefillTiles:
    """Tiles of a prefill launch."""
    if num_tokens <= 512:
        return PrefillTiles(64, 128, 128, 8, 4, 4)
    return PrefillTiles(128, 256, 128, 8, 8, 4)


def linear_w4a8(x: QuantizedActivation, weight: W4Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See lserve.kernels.linear.linear_w4a8. Larger batches decode the weight to int8 first."""
    num_tokens = x.codes.shape[0]
    if num_tokens > DECODE_TOKENS:
        return linear_w8a8(x, decode_w4(weight), bias, out_dtype)
    num_chunks = triton.cdiv(weight.in_features, CHUNK)
    tiles = decode_tiles(num_tokens, weight.out_features, num_chunks, _num_processors(x.codes.device))
    return launch_w4a8_decode(x, weight, bias, out_dtype, tiles)


def linear_w8a8(x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """See lserve.kernels.linear.linear_w8a8. fp8 for many tokens is torch's scaled matmul where it gives out_dtype."""
    num_tokens = x.codes.shape[0]
    if num_tokens <= DECODE_TOKENS:
        num_chunks = triton.cdiv(weight.in_features, W8_BLOCK_K)
        # below 16 tokens the matrix unit takes fp8 as float16 only
        narrowest = 8 if x.codes.dtype == torch.int8 else 16
        processors = _num_processors(x.codes.device)
        tiles = decode_tiles(num_tokens, weight.out_features, num_chunks, processors, narrowest)
        return launch_w8a8_decode(x, weight, bias, out_dtype, tiles)
    if x.codes.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16 and weight.out_features % 16 == 0:
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
    assert x.sums is not None
    out = torch.empty((num_tokens, weight.out_features), dtype=out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    num_chunks = triton.cdiv(num_channels, CHUNK)
    grid, workspace = _split(num_tokens, weight.out_features, weight.semaphores, torch.int32, tiles)
    overlap = can_overlap(out.device)
    w4a8_decode_kernel[grid](
        x.codes, x.sums, x.scale, weight.codes, weight.levels, weight.scale, bias, out, workspace, weight.semaphores,
        num_tokens, weight.out_features, num_channels, x.sums.shape[1], num_chunks,
        triton.cdiv(num_chunks, tiles.parts), SPLIT=tiles.parts > 1, BIAS=bias is not None,
        EVEN_N=weight.out_features % tiles.block_n == 0, EVEN_K=num_channels % CHUNK == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, STAGES=tiles.stages, PDL=overlap,
        num_warps=tiles.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return out


def launch_w8a8_decode(
    x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype, tiles: DecodeTiles
) -> Tensor:
    """W8A8 for a small batch with given tiles."""
    num_tokens, num_channels = x.codes.shape
    out = torch.empty((num_tokens, weight.out_features), dtype=out_dtype, device=x.codes.device)
    if out.numel() == 0:
        return out
    whole = x.codes.dtype == torch.int8
    num_chunks = triton.cdiv(num_channels, W8_BLOCK_K)
    sum_dtype = torch.int32 if whole else torch.float32
    grid, workspace = _split(num_tokens, weight.out_features, weight.semaphores, sum_dtype, tiles)
    overlap = can_overlap(out.device)
    w8a8_decode_kernel[grid](
        x.codes, x.scale, weight.codes, weight.scale, bias, out, workspace, weight.semaphores,
        num_tokens, weight.out_features, num_channels, num_chunks, triton.cdiv(num_chunks, tiles.parts),
        SPLIT=tiles.parts > 1, BIAS=bias is not None, EVEN_N=weight.out_features % tiles.block_n == 0,
        EVEN_K=num_channels % W8_BLOCK_K == 0, SUM=tl.int32 if whole else tl.float32,
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
    return W8Weight(codes, weight.scale, weight.semaphores)


def _split(
    num_tokens: int, num_columns: int, semaphores: Tensor, sum_dtype: torch.dtype, tiles: DecodeTiles
) -> tuple[tuple[int, int, int], Tensor | None]:
    """The grid, and room for the parts' sums where there is more than one part."""
    tiles_n, tiles_m = triton.cdiv(num_columns, tiles.block_n), triton.cdiv(num_tokens, tiles.block_m)
    if tiles.parts == 1:
        return (tiles_n, 1, tiles_m), None
    assert tiles_n * tiles_m <= semaphores.numel()
    size = tiles_n * tiles_m * tiles.parts * tiles.block_m * tiles.block_n
    return (tiles_n, tiles.parts, tiles_m), torch.empty(size, dtype=sum_dtype, device=semaphores.device)
