"""Quantized linear layers in float64, from the definition of the weight formats."""

import torch
from torch import Tensor

from ..activation_format import GROUP
from ..weight_format import W4Weight


def linear(codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """codes [T, K] times scale [T, 1], weight float64 [N, K]: float64 [T, N]."""
    out = codes.to(torch.float64) * scale.to(torch.float64) @ weight.t()
    return out if bias is None else out + bias.to(torch.float64)


def w4_values(weight: W4Weight) -> Tensor:
    """The weights that the 4-bit codes stand for, nibble by nibble: float64 [N, K]."""
    columns = []
    for channel in range(weight.in_features):
        group, inner = divmod(channel, GROUP)
        byte = weight.codes[group, :, inner % (GROUP // 2)]
        code = (byte & 15 if inner < GROUP // 2 else byte >> 4).to(torch.float64)
        level = code * weight.step[group].to(torch.float64) + weight.minimum[group].to(torch.float64)
        columns.append(level * weight.scale.to(torch.float64))
    return torch.stack(columns, dim=1)
