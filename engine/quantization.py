"""Weight formats of linear layers, chosen by `weights:` and made matrix by matrix while a checkpoint loads.

`native` keeps the compute dtype. `fp8` and `int8` quantize weights per output channel and activations per token
(W8A8). `w4a8` has two-level 4-bit weights (QServe) and int8 activations. Norms and embeddings stay native.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lserve.kernels.activation import silu_mul, silu_mul_quantize
from lserve.kernels.activation_format import ActivationFormat, QuantizedActivation, quantize_activation
from lserve.kernels.linear import linear, linear_w4a8, linear_w8a8
from lserve.kernels.norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from lserve.kernels.weight_format import W4Weight, W8Weight, decode_w4, quantize_w4, quantize_w8

from .errors import SettingsError

WeightFormat = Literal["native", "fp8", "int8", "w4a8"]

Activation = Tensor | QuantizedActivation
"""What a linear layer takes: floats [T, K], or codes that the operation before it has already quantized."""


class Linear(Protocol):
    """A projection y = x W^T + b."""

    @property
    def activation_format(self) -> ActivationFormat | None:
        """The format in which `__call__` needs no further quantization; None for floats."""

    @property
    def out_features(self) -> int:
        """N, the width of the output."""

    def __call__(self, x: Activation) -> Tensor:
        """x: [T, K]; returns [T, N] in the compute dtype."""


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """Weights in the compute dtype. weight: [N, K]; bias: [N] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def activation_format(self) -> None:
        """Floats."""
        return None

    @property
    def out_features(self) -> int:
        """N, the width of the output."""
        return self.weight.shape[0]

    def __call__(self, x: Activation) -> Tensor:
        """x: [T, K] floats (anything else is our own bug); returns [T, N]."""
        assert isinstance(x, Tensor)
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """Low-bit weights; floats that come in are quantized first. out_dtype: the compute dtype."""

    weight: W8Weight | W4Weight
    bias: Tensor | None
    activation_format: ActivationFormat
    out_dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """N, the width of the output."""
        return self.weight.out_features

    def __call__(self, x: Activation) -> Tensor:
        """x: [T, K] floats or codes in `activation_format`; returns [T, N] in out_dtype."""
        quantized = quantize_activation(x, self.activation_format) if isinstance(x, Tensor) else x
        if isinstance(self.weight, W4Weight):
            return linear_w4a8(quantized, self.weight, self.bias, self.out_dtype)
        return linear_w8a8(quantized, self.weight, self.bias, self.out_dtype)


def make_linear(weight: Tensor, bias: Tensor | None, weight_format: WeightFormat, compute_dtype: torch.dtype) -> Linear:
    """One matrix as the checkpoint has it, on the device where it will stay, to a layer in weight_format.

    weight: [N, K] in any float dtype (fused projections are stacked first); bias: [N] or None. The caller drops its own
    reference to weight, so at most one matrix is held in two formats. Raises SettingsError for an unknown format or a
    width that has no 8-bit path.
    """
    bias = None if bias is None else bias.to(compute_dtype)
    if weight_format == "native":
        return NativeLinear(weight.to(compute_dtype).contiguous(), bias)
    check_widths(weight, weight_format)
    match weight_format:
        case "fp8":
            return quantized_linear(quantize_w8(weight, torch.float8_e4m3fn), bias, compute_dtype)
        case "int8":
            return quantized_linear(quantize_w8(weight, torch.int8), bias, compute_dtype)
        case "w4a8":
            return quantized_linear(quantize_w4(weight), bias, compute_dtype)
        case _:
            raise SettingsError(f"weights must be native, fp8, int8 or w4a8, got {weight_format!r}")


def check_widths(weight: Tensor, weight_format: WeightFormat) -> None:
    """Raises SettingsError for a matrix whose width has no 8-bit path."""
    if weight.shape[1] % 16 or weight.shape[0] % 8:
        raise SettingsError(
            f"weights: {weight_format} needs widths in multiples of 16, got a matrix {tuple(weight.shape)}"
        )


def quantized_linear(weight: W8Weight | W4Weight, bias: Tensor | None, compute_dtype: torch.dtype) -> QuantizedLinear:
    """A layer over low-bit weights. On a CPU 4-bit ones are kept decoded to int8: the same numbers, faster there."""
    if isinstance(weight, W4Weight):
        if weight.codes.is_cuda:
            return QuantizedLinear(weight, bias, "int8_sums", compute_dtype)
        weight = decode_w4(weight)
    return QuantizedLinear(weight, bias, "int8" if weight.codes.dtype == torch.int8 else "fp8", compute_dtype)


def norm_for(linear: Linear, x: Tensor, weight: Tensor, eps: float) -> Activation:
    """RMSNorm of x [T, K], in the form that linear takes without a further pass."""
    if linear.activation_format is None:
        return rms_norm(x, weight, eps)
    return rms_norm_quantize(x, weight, eps, linear.activation_format)


def add_norm_for(linear: Linear, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Activation, Tensor]:
    """(RMSNorm of x + residual in the form that linear takes, x + residual). x, residual: [T, K]."""
    if linear.activation_format is None:
        return add_rms_norm(x, residual, weight, eps)
    return add_rms_norm_quantize(x, residual, weight, eps, linear.activation_format)


def silu_mul_for(linear: Linear, gate_up: Tensor) -> Activation:
    """silu(gate) * up of gate_up [T, 2F], in the form that linear takes without a further pass."""
    if linear.activation_format is None:
        return silu_mul(gate_up)
    return silu_mul_quantize(gate_up, linear.activation_format)
