"""`decode_attention`: one query token per sequence over per-head page lists of quantized pages."""

import torch

from .cpu import decode_attention as cpu
from .views import DecodeBatch, LayerView, Selection


def decode_attention(query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection) -> torch.Tensor:
    """Attention of B new tokens, both head classes at once; returns [B, Hq, D] in the query's dtype, V still rotated.

    query: [B, Hq, D] after RoPE, unscaled. The new token must already be in the tail (`append_tail`).
    A retrieval head reads its own page from the tail and, of the sealed pages, all (they fit the budget) or its
    selection. A streaming head at position t reads token i when i <= t and (i < sink_size or t - i < local_window),
    exactly. Sealed pages are read as they decode, the own page as written; accumulation is float32.
    """
    if query.is_cuda:
        from .gpu import decode_attention as gpu

        return gpu.decode_attention(query, layer, batch, selection)
    return cpu.decode_attention(query, layer, batch, selection)
