"""Per-token quantized activations: what norms and SiLU hand to a quantized linear layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ActivationFormat = Literal["fp8", "int8", "int8_sums"]
"""fp8 (e4m3), int8, or int8 with the sums per group of channels that a W4A8 linear layer needs."""

GROUP = 128
"""Input channels that share one second-level scale in a W4A8 weight; the last group of a row may be shorter."""

MAX_CODE = {"fp8": 448.0, "int8": 127.0, "int8_sums": 127.0}
CODE_DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int8_sums": torch.int8}


@dataclass(frozen=True, slots=True)
class QuantizedActivation:
    """x is codes * scale.

    codes: [T, K] float8_e4m3fn or int8, symmetric. scale: float32 [T, 1], the row's largest magnitude / 448 or 127.
    sums: int32 [T, ceil(K / 128)], the sum of each group's codes; None unless the format is int8_sums.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor | None = None


def check_activation_format(x: Tensor, activation_format: str) -> None:
    """Raises ValueError unless x is [T, K] and the format is known."""
    if activation_format not in MAX_CODE:
        raise ValueError(f"activation_format must be one of {', '.join(MAX_CODE)}, got {activation_format!r}")
    if x.dim() != 2:
        raise ValueError(f"a quantized activation must be [T, K], got shape {tuple(x.shape)}")


def quantize_activation(x: Tensor, activation_format: ActivationFormat) -> QuantizedActivation:
    """Quantizes each row of x [T, K] by its largest magnitude, rounding half to even.

    Raises ValueError for a bad shape or an unknown format.
    """
    check_activation_format(x, activation_format)
    if x.is_cuda:
        from .gpu.activation import quantize_activation as quantize_activation_gpu

        return quantize_activation_gpu(x, activation_format)
    return quantize_rows(x.float(), activation_format)


def quantize_rows(x: Tensor, activation_format: ActivationFormat) -> QuantizedActivation:
    """The CPU path of every quantizing operation: x [T, K] float32."""
    largest = MAX_CODE[activation_format]
    magnitude = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-10)
    # the factor decides the codes; computed in this order it is the same bits on every device
    codes = x * magnitude.reciprocal().mul_(largest)
    scale = magnitude.div_(largest)
    if activation_format == "fp8":
        return QuantizedActivation(codes.clamp_(-largest, largest).to(torch.float8_e4m3fn), scale)
    codes = codes.round_().clamp_(-largest, largest).to(torch.int8)
    return QuantizedActivation(codes, scale, group_sums(codes) if activation_format == "int8_sums" else None)


def group_sums(codes: Tensor) -> Tensor:
    """Sums of int8 codes [T, K] over each group of 128 channels: int32 [T, ceil(K / 128)]."""
    num_tokens, num_channels = codes.shape
    num_groups = -(-num_channels // GROUP)
    padded = torch.nn.functional.pad(codes, (0, num_groups * GROUP - num_channels))
    return padded.view(num_tokens, num_groups, GROUP).sum(dim=-1, dtype=torch.int32)
