"""CPU path of `kv_write`."""

import torch

from ..slot_layout import SlotLayout
from .codec import encode_slots


def append_tail(
    key: torch.Tensor,
    value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See `kernels.kv_write.append_tail`."""
    offsets = positions % tail_key.shape[2]
    tail_key[rows, :, offsets] = key
    tail_value[rows, :, offsets] = value


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor,
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    slots: torch.Tensor,
    layout: SlotLayout,
    valid: torch.Tensor | None = None,
) -> None:
    """See `kernels.kv_write.write_pages`."""
    if valid is not None:
        key, value, page_ids = key[valid], value[valid], page_ids[valid]
    if not page_ids.numel() or not heads.numel():
        return
    encoded = encode_slots(key[:, :, heads].transpose(1, 2), value[:, :, heads].transpose(1, 2), layout)
    index = (page_ids[:, None] * pool.shape[1] + slots).flatten()
    pool.view(-1, layout.slot_bytes).index_copy_(0, index, encoded.flatten(0, 1))
