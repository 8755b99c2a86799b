"""A projection of few rows, computed over blocks of the weight, is the plain product."""

import pytest
import torch

from lserve.kernels.cpu.dense_linear import dense_linear


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 8, 15, 16, 40])
@pytest.mark.parametrize("out_features", [32, 96, 1024, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_plain_product(num_rows: int, out_features: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows * out_features)
    x = torch.randn(num_rows, 80, generator=generator)
    weight = torch.randn(out_features, 80, generator=generator)
    bias = torch.randn(out_features, generator=generator) if with_bias else None
    before = x.clone(), weight.clone(), None if bias is None else bias.clone()
    result = dense_linear(x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-5)
    assert result.is_contiguous()
    for now, was in zip((x, weight, bias), before, strict=True):
        assert now is was or torch.equal(now, was)


def test_a_weight_that_is_a_view_and_a_16_bit_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 64, generator=generator).t()
    x = torch.randn(8, 80, generator=generator)
    torch.testing.assert_close(dense_linear(x, weight, None), x @ weight.t())
    torch.testing.assert_close(
        dense_linear(x.bfloat16(), weight.contiguous().bfloat16(), None),
        (x @ weight.t()).bfloat16(),
        atol=0.2,
        rtol=0.02,
    )
