"""What the kernels that end in a quantized activation share: one row's scale, codes and group sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation_format import CODE_DTYPE, GROUP, MAX_CODE, ActivationFormat, QuantizedActivation

_GROUP: tl.constexpr = tl.constexpr(GROUP)
# adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to the nearest integer, half to even
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def store_quantized_row(
    values, row, codes_ptr, scale_ptr, sums_ptr, num_channels, num_groups,
    LARGEST: tl.constexpr, FP8: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values: float32 [BLOCK], zeros past num_channels. Scale and codes as in `quantize_rows`, to the bit."""
    channels = tl.arange(0, BLOCK)
    inside = channels < num_channels
    magnitude = tl.maximum(tl.max(tl.abs(values)), 1e-10)
    tl.store(scale_ptr + row, tl.div_rn(magnitude, LARGEST))
    scaled = values * (tl.div_rn(1.0, magnitude) * LARGEST)
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    codes_row = codes_ptr + row * num_channels
    if FP8:
        tl.store(codes_row + channels, scaled.to(tl.float8e4nv), mask=inside)
    else:
        codes = ((scaled + _ROUNDER) - _ROUNDER).to(tl.int32)
        tl.store(codes_row + channels, codes.to(tl.int8), mask=inside)
        if SUMS:
            groups = tl.arange(0, BLOCK // _GROUP)
            sums = tl.sum(tl.reshape(codes, (BLOCK // _GROUP, _GROUP)), axis=1)
            tl.store(sums_ptr + row * num_groups + groups, sums, mask=groups < num_groups)


def empty_quantized(num_tokens: int, num_channels: int, like: Tensor, form: ActivationFormat) -> QuantizedActivation:
    """Unwritten codes [T, K], scale and (for int8_sums) sums on like's device."""
    codes = torch.empty((num_tokens, num_channels), dtype=CODE_DTYPE[form], device=like.device)
    scale = torch.empty((num_tokens, 1), dtype=torch.float32, device=like.device)
    sums = None
    if form == "int8_sums":
        sums = torch.empty((num_tokens, triton.cdiv(num_channels, GROUP)), dtype=torch.int32, device=like.device)
    return QuantizedActivation(codes, scale, sums)


def row_block(num_channels: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for one program a row: the row in registers, at most 32 values a thread to 16K channels."""
    block = max(triton.next_power_of_2(num_channels), GROUP)
    return block, min(max(block // 1024, 1), 16)


def largest_code(form: ActivationFormat) -> float:
    """The code that a row's largest magnitude gets."""
    return MAX_CODE[form]
