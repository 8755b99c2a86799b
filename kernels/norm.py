"""RMSNorm, alone or after the residual addition, and with the activation quantization that a linear layer wants."""

import torch
from torch import Tensor

from .activation_format import ActivationFormat, QuantizedActivation, check_activation_format, quantize_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    x: [..., H] float32, bfloat16 or float16; weight: [H]. Returns a new contiguous tensor like x.
    Raises ValueError when weight does not match x's last dimension.
    """
    _check(x, weight)
    if x.is_cuda:
        from .gpu.norm import rms_norm as rms_norm_gpu

        return rms_norm_gpu(x, weight, eps)
    return _normalize(x, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalizes the sum: (rms_norm(x + residual), x + residual).

    x, residual: [..., H] of one dtype; the sum is rounded to that dtype before it is normalized, so the fused call
    equals the two steps. Both results are new tensors. Raises ValueError when shapes differ.
    """
    _check(x, weight)
    _check_residual(x, residual)
    if x.is_cuda:
        from .gpu.norm import add_rms_norm as add_rms_norm_gpu

        return add_rms_norm_gpu(x, residual, weight, eps)
    total = x + residual
    return _normalize(total, weight, eps).to(x.dtype), total


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, activation_format: ActivationFormat
) -> QuantizedActivation:
    """rms_norm, then per-token quantization for a quantized linear layer; nothing is rounded in between.

    x: [T, H]. Raises ValueError for a bad shape or an unknown format.
    """
    _check(x, weight)
    check_activation_format(x, activation_format)
    if x.is_cuda:
        from .gpu.norm import rms_norm_quantize as rms_norm_quantize_gpu

        return rms_norm_quantize_gpu(x, weight, eps, activation_format)
    return quantize_rows(_normalize(x, weight, eps), activation_format)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation_format: ActivationFormat
) -> tuple[QuantizedActivation, Tensor]:
    """add_rms_norm with the normalized half quantized per token: (quantized, x + residual). x, residual: [T, H]."""
    _check(x, weight)
    _check_residual(x, residual)
    check_activation_format(x, activation_format)
    if x.is_cuda:
        from .gpu.norm import add_rms_norm_quantize as add_rms_norm_quantize_gpu

        return add_rms_norm_quantize_gpu(x, residual, weight, eps, activation_format)
    total = x + residual
    return quantize_rows(_normalize(total, weight, eps), activation_format), total


def _normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # vector_norm is one vectorised pass; torch.rms_norm takes four times as long on a CPU
    x = x.float()
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return x.mul(scale).mul_(weight)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have shape {tuple(x.shape[-1:])} as x's last dimension, got {tuple(weight.shape)}"
        )


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must match x {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}"
        )
