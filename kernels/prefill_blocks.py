"""`prefill_blocks`: which key blocks a query block reads in dynamic prefill."""

import torch

from .views import BlockLists, LayerView, PrefillBatch


def prefill_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    scratch_key: torch.Tensor,
    layer: LayerView,
    batch: PrefillBatch,
    sparse_from: int,
    threshold: float | None = None,
    budget: float | None = None,
) -> BlockLists:
    """Scores 128 x 128 blocks by antidiagonal sums (XAttention, arXiv 2503.16428) and keeps the best of each row.

    query: [T, Hq, D], key: [T, Hkv, D], scratch_key: [Hkv, tokens, D] as in `prefill_attention`. Query blocks that
    start before sparse_from keep everything. Otherwise a block stays when its share is at least threshold times its
    row's largest (FlashPrefill, 2603.06199), or when it is among the ceil(budget * blocks) best; sink, diagonal and
    window blocks always stay. Exactly one of threshold and budget is given, else ValueError.
    """
    if (threshold is None) == (budget is None):
        raise ValueError(f"give either threshold or budget, got {threshold} and {budget}")
    if query.is_cuda:
        from .gpu import prefill_blocks as gpu

        return gpu.prefill_blocks(query, key, scratch_key, layer, batch, sparse_from, threshold, budget)
    from .cpu import prefill_blocks as cpu

    return cpu.prefill_blocks(query, key, scratch_key, layer, batch, sparse_from, threshold, budget)
