"""SiLU-mul and activation quantization: kernel and CPU path against float64, and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import activation, activation_format
from lserve.kernels.gpu import activation as gpu_activation
from lserve.kernels.oracle import activation as oracle

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
SILU_PATHS = pytest.mark.parametrize("path", [activation, gpu_activation], ids=["launcher", "kernel"])
QUANTIZE_PATHS = pytest.mark.parametrize("path", [activation_format, gpu_activation], ids=["launcher", "kernel"])


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


@SILU_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(deadline=None, max_examples=8)
@given(num_tokens=st.integers(0, 9), num_channels=st.integers(1, 2500))
def test_silu_mul_matches_float64(path, dtype, num_tokens, num_channels):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_up = torch.randn(num_tokens, 2 * num_channels, device=device).mul(4).to(dtype)
    out = path.silu_mul(gate_up)
    assert out.dtype == dtype and out.shape == (num_tokens, num_channels)
    assert relative_error(out, oracle.silu_mul(gate_up)) < TOLERANCE[dtype]


@SILU_PATHS
@pytest.mark.parametrize("form", ["int8", "int8_sums"])
def test_silu_mul_quantized_is_within_half_a_step(path, form, device):
    gate_up = torch.randn(3, 2 * 200, device=device)
    quantized = path.silu_mul_quantize(gate_up, form)
    codes, scale = oracle.quantize(oracle.silu_mul(gate_up), 127)
    assert (quantized.codes - codes).abs().max() < 0.501
    torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-5, atol=0)


@QUANTIZE_PATHS
@settings(deadline=None, max_examples=12)
@given(num_tokens=st.integers(0, 5), num_channels=st.integers(1, 400), magnitude=st.sampled_from([1e-12, 1.0, 3e4]))
def test_codes_are_rounded_and_the_scale_covers_the_row(path, num_tokens, num_channels, magnitude):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(num_tokens, num_channels, device=device) * magnitude
    quantized = path.quantize_activation(x, "int8_sums")
    codes, scale = oracle.quantize(x, 127)
    assert quantized.codes.shape == x.shape and quantized.scale.shape == (num_tokens, 1)
    assert ((quantized.codes - codes).abs() < 0.5001).all()
    torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-6, atol=0)
    assert torch.equal(quantized.sums, oracle.group_sums(quantized.codes, 128).int())


def test_kernel_and_cpu_path_agree_to_the_bit(device):
    x = torch.randn(16, 384)
    x[3] = 0
    expected = activation_format.quantize_activation(x, "int8_sums")
    quantized = gpu_activation.quantize_activation(x.to(device), "int8_sums")
    for name in ("codes", "scale", "sums"):
        assert torch.equal(getattr(quantized, name).cpu(), getattr(expected, name)), name


def test_strided_rows_are_read_as_they_lie(device):
    wide = torch.randn(4, 600, device=device)
    quantized = gpu_activation.quantize_activation(wide[:, 200:400], "int8")
    assert torch.equal(
        quantized.codes.cpu(), activation_format.quantize_activation(wide[:, 200:400].cpu(), "int8").codes
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"gate_up must be \[T, 2F\]"):
        activation.silu_mul(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"must be \[T, K\]"):
        activation_format.quantize_activation(torch.zeros(2, 3, 4), "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_channels"), [(1, 14336), (333, 14336), (64, 1536), (4096, 100)])
def test_on_the_card(dtype, num_tokens, num_channels):
    gate_up = torch.randn(num_tokens, 2 * num_channels, device="cuda").to(dtype)
    expected = oracle.silu_mul(gate_up)
    assert relative_error(activation.silu_mul(gate_up), expected) < TOLERANCE[dtype]
    for form, largest, slack in (("int8_sums", 127, 0.502), ("fp8", 448, 16.5)):
        quantized = activation.silu_mul_quantize(gate_up, form)
        codes, scale = oracle.quantize(expected, largest)
        assert (quantized.codes.double() - codes).abs().max() < slack
        torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-4, atol=0)
