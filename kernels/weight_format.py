"""Low-bit weights of linear layers: how they are made (once, at load) and how they lie in memory."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .activation_format import GROUP

W4_LEVELS = 15
W4_RANGE = 119
"""First-level codes stay in [-119, 119], so that min + 15 * step fits int8 after both are rounded (QServe, 4.1)."""

W4_STEPS_TRIED = 6

CHUNK = 2 * GROUP
"""Input channels whose codes share bytes."""

W8_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


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
    scale = w8_scale(weight, dtype)
    codes = weight.float().div(scale[:, None])
    codes = codes.round_() if dtype == torch.int8 else codes
    largest = W8_LARGEST[dtype]
    return W8Weight(codes.clamp_(-largest, largest).to(dtype).contiguous(), scale)


def w8_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors [N] by which the rows of weight [N, K] just fit dtype; errors as in quantize_w8."""
    if dtype not in W8_LARGEST:
        raise ValueError(f"dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    return weight.float().abs().amax(dim=1).clamp_(min=1e-10).div_(W8_LARGEST[dtype])


def quantize_w4(weight: Tensor) -> W4Weight:
    """Two-level 4-bit codes of weight [N, K] float, each group's step chosen by least squared error.

    Rows are scaled to [-119, 119] first.
    """
    scale = w4_scale(weight)
    groups = weight.float().div(scale[:, None]).split(GROUP, dim=1)
    levels = [choose_levels(group) for group in groups]
    codes = [encode_w4(group, *chosen) for group, chosen in zip(groups, levels, strict=True)]
    step, minimum = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    return pack_w4(torch.cat(codes, dim=1), step, minimum, scale)


def w4_scale(weight: Tensor) -> Tensor:
    """The factors [N] that scale the rows of weight [N, K] to [-119, 119]."""
    return weight.float().abs().amax(dim=1).clamp_(min=1e-10).div_(W4_RANGE)


def pack_w4(codes: Tensor, step: Tensor, minimum: Tensor, scale: Tensor) -> W4Weight:
    """A W4Weight of whole numbers: codes [N, K] in [0, 15], step and minimum [N, ceil(K / 128)], scale float32 [N]."""
    num_rows, in_features = codes.shape
    num_chunks = -(-in_features // CHUNK)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, num_chunks * CHUNK - in_features))
    low, high = padded.view(num_rows, num_chunks, 2, GROUP).unbind(dim=2)
    pairs = torch.stack((step.to(torch.uint8), minimum.to(torch.int8).view(torch.uint8)), dim=-1)
    levels = torch.nn.functional.pad(pairs, (0, 0, 0, 2 * num_chunks - pairs.shape[1])).view(num_rows, num_chunks, 4)
    return W4Weight(
        codes=(low | high << 4).transpose(0, 1).contiguous(),
        levels=levels.view(torch.int32).squeeze(-1).t().clone(memory_format=torch.contiguous_format),
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


def choose_levels(values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(step, minimum), both [N, 1] whole numbers, of one group's values [N, up to 128] in [-119, 119].

    Tried are the step that covers the range and smaller ones, which clip its ends but round the rest finer, each in the
    middle of the range and half a step to either side. The least squared error wins; importance [up to 128] weighs it.
    """
    low, high = values.aminmax(dim=-1, keepdim=True)
    covering = ((high - low) / W4_LEVELS).ceil_().clamp_(min=1)
    best_error = torch.full_like(low, torch.inf)
    best_step, best_minimum = covering, low.round()
    for smaller, shift in itertools.product(range(W4_STEPS_TRIED), (0.0, -0.5, 0.5)):
        step = (covering - smaller).clamp_(min=1)
        minimum = ((low + high - W4_LEVELS * step) / 2 + shift * step).round_()
        minimum = minimum.clamp_(min=-127).minimum(127 - W4_LEVELS * step)
        error = encode_w4(values, step, minimum).mul_(step).add_(minimum).sub_(values).square_()
        error = (error if importance is None else error.mul_(importance)).sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_step, best_minimum


def encode_w4(values: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    """The codes in [0, 15] nearest to values."""
    return values.sub(minimum).div_(step).round_().clamp_(0, W4_LEVELS)
