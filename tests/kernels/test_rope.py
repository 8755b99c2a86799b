"""RoPE and QK norm: kernel and CPU path against a complex product in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import rope
from lserve.kernels.gpu import rope as gpu_rope
from lserve.kernels.oracle import rope as oracle

PATHS = pytest.mark.parametrize("path", [rope, gpu_rope], ids=["launcher", "kernel"])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def make(num_tokens, num_heads, num_kv_heads, head_dim, dtype, device):
    """Query and key as views of one fused projection, and tables of random angles."""
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6.3
    return fused[:, :num_heads], fused[:, num_heads : num_heads + num_kv_heads], angles.cos(), angles.sin()


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(deadline=None, max_examples=8)
@given(
    num_tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (9, 3), (7, 1), (8, 2)]),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    whole=st.booleans(),
)
def test_rotation_matches_a_complex_product(path, dtype, num_tokens, heads, head_dim, whole):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key, cos, sin = make(num_tokens, *heads, head_dim, dtype, device)
    tables = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if whole else (cos, sin)
    for out, heads_in in zip(path.rope(query, key, *tables), (query, key), strict=True):
        assert out.dtype == dtype and out.shape == heads_in.shape
        assert relative_error(out, oracle.rope(heads_in, cos, sin)) < TOLERANCE[dtype]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_qk_norm_comes_first(path, dtype, head_dim, device):
    query, key, cos, sin = make(5, 6, 2, head_dim, dtype, device)
    query_weight, key_weight = torch.randn(2, head_dim, device=device).to(dtype)
    outs = path.qk_norm_rope(query, key, query_weight, key_weight, 1e-6, cos, sin)
    for out, heads, weight in zip(outs, (query, key), (query_weight, key_weight), strict=True):
        assert out.dtype == dtype
        assert relative_error(out, oracle.qk_norm_rope(heads, weight, 1e-6, cos, sin)) < TOLERANCE[dtype]


@PATHS
def test_an_empty_batch(path, device):
    query, key, cos, sin = make(0, 4, 2, 64, torch.float32, device)
    assert [tuple(out.shape) for out in path.rope(query, key, cos, sin)] == [(0, 4, 64), (0, 2, 64)]


def test_wrong_shapes_are_named():
    query, key, cos, sin = make(3, 4, 2, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"key must be \[3, Hkv, 64\]"):
        rope.rope(query, key[:2], cos, sin)
    with pytest.raises(ValueError, match=r"cos must be \[3, 32\] or \[3, 64\]"):
        rope.rope(query, key, cos[:, :31], sin)
    with pytest.raises(ValueError, match="query_weight must have shape"):
        rope.qk_norm_rope(query, key, torch.zeros(32), torch.zeros(64), 1e-6, cos, sin)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 129, 4097])
def test_on_the_card(dtype, num_tokens):
    query, key, cos, sin = make(num_tokens, 32, 8, 128, dtype, "cuda")
    query_weight, key_weight = torch.randn(2, 128, device="cuda").to(dtype)
    for out, heads in zip(rope.rope(query, key, cos, sin), (query, key), strict=True):
        assert relative_error(out, oracle.rope(heads, cos, sin)) < TOLERANCE[dtype]
    outs = rope.qk_norm_rope(query, key, query_weight, key_weight, 1e-6, cos, sin)
    for out, heads, weight in zip(outs, (query, key), (query_weight, key_weight), strict=True):
        assert relative_error(out, oracle.qk_norm_rope(heads, weight, 1e-6, cos, sin)) < TOLERANCE[dtype]
