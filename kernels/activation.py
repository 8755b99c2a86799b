"""The gated activation of the feed-forward block, and its fused quantization."""

import torch
from torch import Tensor

from .activation_format import ActivationFormat, QuantizedActivation, check_activation_format, quantize_rows


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2F], the gate's half first. Returns [T, F] in its dtype.

    Raises ValueError unless gate_up is two-dimensional with an even last dimension.
    """
    _check(gate_up)
    if gate_up.is_cuda:
        from .gpu.activation import silu_mul as silu_mul_gpu

        return silu_mul_gpu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    if gate_up.dtype == torch.float32:
        return torch.nn.functional.silu(gate).mul_(up)
    return torch.nn.functional.silu(gate.float()).mul_(up).to(gate_up.dtype)


def silu_mul_quantize(gate_up: Tensor, activation_format: ActivationFormat) -> QuantizedActivation:
    """silu_mul, then per-token quantization; nothing is rounded in between. gate_up: [T, 2F]."""
    _check(gate_up)
    check_activation_format(gate_up, activation_format)
    if gate_up.is_cuda:
        from .gpu.activation import silu_mul_quantize as silu_mul_quantize_gpu

        return silu_mul_quantize_gpu(gate_up, activation_format)
    gate, up = gate_up.float().chunk(2, -1)
    return quantize_rows(torch.nn.functional.silu(gate).mul_(up), activation_format)


def _check(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2F], got shape {tuple(gate_up.shape)}")
