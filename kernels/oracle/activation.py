"""SiLU-mul and per-token quantization in float64."""

import torch
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F]: float64 [T, F]."""
    gate, up = gate_up.to(torch.float64).chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def quantize(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Real-valued codes, before rounding, and scales: x [T, K] is codes * scale, codes in [-largest, largest]."""
    x = x.to(torch.float64)
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / largest
    return x / scale, scale


def group_sums(codes: Tensor, group: int) -> Tensor:
    """codes [T, K] integers: int64 [T, ceil(K / group)], one slice at a time."""
    return torch.stack([part.to(torch.int64).sum(dim=-1) for part in codes.split(group, dim=-1)], dim=-1)
