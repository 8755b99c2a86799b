"""CPU path of `kv_read`."""

import torch

from ..slot_layout import SlotLayout
from .codec import decode_keys, decode_values, gather_slots


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
    """See `kernels.kv_read.read_pages`."""
    if not page_ids.numel() or not heads.numel():
        return
    data = gather_slots(pool, page_ids, slots[:, None])
    pages = token_offsets // layout.page_size
    shape = (heads.numel(), page_ids.numel(), layout.page_size, layout.head_dim)
    for scratch, decode in ((scratch_key, decode_keys), (scratch_value, decode_values)):
        decoded = decode(data, layout).reshape(shape).to(scratch.dtype)
        paged = scratch.unflatten(1, (-1, layout.page_size))
        paged[heads[:, None], pages] = decoded
