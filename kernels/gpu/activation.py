"""SiLU-mul and activation quantization on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation_format import ActivationFormat, QuantizedActivation
from .overlap import after_previous, can_overlap, let_next_start
from .quantize import empty_quantized, largest_code, row_block, store_quantized_row


@triton.jit
def _gated(gate_up_row, channels, inside, num_channels):
    gate = tl.load(gate_up_row + channels, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_row + num_channels + channels, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul_kernel(
    gate_up_ptr, out_ptr, gate_up_stride, num_channels, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < num_channels
    values = _gated(gate_up_ptr + row * gate_up_stride, channels, inside, num_channels)
    tl.store(out_ptr + row * num_channels + channels, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, sums_ptr, x_stride, num_channels, num_groups,
    GATED: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < num_channels
    if GATED:
        values = _gated(x_ptr + row * x_stride, channels, inside, num_channels)
    else:
        values = tl.load(x_ptr + row * x_stride + channels, mask=inside, other=0.0).to(tl.float32)
    store_quantized_row(
        values, row, codes_ptr, scale_ptr, sums_ptr, num_channels, num_groups, LARGEST, FP8, SUMS, BLOCK
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """See lserve.kernels.activation.silu_mul."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    num_tokens, num_channels = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, num_channels), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        overlap = can_overlap(out.device)
        block = min(triton.next_power_of_2(num_channels), 2048)
        silu_mul_kernel[(num_tokens, triton.cdiv(num_channels, block))](
            gate_up, out, gate_up.stride(0), num_channels, BLOCK=block, PDL=overlap, num_warps=4, launch_pdl=overlap
        )
    return out


def silu_mul_quantize(gate_up: Tensor, form: ActivationFormat) -> QuantizedActivation:
    """See lserve.kernels.activation.silu_mul_quantize."""
    return _quantize(gate_up, gate_up.shape[1] // 2, form, gated=True)


def quantize_activation(x: Tensor, form: ActivationFormat) -> QuantizedActivation:
    """See lserve.kernels.activation_format.quantize_activation."""
    return _quantize(x, x.shape[1], form, gated=False)


def _quantize(x: Tensor, num_channels: int, form: ActivationFormat, *, gated: bool) -> QuantizedActivation:
    x = x if x.stride(1) == 1 else x.contiguous()
    out = empty_quantized(x.shape[0], num_channels, x, form)
    if x.numel():
        overlap = can_overlap(x.device)
        block, num_warps = row_block(num_channels)
        quantize_kernel[(x.shape[0],)](
            x, out.codes, out.scale, out.sums, x.stride(0), num_channels, 0 if out.sums is None else out.sums.shape[1],
            GATED=gated, LARGEST=largest_code(form), FP8=form == "fp8", SUMS=out.sums is not None,
            BLOCK=block, PDL=overlap, num_warps=num_warps, launch_pdl=overlap,
        )  # fmt: skip
    return out
