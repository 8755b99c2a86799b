"""RMSNorm on a GPU: one program per token, the row held in registers, read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation_format import ActivationFormat, QuantizedActivation
from .overlap import after_previous, can_overlap, let_next_start
from .quantize import empty_quantized, largest_code, row_block, store_quantized_row


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, scale_ptr, sums_ptr,
    x_stride, residual_stride, num_channels, num_groups, eps,
    ADD: tl.constexpr, QUANTIZE: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr, SUMS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < num_channels
    let_next_start(PDL)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    after_previous(PDL)
    x = tl.load(x_ptr + row * x_stride + channels, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + channels, mask=inside, other=0.0)
        # rounded to the stored dtype before it is normalized, as the two separate steps would
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * num_channels + channels, x, mask=inside)
    values = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values) / num_channels + eps)
    values = values * factor * weight
    if QUANTIZE:
        store_quantized_row(
            values, row, out_ptr, scale_ptr, sums_ptr, num_channels, num_groups, LARGEST, FP8, SUMS, BLOCK
        )
    else:
        tl.store(out_ptr + row * num_channels + channels, values.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See lserve.kernels.norm.rms_norm."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, eps, out, None, None, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See lserve.kernels.norm.add_rms_norm."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(out)
    _launch(x, residual, weight, eps, out, total, None, None)
    return out, total


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, form: ActivationFormat) -> QuantizedActivation:
    """See lserve.kernels.norm.rms_norm_quantize."""
    out = empty_quantized(*x.shape, x, form)
    _launch(x, None, weight, eps, out.codes, None, out, form)
    return out


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: ActivationFormat
) -> tuple[QuantizedActivation, Tensor]:
    """See lserve.kernels.norm.add_rms_norm_quantize."""
    out = empty_quantized(*x.shape, x, form)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, eps, out.codes, total, out, form)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor | None,
    quantized: QuantizedActivation | None,
    form: ActivationFormat | None,
) -> None:
    num_channels = x.shape[-1]
    rows = _rows(x)
    residual_rows = rows if residual is None else _rows(residual)
    if rows.shape[0] == 0:
        return
    block, num_warps = row_block(num_channels)
    sums = None if quantized is None else quantized.sums
    overlap = can_overlap(x.device)
    norm_kernel[(rows.shape[0],)](
        rows, residual_rows, weight, out, total, None if quantized is None else quantized.scale, sums,
        rows.stride(0), residual_rows.stride(0), num_channels, 0 if sums is None else sums.shape[1], eps,
        ADD=residual is not None, QUANTIZE=form is not None, LARGEST=127.0 if form is None else largest_code(form),
        FP8=form == "fp8", SUMS=sums is not None, BLOCK=block, PDL=overlap,
        num_warps=num_warps, launch_pdl=overlap,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 else rows.contiguous()
