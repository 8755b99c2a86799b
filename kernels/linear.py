"""Linear layers: floats, and quantized activations and weights: W8A8 (int8 or fp8) and W4A8.

int8 and 4-bit products are summed in int32, exactly, so a token's result does not depend on the batch it is in."""

import torch
from torch import Tensor

from .activation_format import CODE_DTYPE, QuantizedActivation
from .cpu.dense_linear import dense_linear
from .weight_format import W4Weight, W8Weight, decode_w4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias in the operands' float dtype: x [T, K], weight [N, K], bias [N] or None; returns [T, N]."""
    if x.is_cuda:
        return torch.nn.functional.linear(x, weight, bias)
    return dense_linear(x, weight, bias)


def linear_w8a8(x: QuantizedActivation, weight: W8Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x W^T + bias with 8-bit operands of one kind: returns [T, N] in out_dtype (float32, bfloat16 or float16).

    x: codes [T, K] int8 or float8_e4m3fn; weight: codes [N, K] of the same dtype; bias: [N] or None, added before
    rounding. On a CPU int8 uses its matrix instructions where it has them, fp8 is decoded to float32 at every call.
    Raises ValueError when dtypes or shapes do not fit together.
    """
    _check(x, weight, bias)
    if weight.codes.dtype != x.codes.dtype:
        raise ValueError(f"weight codes {weight.codes.dtype} do not go with activation codes {x.codes.dtype}")
    if x.codes.is_cuda:
        from .gpu.linear import linear_w8a8 as linear_w8a8_gpu

        return linear_w8a8_gpu(x, weight, bias, out_dtype)
    if x.codes.dtype == torch.int8:
        total = torch._int_mm(x.codes, weight.codes.t()).float()
    else:
        total = torch.nn.functional.linear(x.codes.float(), weight.codes.float())
    total.mul_(x.scale).mul_(weight.scale)
    return (total if bias is None else total.add_(bias)).to(out_dtype)


def linear_w4a8(x: QuantizedActivation, weight: W4Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x W^T + bias with int8 activations and two-level 4-bit weights: returns [T, N] in out_dtype.

    x must carry its group sums (format int8_sums): the groups' minima are added through them. On a CPU the weight is
    decoded at every call; a caller that keeps one there decodes it once (`decode_w4`) and calls linear_w8a8, with the
    same result.
    Raises ValueError when dtypes or shapes do not fit together or the sums are missing.
    """
    _check(x, weight, bias)
    if x.codes.dtype != torch.int8 or x.sums is None:
        raise ValueError(f"W4A8 wants int8 codes with group sums (int8_sums), got {x.codes.dtype} and sums {x.sums}")
    if x.codes.is_cuda:
        from .gpu.linear import linear_w4a8 as linear_w4a8_gpu

        return linear_w4a8_gpu(x, weight, bias, out_dtype)
    return linear_w8a8(x, decode_w4(weight), bias, out_dtype)


def _check(x: QuantizedActivation, weight: W8Weight | W4Weight, bias: Tensor | None) -> None:
    if x.codes.dim() != 2 or x.codes.shape[1] != weight.in_features:
        raise ValueError(f"activation codes must be [T, {weight.in_features}], got {tuple(x.codes.shape)}")
    if x.codes.dtype not in CODE_DTYPE.values():
        raise ValueError(f"activation codes must be int8 or float8_e4m3fn, got {x.codes.dtype}")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias must have shape ({weight.out_features},), got {tuple(bias.shape)}")
