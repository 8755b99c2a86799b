"""`kv_read`: pages back into the compute dtype."""

import torch

from .cpu import kv_read as cpu
from .slot_layout import SlotLayout


def read_pages(
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    slots: torch.Tensor,
    layout: SlotLayout,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    heads: torch.Tensor,
    token_offsets: torch.Tensor,
) -> None:
    """Dequantizes N pages of H slots into the scratch that prefill reads.

    pool: uint8 [pages, slots, slot_bytes]. page_ids: int64 [N]. slots, heads: int64 [H].
    scratch_key, scratch_value: compute dtype [Hkv, tokens, D]; page n of slots[h] goes to
    scratch[heads[h], token_offsets[n] : token_offsets[n] + P]. token_offsets: int64 [N], multiples of P.
    Decoded key = min + step * code and value likewise, computed in float32, rounded once to the scratch's dtype.
    """
    if pool.is_cuda:
        from .gpu import kv_read as gpu

        gpu.read_pages(pool, page_ids, slots, layout, scratch_key, scratch_value, heads, token_offsets)
    else:
        cpu.read_pages(pool, page_ids, slots, layout, scratch_key, scratch_value, heads, token_offsets)
