"""Drawing tokens on the device: temperature, min_p, top_k, top_p, then one inverse CDF per row."""

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below this take the largest logit, the first one on ties."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    filtered: bool = True,
) -> Tensor:
    """One token per row: int64 [N].

    logits: float32 [N, V]. temperature, top_p, min_p: float32 [N]; top_k: int32 [N], 0 keeps all; uniform: float64 [N]
    in [0, 1), what decides the draw. Filters run in vLLM's order (min_p, top_k, top_p of what is left) and each is a
    lowest kept logit, so tokens that tie with it stay. The CDF runs in vocabulary order. filtered: False promises that
    no row uses top_k or top_p, and saves the search for them. Nothing is synchronized: a CUDA graph can hold the call.
    Raises ValueError for a wrong shape or dtype.
    """
    _check(logits, {"temperature": temperature, "top_p": top_p, "min_p": min_p}, top_k, uniform)
    if logits.is_cuda:
        from .gpu.sample import sample as sample_gpu

        return sample_gpu(logits, temperature, top_k, top_p, min_p, uniform, filtered=filtered)
    greedy = temperature < GREEDY_BELOW
    heat = torch.where(greedy, 1.0, temperature)[:, None]
    # how far below the row's best a token is, in units of temperature; a token is kept up to some distance
    distance = (logits.amax(-1, keepdim=True) - logits) / heat
    limit = -min_p.log()[:, None]
    if filtered:
        limit = _filter(distance, limit, top_k, top_p)
    weights = torch.where(distance <= limit, (-distance).exp(), 0.0)
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return torch.where(greedy, logits.argmax(-1), drawn)


def _filter(distance: Tensor, limit: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The distance, [N, 1], up to which top_k and then top_p keep tokens that are within limit."""
    ascending = distance.sort(-1).values
    vocab_size = distance.shape[1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()[:, None] - 1
    limit = torch.minimum(limit, torch.where(top_k[:, None] > 0, ascending.gather(1, last), torch.inf))
    mass = torch.where(ascending <= limit, (-ascending).exp(), 0.0).cumsum(-1, dtype=torch.float64)
    crossing = (mass < top_p.double()[:, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp_(max=vocab_size - 1)
    nucleus = torch.where(top_p[:, None] < 1, ascending.gather(1, crossing), torch.inf)
    return torch.minimum(limit, nucleus)


def _check(logits: Tensor, floats: dict[str, Tensor], top_k: Tensor, uniform: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be float32 [N, V], got {logits.dtype} {tuple(logits.shape)}")
    expected = [(name, tensor, torch.float32) for name, tensor in floats.items()]
    expected += [("top_k", top_k, torch.int32), ("uniform", uniform, torch.float64)]
    for name, tensor, dtype in expected:
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            wanted = f"{dtype} ({logits.shape[0]},)"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")
