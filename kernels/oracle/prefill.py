"""Float64 oracles of `prefill_attention` and `prefill_blocks`: DESIGN.md section 4 word for word."""

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
        chunk = slice(first, first + length)
        token = torch.arange(start + length, device=query.device)
        position = token[start:, None]
        own_page = token // page == position // page
        for head in range(query.shape[1]):
            kv_head = head // group
            seen = token <= position
            if layer.head_streaming[kv_head]:
                seen = seen & ((token < layer.sink_size) | (position - token < layer.local_window))
            elif block_lists is not None:
                rows = slice(first_block, first_block + (length + BLOCK - 1) // BLOCK)
                lists = zip(block_lists.blocks[rows, head], block_lists.counts[rows, head], strict=True)
                kept = torch.stack([torch.isin(token // BLOCK, blocks[:count]) for blocks, count in lists])
                seen = seen & kept.repeat_interleave(BLOCK, dim=0)[:length]
            written, decoded = seen & own_page, seen & ~own_page
            history = slice(scratch, scratch + start + length)
            keys = torch.where(decoded.any(0)[:, None], scratch_key[kv_head, history].double(), 0)
            values = torch.where(decoded.any(0)[:, None], scratch_value[kv_head, history].double(), 0)
            logits = torch.full(seen.shape, -torch.inf, dtype=torch.float64, device=query.device)
            logits = torch.where(decoded, query[chunk, head] @ keys.T, logits)
            logits[:, start:] = torch.where(
                written[:, start:], query[chunk, head] @ key[chunk, kv_head].T, logits[:, start:]
            )
            weights = (logits * layer.scale).softmax(-1)
            from_own_page = torch.where(written, weights, 0)[:, start:] @ value[chunk, kv_head]
            out[chunk, head] = torch.where(decoded, weights, 0) @ values + from_own_page
        first += length
        first_block += (length + BLOCK - 1) // BLOCK
    return out


def block_shares(
    query: torch.Tensor, scratch_key: torch.Tensor, layer: LayerView, batch: PrefillBatch, stride: int
) -> list[list[torch.Tensor]]:
    """Shares of the key blocks before each query block's diagonal: [query block][query head], float64 [diagonal].

    A group of `stride` queries scores a group of `stride` keys by the mean logit along their antidiagonal: query s
    meets key stride - 1 - s. A query group's softmax runs over all key groups before the diagonal block; a block's
    share is the sum of its weights over the block's query groups. Queries missing in the last group count as zeros.
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
                    weights = (logits * (layer.scale / stride)).softmax(0)
                    share += weights.unflatten(0, (diagonal, BLOCK // stride)).sum(1)
                row.append(share)
            shares.append(row)
        first += length
    return shares


def kept_blocks(
    share: torch.Tensor,
    position: int,
    layer: LayerView,
    sparse_from: int,
    threshold: float | None,
    budget: float | None,
) -> list[int]:
    """Ascending key blocks kept for the query block at `position`; share: [diagonal], of the blocks before it."""
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
