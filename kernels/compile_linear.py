"""What `compile_check` compiles of linear layers, norms, RoPE, SiLU and sampling: a Llama-3-8B layer's shapes."""

import torch
from torch import Tensor

from .activation_format import ActivationFormat, QuantizedActivation
from .compile_check import Case
from .gpu import activation, linear, norm, rope, sample
from .gpu.quantize import empty_quantized
from .weight_format import CHUNK, W4Weight, W8Weight

HIDDEN, COLUMNS, FEED_FORWARD, VOCABULARY = 4096, 6144, 14336, 128256
PORTABLE = (80, 90, 100)


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _x(num_tokens: int, form: ActivationFormat) -> QuantizedActivation:
    return empty_quantized(num_tokens, HIDDEN, torch.empty(0), form)


def _w4(num_columns: int) -> W4Weight:
    chunks = HIDDEN // CHUNK
    codes = torch.empty((chunks, num_columns, CHUNK // 2), dtype=torch.uint8)
    return W4Weight(codes, torch.empty((chunks, num_columns), dtype=torch.int32), torch.empty(num_columns), HIDDEN)


def _w8(dtype: torch.dtype) -> W8Weight:
    codes = torch.empty((COLUMNS, HIDDEN), dtype=dtype)
    return W8Weight(codes, torch.empty(COLUMNS))


def _linear(num_tokens: int, form: ActivationFormat, num_columns: int = COLUMNS) -> Tensor:
    if form == "int8_sums":
        return linear.linear_w4a8(_x(num_tokens, form), _w4(num_columns), None, torch.bfloat16)
    weight = _w8(torch.int8 if form == "int8" else torch.float8_e4m3fn)
    return linear.linear_w8a8(_x(num_tokens, form), weight, None, torch.bfloat16)


def _prefill(form: ActivationFormat) -> Tensor:
    weight = _w8(torch.int8 if form == "int8" else torch.float8_e4m3fn)
    tiles = linear.prefill_tiles(8192)
    return linear.launch_w8a8_prefill(_x(8192, form), weight, None, torch.bfloat16, tiles)


def _norm(form: ActivationFormat) -> object:
    return norm.add_rms_norm_quantize(_bf16(8, HIDDEN), _bf16(8, HIDDEN), _bf16(HIDDEN), 1e-5, form)


def _rope() -> object:
    cos, sin = torch.empty(2, 8, 64)
    return rope.qk_norm_rope(_bf16(8, 32, 128), _bf16(8, 8, 128), _bf16(128), _bf16(128), 1e-6, cos, sin)


def _sample() -> Tensor:
    row = torch.empty(8)
    return sample.sample(torch.empty(8, VOCABULARY), row, row.int(), row, row, row.double())


LINEAR_CASES = [
    Case("w4a8 batch 1", lambda: _linear(1, "int8_sums"), capabilities=PORTABLE),
    Case("w4a8 batch 16", lambda: _linear(16, "int8_sums")),
    Case("w4a8 batch 64", lambda: _linear(64, "int8_sums")),
    Case("w4a8 batch 16, wide", lambda: _linear(16, "int8_sums", 2 * FEED_FORWARD), wgmma=("w4a8_wide_kernel",)),
    Case("w4a8 batch 64, wide", lambda: _linear(64, "int8_sums", 2 * FEED_FORWARD), wgmma=("w4a8_wide_kernel",)),
    Case("w8a8 int8 batch 16", lambda: _linear(16, "int8")),
    Case("w8a8 fp8 batch 16", lambda: _linear(16, "fp8")),
    Case("w8a8 int8 8192 tokens", lambda: _prefill("int8"), wgmma=("w8a8_prefill_kernel",)),
    Case("w8a8 fp8 8192 tokens", lambda: _prefill("fp8"), wgmma=("w8a8_prefill_kernel",)),
    Case("add_rms_norm_quantize fp8", lambda: _norm("fp8")),
    Case("add_rms_norm_quantize int8_sums", lambda: _norm("int8_sums"), capabilities=PORTABLE),
    Case("qk_norm_rope", _rope),
    Case("silu_mul_quantize", lambda: activation.silu_mul_quantize(_bf16(8, 2 * FEED_FORWARD), "int8_sums")),
    Case("sample", _sample),
]
