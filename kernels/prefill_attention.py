"""`prefill_attention`: chunked causal attention over per-head block lists."""

import torch

from .cpu import prefill_attention as cpu
from .views import BlockLists, LayerView, PrefillBatch


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    layer: LayerView,
    batch: PrefillBatch,
    block_lists: BlockLists | None = None,
) -> torch.Tensor:
    """Attention of a ragged batch of chunks; returns [T, Hq, D] in the query's dtype, V still rotated.

    query: [T, Hq, D] after RoPE, unscaled. key, value: [T, Hkv, D], the chunk's tokens as written.
    scratch_key, scratch_value: [Hkv, tokens, D], the requests' whole pages up to the chunk's end as they decode
    (`read_pages`), position i of request b at batch.scratch_offsets[b] + i; what no head may read is undefined.

    A query sees its own page (position // P) as written, every earlier page as it decodes. A streaming head at
    position t reads token i when i <= t and (i < sink_size or t - i < local_window), exactly; a retrieval head all i
    <= t, or, where block_lists is given, the listed 128-token key blocks. Accumulation is float32.
    """
    if query.is_cuda:
        from .gpu import prefill_attention as gpu

        return gpu.prefill_attention(query, key, value, scratch_key, scratch_value, layer, batch, block_lists)
    return cpu.prefill_attention(query, key, value, scratch_key, scratch_value, layer, batch, block_lists)
