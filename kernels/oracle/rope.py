"""RoPE as a complex product, in float64."""

import torch
from torch import Tensor

from .norm import rms_norm


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [T, H, D]; cos, sin [T, D/2]: float64 [T, H, D]. Channels i and i + D/2 are one complex number."""
    half = heads.shape[-1] // 2
    numbers = torch.complex(heads[..., :half].to(torch.float64), heads[..., half:].to(torch.float64))
    turned = numbers * torch.complex(cos.to(torch.float64), sin.to(torch.float64))[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def qk_norm_rope(heads: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm over each head's channels, then rope."""
    return rope(rms_norm(heads, weight, eps), cos, sin)
