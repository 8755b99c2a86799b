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
    from .cpu.sample import sample as sample_cpu

    options = {"filtered": filtered, "greedy_below": GREEDY_BELOW}
    return sample_cpu(logits, temperature, top_k, top_p, min_p, uniform, **options)


def _check(logits: Tensor, floats: dict[str, Tensor], top_k: Tensor, uniform: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be float32 [N, V], got {logits.dtype} {tuple(logits.shape)}")
    expected = [(name, tensor, torch.float32) for name, tensor in floats.items()]
    expected += [("top_k", top_k, torch.int32), ("uniform", uniform, torch.float64)]
    for name, tensor, dtype in expected:
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            wanted = f"{dtype} ({logits.shape[0]},)"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")
