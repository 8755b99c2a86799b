"""RMSNorm in float64."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H]: float64 [..., H]."""
    x = x.to(torch.float64)
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.to(torch.float64)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(float64 norm of the sum as stored, the sum rounded to x's dtype)."""
    total = (x.to(torch.float64) + residual.to(torch.float64)).to(x.dtype)
    return rms_norm(total, weight, eps), total
