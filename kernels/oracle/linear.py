"""Quantized linear layers in float64, from the definition of the weight formats."""

import torch
from torch import Tensor

from ..activation_format import GROUP
from ..weight_format import CHUNK, W4Weight


def linear(codes: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """codes [T, K] times scale [T, 1], weight float64 [N, K]: float64 [T, N]."""
    out = codes.to(torch.float64) * scale.to(torch.float64) @ weight.t()
    return out if bias is None else out + bias.to(torch.float64)


def w4_values(weight: W4Weight) -> Tensor:
    """The weights that the 4-bit codes stand for, nibble by nibble: float64 [N, K]."""
    levels = weight.levels.view(torch.uint8).view(*weight.levels.shape, 2, 2)
    columns = []
    for channel in range(weight.in_features):
        chunk, inner = divmod(channel, CHUNK)
        half, byte = divmod(inner, GROUP)
        code = weight.codes[chunk, :, byte] >> 4 * half & 15
        step, minimum = levels[chunk, :, half, 0], levels[chunk, :, half, 1].view(torch.int8)
        columns.append((code.to(torch.float64) * step + minimum) * weight.scale)
    return torch.stack(columns, dim=1)
