"""Low-bit weights of linear layers: how they are made (once, at load) and how they lie in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .activation_format import GROUP

W4_LEVELS = 15
W4_RANGE = 119
"""First-level codes stay in [-119, 119], so that min + 15 * step fits int8 after both are rounded (QServe, 4.1)."""


@dataclass(frozen=True, slots=True)
class W8Weight:
    """weight[n, k] is codes[n, k] * scale[n]. codes: [N, K] int8 or float8_e4m3fn; scale: float32 [N]."""

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
    """Two levels: weight[n, k] is (code[n, k] * step[g, n] + minimum[g, n]) * scale[n], with g = k // 128.

    codes: uint8 [G, N, 64], G = ceil(K / 128): byte j of group g holds channel 128 g + j in its low nibble and channel
        128 g + 64 + j in its high one, so both halves of a group are used without interleaving, and what a block of
        output channels needs of a group is one run of bytes; channels past K hold 0.
    step: uint8 [G, N]; minimum: int8 [G, N]. What they decode to, code * step + minimum, fits int8.
    scale: float32 [N].
    semaphores: int32 [ceil(N / 32)] zeros, the count of finished parts per output tile where a launch splits K; every
        launch leaves zeros. Launches that share a weight must not overlap.
    """

    codes: Tensor
    step: Tensor
    minimum: Tensor
    scale: Tensor
    semaphores: Tensor
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
    num_groups = -(-in_features // GROUP)
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_(min=1e-10).div_(W4_RANGE)
    pad = num_groups * GROUP - in_features
    # the short group's padding repeats its last channel, so that it widens no range
    padded = torch.nn.functional.pad(weight[None], (0, pad), mode="replicate")[0] if pad else weight
    values = padded.div(scale[:, None]).view(num_rows, num_groups, GROUP)
    low, high = values.aminmax(dim=-1, keepdim=True)
    covering = ((high - low) / W4_LEVELS).ceil_().clamp_(min=1)
    best_error = torch.full_like(low, torch.inf)
    best_step, best_minimum = covering.clone(), low.round()
    for smaller in range(4):
        step = (covering - smaller).clamp_(min=1)
        spare = W4_LEVELS * step - (high - low)
        minimum = (low - spare / 2).round_().clamp_(-127, 127).minimum(127 - W4_LEVELS * step)
        decoded = _encode(values, step, minimum).mul_(step).add_(minimum)
        error = (decoded - values).square_().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_minimum = torch.where(better, minimum, best_minimum)
    codes = _encode(values, best_step, best_minimum).to(torch.uint8)
    if pad:
        codes.view(num_rows, -1)[:, in_features:] = 0
    packed = codes[..., : GROUP // 2] | (codes[..., GROUP // 2 :] << 4)
    return W4Weight(
        codes=packed.transpose(0, 1).contiguous(),
        step=best_step.squeeze(-1).to(torch.uint8).t().contiguous(),
        minimum=best_minimum.squeeze(-1).to(torch.int8).t().contiguous(),
        scale=scale,
        semaphores=torch.zeros(-(-num_rows // 32), dtype=torch.int32, device=weight.device),
        in_features=in_features,
    )


def decode_w4(weight: W4Weight) -> W8Weight:
    """The same numbers with int8 codes: exact, since both levels are integers."""
    codes = torch.cat((weight.codes & 15, weight.codes >> 4), dim=-1).to(torch.int16)
    codes.mul_(weight.step.unsqueeze(-1)).add_(weight.minimum.unsqueeze(-1))
    rows = codes.to(torch.int8).transpose(0, 1).reshape(weight.out_features, -1)
    return W8Weight(rows[:, : weight.in_features].contiguous(), weight.scale)


def _encode(values: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    return ((values - minimum) / step).round_().clamp_(0, W4_LEVELS)
