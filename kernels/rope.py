"""Rotary position embedding in half-split channel order, with the QK norm that some models put before it."""

import torch
from torch import Tensor


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates channel pairs (i, i + D/2) of each head by the token's angles.

    query: [T, Hq, D]; key: [T, Hkv, D], views into a fused projection allowed; cos, sin: [T, D/2], or [T, D] with both
    halves equal (saves two operations on a CPU), in float32 or query's dtype. Returns new tensors in the inputs' dtype.
    Raises ValueError when shapes do not fit together.
    """
    _check(query, key, cos, sin)
    if query.is_cuda:
        from .gpu.rope import rope as rope_gpu

        return rope_gpu(query, key, cos, sin)
    rotated = _rotate(torch.cat((query, key), 1), cos, sin)
    num_heads = query.shape[1]
    return rotated[:, :num_heads], rotated[:, num_heads:]


def qk_norm_rope(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head's query and key over its channels (Qwen3), then rope.

    query_weight, key_weight: [D]; the rest as in rope. The normalized values are not rounded before they are rotated.
    """
    _check(query, key, cos, sin)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.shape != query.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(query.shape[-1:])}, got {tuple(weight.shape)}")
    if query.is_cuda:
        from .gpu.rope import qk_norm_rope as qk_norm_rope_gpu

        return qk_norm_rope_gpu(query, key, query_weight, key_weight, eps, cos, sin)
    num_heads = query.shape[1]
    heads = torch.cat((query, key), 1).float()
    scale = (
        torch.linalg.vector_norm(heads, dim=-1, keepdim=True).square_().mul_(1.0 / heads.shape[-1]).add_(eps).rsqrt_()
    )
    heads = heads.mul_(scale)
    heads[:, :num_heads] *= query_weight
    heads[:, num_heads:] *= key_weight
    rotated = _rotate(heads, cos, sin).to(query.dtype)
    return rotated[:, :num_heads], rotated[:, num_heads:]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if cos.shape[-1] != heads.shape[-1]:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    first, second = heads.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    if heads.dtype == torch.float32:
        return heads * cos.unsqueeze(1) + turned.mul_(sin.unsqueeze(1))
    return (heads.float() * cos.unsqueeze(1) + turned.float().mul_(sin.unsqueeze(1))).to(heads.dtype)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    num_tokens, _, head_dim = query.shape
    if key.dim() != 3 or key.shape[0] != num_tokens or key.shape[2] != head_dim:
        raise ValueError(
            f"key must be [{num_tokens}, Hkv, {head_dim}] beside query {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, got {head_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((num_tokens, head_dim), (num_tokens, head_dim // 2)) or table.shape != cos.shape:
            wanted = f"[{num_tokens}, {head_dim // 2}] or [{num_tokens}, {head_dim}]"
            raise ValueError(f"{name} must be {wanted}, got {tuple(table.shape)}")
