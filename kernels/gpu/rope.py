"""RoPE, with QK norm where wanted, on a GPU: one launch for query and key, one row per token and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_previous, can_overlap, let_next_start

_ROWS = 32


@triton.jit(do_not_specialize=["num_tokens", "num_query_blocks"])
def rope_kernel(
    query_ptr, key_ptr, query_out_ptr, key_out_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr,
    query_stride_t, query_stride_h, key_stride_t, key_stride_h, table_stride, num_tokens, num_query_blocks, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    after_previous(PDL)
    block = tl.program_id(0)
    if block < num_query_blocks:
        _rotate_rows(
            query_ptr, query_out_ptr, query_weight_ptr, cos_ptr, sin_ptr, query_stride_t, query_stride_h, table_stride,
            block, num_tokens, eps, NUM_HEADS, HALF, NORM, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate_rows(
            key_ptr, key_out_ptr, key_weight_ptr, cos_ptr, sin_ptr, key_stride_t, key_stride_h, table_stride,
            block - num_query_blocks, num_tokens, eps, NUM_KV_HEADS, HALF, NORM, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def _rotate_rows(
    in_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, stride_t, stride_h, table_stride, block, num_tokens, eps,
    NUM_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tokens = rows // NUM_HEADS
    heads = rows % NUM_HEADS
    channels = tl.arange(0, BLOCK)
    inside = (tokens < num_tokens)[:, None] & (channels < HALF)[None, :]
    source = in_ptr + (tokens * stride_t + heads * stride_h)[:, None] + channels[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        kept = channels < HALF
        first = first * factor * tl.load(weight_ptr + channels, mask=kept, other=0.0).to(tl.float32)[None, :]
        second = second * factor * tl.load(weight_ptr + HALF + channels, mask=kept, other=0.0).to(tl.float32)[None, :]
    angles = (tokens * table_stride)[:, None] + channels[None, :]
    cos = tl.load(cos_ptr + angles, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + (rows * (2 * HALF))[:, None] + channels[None, :]
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See lserve.kernels.rope.rope."""
    return _launch(query, key, None, None, 0.0, cos, sin)


def qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See lserve.kernels.rope.qk_norm_rope."""
    return _launch(query, key, query_weight, key_weight, eps, cos, sin)


def _launch(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    query = query if query.stride(2) == 1 else query.contiguous()
    key = key if key.stride(2) == 1 else key.contiguous()
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    if sin.stride(0) != cos.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    query_out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
    key_out = torch.empty((num_tokens, num_kv_heads, head_dim), dtype=key.dtype, device=key.device)
    if num_tokens:
        overlap = can_overlap(query.device)
        num_query_blocks = triton.cdiv(num_tokens * num_heads, _ROWS)
        num_key_blocks = triton.cdiv(num_tokens * num_kv_heads, _ROWS)
        rope_kernel[(num_query_blocks + num_key_blocks,)](
            query, key, query_out, key_out, query_weight, key_weight, cos, sin,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), cos.stride(0),
            num_tokens, num_query_blocks, eps,
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, NORM=query_weight is not None,
            ROWS=_ROWS, BLOCK=triton.next_power_of_2(head_dim // 2), PDL=overlap, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return query_out, key_out
