"""RMSNorm: kernel and CPU path against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import norm
from lserve.kernels.gpu import norm as gpu_norm
from lserve.kernels.oracle import activation as activation_oracle
from lserve.kernels.oracle import norm as oracle

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
PATHS = pytest.mark.parametrize("path", [norm, gpu_norm], ids=["launcher", "kernel"])
EPS = 1e-5


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(deadline=None, max_examples=8)
@given(num_tokens=st.integers(1, 9), num_channels=st.integers(1, 700))
def test_norm_and_residual_match_float64(path, dtype, num_tokens, num_channels):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, residual = torch.randn(2, num_tokens, num_channels, device=device).to(dtype)
    weight = torch.randn(num_channels, device=device).to(dtype)
    assert relative_error(path.rms_norm(x, weight, EPS), oracle.rms_norm(x, weight, EPS)) < TOLERANCE[dtype]
    normed, total = path.add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = oracle.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    assert relative_error(normed, expected) < TOLERANCE[dtype]


@PATHS
def test_a_fused_addition_equals_the_two_steps(path, device):
    x, residual = torch.randn(2, 5, 96, device=device).half()
    weight = torch.randn(96, device=device).half()
    normed, total = path.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(normed, path.rms_norm(x + residual, weight, EPS))
    assert torch.equal(total, x + residual)


@PATHS
def test_views_and_empty_batches(path, device):
    wide = torch.randn(4, 300, device=device)
    weight = torch.randn(100, device=device)
    assert (
        relative_error(path.rms_norm(wide[:, 100:200], weight, EPS), oracle.rms_norm(wide[:, 100:200], weight, EPS))
        < 1e-6
    )
    assert path.rms_norm(wide[:0, :100], weight, EPS).shape == (0, 100)
    assert path.add_rms_norm(wide[:0, :100], wide[:0, :100], weight, EPS)[0].shape == (0, 100)


@PATHS
@pytest.mark.parametrize("form", ["int8", "int8_sums"])
@pytest.mark.parametrize("num_channels", [64, 128, 200, 576])
def test_the_quantized_norm_is_within_half_a_step(path, form, num_channels, device):
    x, residual = torch.randn(2, 3, num_channels, device=device)
    weight = torch.randn(num_channels, device=device)
    expected, expected_total = oracle.add_rms_norm(x, residual, weight, EPS)
    codes, scale = activation_oracle.quantize(expected, 127)
    quantized, total = path.add_rms_norm_quantize(x, residual, weight, EPS, form)
    assert torch.equal(total, expected_total)
    assert (quantized.codes - codes).abs().max() < 0.501
    torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-5, atol=0)
    if form == "int8_sums":
        assert torch.equal(quantized.sums, activation_oracle.group_sums(quantized.codes, 128).int())
    alone = path.rms_norm_quantize(total, weight, EPS, form)
    assert torch.equal(alone.codes, quantized.codes)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        norm.rms_norm(x, torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="residual must match"):
        norm.add_rms_norm(x, x[:1], torch.zeros(8), EPS)
    with pytest.raises(ValueError, match="activation_format must be one of"):
        norm.rms_norm_quantize(x, torch.zeros(8), EPS, "int3")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "num_channels"), [(1, 4096), (333, 4096), (64, 576), (7, 14336)])
def test_on_the_card(dtype, num_tokens, num_channels):
    x, residual = torch.randn(2, num_tokens, num_channels, device="cuda").to(dtype)
    weight = torch.randn(num_channels, device="cuda").to(dtype)
    normed, total = norm.add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = oracle.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    assert relative_error(normed, expected) < TOLERANCE[dtype]
    for form, largest, slack in (("int8", 127, 0.502), ("fp8", 448, 16.5)):
        quantized = norm.rms_norm_quantize(total, weight, EPS, form)
        codes, scale = activation_oracle.quantize(expected, largest)
        assert (quantized.codes.double() - codes).abs().max() < slack
        torch.testing.assert_close(quantized.scale.double(), scale, rtol=1e-4, atol=0)
