"""Rounding weights so that what one channel loses the next ones make up for (GPTQ, arXiv 2210.17323).

A matrix's outputs lose E H E^T squared, with E the rounding errors of its rows and H = X^T X of the inputs that it will
see. Channels are rounded in order, and each error is spread over the channels that follow. Then, some times over, every
channel is rounded again to what is best beside all others as they are (coordinate descent).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lserve.kernels.activation_format import GROUP, ActivationFormat, quantize_activation
from lserve.kernels.weight_format import (
    W4_RANGE,
    W8_LARGEST,
    W4Weight,
    W8Weight,
    choose_levels,
    encode_w4,
    pack_w4,
    w4_scale,
    w8_scale,
)

DAMPING = 0.3
"""Share of H's mean diagonal that is added to it: channels that the inputs say little of stay near their weights."""

SWEEPS = 2
"""How often all channels are rounded again."""

RoundRow = Callable[[Tensor], Tensor]
"""Values of one channel, one per output row, to the nearest values that the format has."""


def gptq_w8(weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> W8Weight:
    """`quantize_w8` with errors made up for. weight: [N, K] float; hessian: [K, K] of its inputs; dtype: of codes."""
    largest = W8_LARGEST[dtype]

    def round_row(row: Tensor) -> Tensor:
        bounded = row.clamp(-largest, largest)
        return bounded.round() if dtype == torch.int8 else bounded.to(dtype).float()

    scale = w8_scale(weight, dtype)
    values = weight.float().div(scale[:, None]).t().contiguous()
    rounded = _compensate(values, hessian, lambda group, importance: round_row)
    return W8Weight(rounded.t().to(dtype).contiguous(), scale)


def gptq_w4(weight: Tensor, hessian: Tensor) -> W4Weight:
    """`quantize_w4` with errors made up for; a group's levels are chosen when its turn comes."""
    steps, minima = [], []

    def start_group(group: Tensor, importance: Tensor) -> RoundRow:
        step, minimum = choose_levels(group.t().clamp(-W4_RANGE, W4_RANGE), importance)
        steps.append(step)
        minima.append(minimum)
        step, minimum = step.squeeze(1), minimum.squeeze(1)
        return lambda row: encode_w4(row, step, minimum).mul_(step).add_(minimum)

    scale = w4_scale(weight)
    rounded = _compensate(weight.float().div(scale[:, None]).t().contiguous(), hessian, start_group).t()
    step, minimum = torch.cat(steps, dim=1), torch.cat(minima, dim=1)
    channels = torch.arange(weight.shape[1], device=weight.device) // GROUP
    return pack_w4((rounded - minimum[:, channels]) / step[:, channels], step, minimum, scale)


def input_hessian(x: Tensor, activation_format: ActivationFormat, weights: Tensor | None = None) -> Tensor:
    """X^T X, float32 [K, K], of inputs x [T, K] as they are after quantization. weights [T]: how much each counts."""
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for start in range(0, len(x), 2048):
        quantized = quantize_activation(x[start : start + 2048], activation_format)
        values = quantized.codes.float() * quantized.scale
        weighted = values if weights is None else values * weights[start : start + 2048, None]
        total.addmm_(weighted.t(), values)
    return total


def _compensate(values: Tensor, hessian: Tensor, start_group: Callable[[Tensor, Tensor], RoundRow]) -> Tensor:
    """Rounds values [K, N], channel by channel, in groups of 128 for which start_group is asked in order.

    It gets a group's values with what they have to make up for, and how much errors in each channel cost.
    """
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal.add_(DAMPING * diagonal.mean()).clamp_(min=1e-10)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    groups = [slice(start, min(start + GROUP, len(values))) for start in range(0, len(values), GROUP)]
    targets, rounded, rules = values.clone(), torch.empty_like(values), []
    for group in groups:
        rest, inside = values[group.stop :], factor[group, group]
        rules.append(start_group(values[group], inside.diagonal().square().reciprocal()))
        errors = _round_group(values[group], inside / inside.diagonal()[:, None], rounded[group], rules[-1])
        rest.addmm_((factor[group, group.stop :] / inside.diagonal()[:, None]).t(), errors, alpha=-1)
    damped = damped.float()
    for _ in range(SWEEPS):
        # H (targets - rounded): what outputs still miss, seen from each channel
        slack = damped @ (targets - rounded)
        for group, rule in zip(groups, rules, strict=True):
            slack.addmm_(damped[:, group], _round_again(slack[group], damped[group, group], rounded[group], rule))
    return rounded


def _round_group(values: Tensor, spread: Tensor, rounded: Tensor, rule: RoundRow) -> Tensor:
    """Rounds one group's channels in order into rounded; returns their errors [128, N]. Changes values."""
    errors = torch.empty_like(values)
    for channel, row in enumerate(values):
        rounded[channel] = rule(row)
        errors[channel] = row - rounded[channel]
        values[channel + 1 :].addr_(spread[channel, channel + 1 :], errors[channel], alpha=-1)
    return errors


def _round_again(slack: Tensor, costs: Tensor, rounded: Tensor, rule: RoundRow) -> Tensor:
    """Moves one group's channels to where they are best beside all others; returns by how much less [128, N]."""
    slack, before = slack.clone(), rounded.clone()
    for channel in range(len(rounded)):
        moved = rounded[channel] - rule(rounded[channel] + slack[channel] / costs[channel, channel])
        rounded[channel] -= moved
        slack.addr_(costs[:, channel], moved)
    return before - rounded
