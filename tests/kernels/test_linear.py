"""Weight formats and quantized linear layers, against float64 from the formats' definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import linear
from lserve.kernels.activation_format import QuantizedActivation, quantize_activation
from lserve.kernels.gpu import linear as gpu_linear
from lserve.kernels.oracle import linear as oracle
from lserve.kernels.weight_format import CHUNK, W8Weight, decode_w4, quantize_w4, quantize_w8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = pytest.mark.parametrize("path", [linear, gpu_linear], ids=["launcher", "kernel"])


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def weight_matrix(num_columns: int, num_channels: int) -> torch.Tensor:
    """Rows of different magnitudes, as in real layers."""
    return torch.randn(num_columns, num_channels, device=DEVICE) * torch.rand(num_columns, 1, device=DEVICE)


def w8_values(weight: W8Weight) -> torch.Tensor:
    return weight.codes.double() * weight.scale.double()[:, None]


@settings(deadline=None, max_examples=10)
@given(num_columns=st.integers(1, 40), num_channels=st.integers(1, 700))
def test_w4_decodes_to_what_its_nibbles_say(num_columns, num_channels):
    matrix = weight_matrix(num_columns, num_channels)
    weight = quantize_w4(matrix)
    decoded = decode_w4(weight)
    assert torch.equal(w8_values(decoded).float(), oracle.w4_values(weight).float())
    assert torch.equal(gpu_linear.decode_w4(weight).codes, decoded.codes)
    # the smallest step tried is 5 under the covering one, which is 16 at most: 15 * 5 / 2 is clipped from either end,
    # and half a step more where the levels are shifted
    assert ((w8_values(decoded) - matrix).abs() <= weight.scale[:, None] * 46).all()
    padding = torch.cat((weight.codes & 15, weight.codes >> 4), -1).transpose(0, 1).reshape(num_columns, -1)
    assert (padding[:, num_channels:] == 0).all()


def test_w4_keeps_about_a_tenth_of_a_normal_weight_as_error():
    matrix = torch.randn(64, 1024)
    assert relative_error(w8_values(decode_w4(quantize_w4(matrix))), matrix.double()) < 0.1


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_w8_is_symmetric_per_row(dtype):
    matrix = weight_matrix(32, 200)
    matrix[3] = 0
    weight = quantize_w8(matrix, dtype)
    steps = weight.scale[:, None] * (0.501 if dtype == torch.int8 else 16.01)
    assert ((w8_values(weight) - matrix).abs() <= steps).all()


@PATHS
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@settings(deadline=None, max_examples=6)
@given(
    num_tokens=st.sampled_from([0, 1, 3, 9, 17]),
    num_columns=st.sampled_from([8, 72, 136]),
    num_channels=st.sampled_from([16, 128, 192, 576, 1040]),
    biased=st.booleans(),
)
def test_small_batches(path, out_dtype, num_tokens, num_columns, num_channels, biased):
    matrix = weight_matrix(num_columns, num_channels)
    x = quantize_activation(torch.randn(num_tokens, num_channels, device=DEVICE), "int8_sums")
    bias = torch.randn(num_columns, device=DEVICE) if biased else None
    limit = 1e-6 if out_dtype == torch.float32 else 1e-3
    w4, w8 = quantize_w4(matrix), quantize_w8(matrix, torch.int8)
    for weight, values, run in (
        (w4, oracle.w4_values(w4), path.linear_w4a8),
        (w8, w8_values(w8), path.linear_w8a8),
    ):
        out = run(x, weight, bias, out_dtype)
        assert out.dtype == out_dtype and out.shape == (num_tokens, num_columns)
        if num_tokens:
            assert relative_error(out, oracle.linear(x.codes, x.scale, values, bias)) < limit


@pytest.mark.parametrize(("block_n", "slots"), [(64, 1), (16, 2), (32, 4), (32, 8)])
def test_slots_share_k_and_add_up(block_n, slots):
    x = quantize_activation(torch.randn(5, 5 * CHUNK, device=DEVICE), "int8_sums")
    matrix = weight_matrix(100, 5 * CHUNK)
    w4, w8 = quantize_w4(matrix), quantize_w8(matrix, torch.int8)
    tiles = gpu_linear.DecodeTiles(8, block_n, slots, 4, 2)
    for weight, launch, path in (
        (w4, gpu_linear.launch_w4a8_decode, linear.linear_w4a8),
        (w8, gpu_linear.launch_w8a8_decode, linear.linear_w8a8),
    ):
        assert torch.equal(launch(x, weight, None, torch.float32, tiles), path(x, weight, None, torch.float32))


@PATHS
def test_a_token_does_not_depend_on_its_batch(path):
    x = quantize_activation(torch.randn(70, 320, device=DEVICE), "int8_sums")
    matrix = weight_matrix(72, 320)
    for weight, run in ((quantize_w4(matrix), path.linear_w4a8), (quantize_w8(matrix, torch.int8), path.linear_w8a8)):
        together = run(x, weight, None, torch.float32)
        for rows in (slice(0, 1), slice(40, 52)):
            alone = QuantizedActivation(x.codes[rows], x.scale[rows], x.sums[rows])
            assert torch.equal(run(alone, weight, None, torch.float32), together[rows])


def test_large_batches_through_descriptors():
    x = quantize_activation(torch.randn(100, 144, device=DEVICE), "int8_sums")
    weight = quantize_w8(weight_matrix(136, 144), torch.int8)
    bias = torch.randn(136, device=DEVICE)
    tiles = gpu_linear.PrefillTiles(64, 128, 128, 2, 4, 2)
    out = gpu_linear.launch_w8a8_prefill(x, weight, bias, torch.float32, tiles)
    assert relative_error(out, oracle.linear(x.codes, x.scale, w8_values(weight), bias)) < 1e-6


def test_what_does_not_fit_is_named():
    x = quantize_activation(torch.randn(2, 64), "int8")
    matrix = torch.randn(8, 64)
    with pytest.raises(ValueError, match="int8_sums"):
        linear.linear_w4a8(x, quantize_w4(matrix), None, torch.float32)
    with pytest.raises(ValueError, match=r"activation codes must be \[T, 32\]"):
        linear.linear_w8a8(x, quantize_w8(matrix[:, :32], torch.int8), None, torch.float32)
    with pytest.raises(ValueError, match="do not go with"):
        linear.linear_w8a8(x, quantize_w8(matrix, torch.float8_e4m3fn), None, torch.float32)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        linear.linear_w8a8(x, quantize_w8(matrix, torch.int8), torch.zeros(7), torch.float32)
    with pytest.raises(ValueError, match="dtype must be"):
        quantize_w8(matrix, torch.int16)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 33, 64, 65, 300, 1000])
@pytest.mark.parametrize(("num_columns", "num_channels"), [(6144, 4096), (4096, 14336), (1000, 576)])
def test_on_the_card(num_tokens, num_columns, num_channels):
    x = torch.randn(num_tokens, num_channels, device="cuda")
    matrix = weight_matrix(num_columns, num_channels)
    w4, w8, f8 = quantize_w4(matrix), quantize_w8(matrix, torch.int8), quantize_w8(matrix, torch.float8_e4m3fn)
    assert torch.equal(gpu_linear.decode_w4(w4).codes, decode_w4(w4).codes)
    for weight, values, run, form, limit in (
        (w4, w8_values(decode_w4(w4)), linear.linear_w4a8, "int8_sums", 3e-3),
        (w8, w8_values(w8), linear.linear_w8a8, "int8", 3e-3),
        (f8, w8_values(f8), linear.linear_w8a8, "fp8", 5e-3),
    ):
        quantized = quantize_activation(x, form)
        reference = oracle.linear(quantized.codes, quantized.scale, values, None)
        out = run(quantized, weight, None, torch.bfloat16)
        assert relative_error(out, reference) < limit, form
