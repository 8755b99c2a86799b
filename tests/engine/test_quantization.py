"""Weight formats behind `weights:`: how far each is from native, and what the fused helpers hand to a layer."""

import pytest
import torch

from lserve.engine.errors import SettingsError
from lserve.engine.quantization import add_norm_for, make_linear, norm_for, silu_mul_for
from lserve.kernels.activation_format import QuantizedActivation

FORMATS = ["native", "fp8", "int8", "w4a8"]
LIMITS = {"native": 1e-6, "fp8": 0.05, "int8": 0.02, "w4a8": 0.15}


def relative_error(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


@pytest.fixture
def matrix():
    torch.manual_seed(1)
    return torch.randn(48, 320) * torch.rand(48, 1)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_is_close_to_its_native_matrix(weights, biased, matrix):
    bias = torch.randn(48) if biased else None
    x = torch.randn(7, 320)
    layer = make_linear(matrix, bias, weights, torch.float32)
    reference = torch.nn.functional.linear(x, matrix, bias)
    assert layer.out_features == 48
    assert relative_error(layer(x), reference) < LIMITS[weights]


@pytest.mark.parametrize("weights", FORMATS)
def test_the_compute_dtype_comes_out(weights, matrix):
    layer = make_linear(matrix, None, weights, torch.bfloat16)
    assert layer(torch.randn(3, 320).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("weights", FORMATS)
def test_what_norms_and_silu_hand_over_equals_quantizing_afterwards(weights, matrix):
    layer = make_linear(matrix, None, weights, torch.float32)
    x, residual, gate_up = torch.randn(4, 320), torch.randn(4, 320), torch.randn(4, 640)
    norm = torch.randn(320)
    normed, total = add_norm_for(layer, x, residual, norm, 1e-5)
    assert torch.equal(total, x + residual)
    assert isinstance(normed, QuantizedActivation) == (weights != "native")
    floats = torch.rms_norm(total, (320,), norm, 1e-5)
    for handed, plain in (
        (normed, floats),
        (norm_for(layer, total, norm, 1e-5), floats),
        (silu_mul_for(layer, gate_up), torch.nn.functional.silu(gate_up[:, :320]) * gate_up[:, 320:]),
    ):
        # a value at the edge of two codes may fall to either
        assert relative_error(layer(handed), layer(plain)) < 1e-3


def test_a_format_or_width_that_cannot_be_is_named(matrix):
    with pytest.raises(SettingsError, match="weights must be native, fp8, int8 or w4a8, got 'int3'"):
        make_linear(matrix, None, "int3", torch.float32)
    with pytest.raises(SettingsError, match=r"multiples of 16, got a matrix \(48, 317\)"):
        make_linear(matrix[:, :317], None, "int8", torch.float32)
