"""Low-bit weights of linear layers: how they are made (once, at load) and how they lie in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activation_format import GROUP

W4_LEVELS = 15
W4_RANGE = 119
"""First-level codes stay in [-119, 119], so that min + 15 * step fits int8 after both are rounded (QServe, 4.1)."""


CHUNK = 2 * GROUP
"""Input channels whose codes share bytes."""


@dataclass(frozen=True, slots=True)
class W8Weight:
    """weight[n, k] is codes[n, k] * scale[n].

    codes: [N, K] int8 or float8_e4m3fn; scale: float32 [N].
    """

    codes: Tensor
    scale: Tensor

    @property
    def in_features(self) -> int:
        """K, the input channels."""
        return self.codes.shape[1]

    @property
    def out_features(self) -> int:
        """N, the output channels."""
        return self.codes.shape[0]


@dataclass(frozen=True, slots=True)
class W4Weight:
    """Two levels: weight[n, k] is (code[n, k] * step[n, g] + minimum[n, g]) * scale[n], with group g = k // 128.

    Two groups share a chunk of 256 channels, C = ceil(K / 256).
    codes: uint8 [C, N, 128]: byte j of chunk c holds channel 256 c + j in its low nibble and channel 256 c + 128 + j
        in its high one. So a byte needs no interleaving, and what a block of output channels needs of a chunk is one
        run of bytes. Channels past K hold 0.
    levels: int32 [C, N], from the low byte up: step (unsigned) and minimum (signed) of a chunk's first group, then of
        its second. code * step + minimum fits int8.
    scale: float32 [N].
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        """N, the output channels."""
        return self.codes.shape[1]


def quantize_w8(weight: Tensor, dtype: torch.dtype) -> W8Weight:
    """Symmetric per output channel. weight: [N, K] float; dtype: torch.int8 or torch.float8_e4m3fn, else ValueError."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    largest = 127.0 if dtype == torch.int8 else 448.0
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_(min=1e-10).div_(largest)
    codes = weight.div(scale[:, None])
    codes = codes.round_() if dtype == torch.int8 else codes
    return W8Weight(codes.clamp_(-largest, largest).to(dtype).contiguous(), scale)


def quantize_w4(weight: Tensor) -> W4Weight:
    """Two-level 4-bit codes of weight [N, K] float, each group's step chosen by least squared error.

    Rows are scaled to [-119, 119] first; a group then tries the step that covers its range and up to three smaller
    ones, which clip its ends but round the rest finer.
    """
    num_rows, in_features = weight.shape
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_(min=1e-10).div_(W4_RANGE)
    num_chunks = -(-in_features // CHUNK)
    # padding repeats the last channel, so that it widens no group's range
    padded = weight[:, torch.arange(num_chunks * CHUNK, device=weight.device).clamp_(max=in_features - 1)]
    values = padded.div(scale[:, None]).view(num_rows, 2 * num_chunks, GROUP)
    step, minimum = _choose_levels(values)
    codes = _encode(values, step, minimum).to(torch.uint8).view(num_rows, num_chunks * CHUNK)
    codes[:, in_features:] = 0
    low, high = codes.view(num_rows, num_chunks, 2, GROUP).unbind(dim=2)
    levels = torch.stack((step.to(torch.uint8), minimum.to(torch.int8).view(torch.uint8)), dim=-1)
    return W4Weight(
        codes=(low | high << 4).transpose(0, 1).contiguous(),
        levels=levels.view(num_rows, num_chunks, 4)
        .view(torch.int32)
        .squeeze(-1)
        .t()
        .clone(memory_format=torch.contiguous_format),
        scale=scale,
        in_features=in_features,
    )


def decode_w4(weight: W4Weight) -> W8Weight:
    """The same numbers with int8 codes: exact, since both levels are integers."""
    num_chunks, num_rows, _ = weight.codes.shape
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=2).to(torch.int16)
    levels = weight.levels.view(torch.uint8).view(num_chunks, num_rows, 2, 2)
    codes.mul_(levels[..., :1]).add_(levels[..., 1:].view(torch.int8))
    rows = codes.to(torch.int8).transpose(0, 1).reshape(num_rows, num_chunks * CHUNK)
    return W8Weight(rows[:, : weight.in_features].contiguous(), weight.scale)


def _choose_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """(step, minimum), both [N, groups, 1] whole numbers, of values [N, groups, 128] in [-119, 119]."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    covering = ((high - low) / W4_LEVELS).ceil_().clamp_(min=1)
    best_error = torch.full_like(low, torch.inf)
    best_step, best_minimum = covering, low.round()
    for smaller in range(4):
        step = (covering - smaller).clamp_(min=1)
        minimum = ((low + high - W4_LEVELS * step) / 2).round_().clamp_(min=-127).minimum(127 - W4_LEVELS * step)
        decoded = _encode(values, step, minimum).mul_(step).add_(minimum)
        error = decoded.sub_(values).square_().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_step, best_minimum


def _encode(values: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    return values.sub(minimum).div_(step).round_().clamp_(0, W4_LEVELS)
