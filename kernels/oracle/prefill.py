"""Float64 oracles of `prefill_attention` and `prefill_blocks`: DESIGN.md section 4 word for word, one query at a time."""

import math

import torch

from ..views import BlockLists, LayerView, PrefillBatch

BLOCK = 128


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
    """See `kernels.prefill_attention.prefill_attention`; returns float64 [T, Hq, D]."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.empty_like(query)
    group, page = query.shape[1] // key.shape[1], layer.layout.page_size
    first, first_block = 0, 0
    for start, length, scratch in zip(batch.starts, batch.lengths, batch.scratch_offsets, strict=True):
        for i in range(length):
            position = start + i
            own_page = position // page * page
            seen = torch.arange(position + 1, device=query.device)
            for head in range(query.shape[1]):
                kv_head = head // group
                if layer.head_streaming[kv_head]:
                    keep = (seen < layer.sink_size) | (position - seen < layer.local_window)
                elif block_lists is not None:
                    row = first_block + i // BLOCK
                    listed = block_lists.blocks[row, head, : block_lists.counts[row, head]]
                    keep = torch.isin(seen // BLOCK, listed)
                else:
                    keep = torch.ones_like(seen, dtype=torch.bool)
                earlier, own = seen[keep & (seen < own_page)], seen[keep & (seen >= own_page)]
                keys = torch.cat((scratch_key[kv_head, scratch + earlier].double(), key[first + own - start, kv_head]))
                values = torch.cat((scratch_value[kv_head, scratch + earlier].double(), value[first + own - start, kv_head]))
                weights = (keys @ query[first + i, head] * layer.scale).softmax(0)
                out[first + i, head] = weights @ values
        first += length
        first_block += (length + BLOCK - 1) // BLOCK
    return out


def block_shares(
    query: torch.Tensor, scratch_key: torch.Tensor, layer: LayerView, batch: PrefillBatch, stride: int
) -> list[list[torch.Tensor]]:
    """Shares of the key blocks before each query block's diagonal: [query block][query head], float64 [diagonal].

    A group of `stride` queries scores a group of `stride` keys by the mean logit along their antidiagonal: query s meets key
    stride - 1 - s. A query group's softmax runs over all key groups before the diagonal block; a block's share is the sum of
    its weights over the block's query groups, queries past the chunk's end counting as zero vectors in a group that has others.
    """
    shares = []
    group, first = query.shape[1] // scratch_key.shape[0], 0
    for start, length, scratch in zip(batch.starts, batch.lengths, batch.scratch_offsets, strict=True):
        for block in range(0, length, BLOCK):
            diagonal = (start + block) // BLOCK
            row = []
            for head in range(query.shape[1]):
                share = torch.zeros(diagonal, dtype=torch.float64, device=query.device)
                keys = scratch_key[head // group, scratch : scratch + diagonal * BLOCK].double()
                for group_start in range(block, min(block + BLOCK, length), stride):
                    logits = torch.zeros(diagonal * BLOCK // stride, dtype=torch.float64, device=query.device)
                    for s in range(min(stride, length - group_start)):
                        logits += keys[stride - 1 - s :: stride] @ query[first + group_start + s, head].double()
                    share += (logits * (layer.scale / stride)).softmax(0).unflatten(0, (diagonal, BLOCK // stride)).sum(1)
                row.append(share)
            shares.append(row)
        first += length
    return shares


def kept_blocks(
    share: torch.Tensor, position: int, layer: LayerView, sparse_from: int, threshold: float | None, budget: float | None
) -> list[int]:
    """Ascending key blocks kept for the query block at `position`, whose blocks before the diagonal have these shares."""
    diagonal = position // BLOCK
    if position < sparse_from:
        return list(range(diagonal + 1))
    first_of_window = max(0, position - layer.local_window + 1) // BLOCK
    always = {b for b in range(diagonal) if b * BLOCK < layer.sink_size or b >= first_of_window}
    if threshold is not None:
        kept = {b for b in range(diagonal) if share[b] >= threshold * share.max()} | always
    else:
        assert budget is not None
        ranked = sorted(range(diagonal), key=lambda b: (b not in always, -float(share[b]), b))
        kept = set(ranked[: max(math.ceil(budget * (diagonal + 1)) - 1, len(always))])
    return [*sorted(kept), diagonal]
