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
    data = gather_slots(pool, page_ids, slots[:, None]).view(heads.numel(), page_ids.numel(), -1)
    pages = token_offsets // layout.page_size
    head_run, page_run = _run(heads), _run(pages)
    for scratch, decode in ((scratch_key, decode_keys), (scratch_value, decode_values)):
        paged = scratch.unflatten(1, (-1, layout.page_size))
        if head_run is not None and page_run is not None and scratch.dtype == torch.float32:
            decode(data, layout, paged[head_run, page_run])
        else:
            paged[heads[:, None], pages] = decode(data, layout).to(scratch.dtype)


def _run(indices: torch.Tensor) -> slice | None:
    """The slice that indices are when each follows the one before: what is decoded in its place is not copied."""
    run = slice(int(indices[0]), int(indices[0]) + indices.numel())
    return run if torch.equal(indices, torch.arange(run.start, run.stop)) else None
