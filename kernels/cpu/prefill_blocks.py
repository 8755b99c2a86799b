"""CPU path of `prefill_blocks`."""

import math

import torch

from ..views import BlockLists, LayerView, PrefillBatch

BLOCK = 128
STRIDE = 16
"""Tokens of a query or key group. Groups meet along antidiagonals, so scoring costs 1 / (2 * STRIDE) of attention."""


def kept_quota(position: int, layer: LayerView, budget: float) -> int:
    """Blocks before the diagonal that a query block at `position` keeps under a budget: sink and window at least."""
    diagonal = position // BLOCK
    window = diagonal - max(0, position - layer.local_window + 1) // BLOCK
    sink = min((layer.sink_size + BLOCK - 1) // BLOCK, diagonal)
    return min(max(math.ceil(budget * (diagonal + 1)) - 1, min(sink + window, diagonal)), diagonal)


def prefill_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    scratch_key: torch.Tensor,
    layer: LayerView,
    batch: PrefillBatch,
    sparse_from: int,
    threshold: float | None,
    budget: float | None,
) -> BlockLists:
    """See `kernels.prefill_blocks.prefill_blocks`. The diagonal always stays, so only blocks before it are scored."""
    num_blocks = [(length + BLOCK - 1) // BLOCK for length in batch.lengths]
    width = max((start // BLOCK + blocks for start, blocks in zip(batch.starts, num_blocks, strict=True)), default=0)
    kept = torch.zeros(sum(num_blocks), query.shape[1], width, dtype=torch.bool)
    first, first_block = 0, 0
    for start, length, scratch, blocks in zip(
        batch.starts, batch.lengths, batch.scratch_offsets, num_blocks, strict=True
    ):
        rows = kept[first_block : first_block + blocks]
        keys = scratch_key[:, scratch : scratch + (start // BLOCK + blocks - 1) * BLOCK]
        _keep(query[first : first + length], keys, start, rows, layer, sparse_from, threshold, budget)
        first += length
        first_block += blocks
    order = torch.arange(width).expand(kept.shape).masked_fill(~kept, width).sort(-1).values
    return BlockLists(order.int(), kept.sum(-1, dtype=torch.int32))


def _keep(
    query: torch.Tensor,
    keys: torch.Tensor,
    start: int,
    kept: torch.Tensor,
    layer: LayerView,
    sparse_from: int,
    threshold: float | None,
    budget: float | None,
) -> None:
    """One request: sets kept[query block, query head, key block] for retrieval heads; keys [Hkv, whole blocks, D]."""
    diagonal = start // BLOCK + torch.arange(kept.shape[0])
    block = torch.arange(kept.shape[2])
    position = diagonal * BLOCK
    group = query.shape[1] // keys.shape[0]
    heads = (layer.retrieval_heads[:, None] * group + torch.arange(group)).flatten()
    before = block < diagonal[:, None]
    window = (position - layer.local_window + 1)[:, None]
    always = before & ((block * BLOCK < layer.sink_size) | ((block + 1) * BLOCK > window))
    choice = before[:, None].expand(-1, heads.numel(), -1)
    if position[-1] >= sparse_from and heads.numel():
        share = torch.zeros(choice.shape)
        share[..., : keys.shape[1] // BLOCK] = _shares(query[:, heads], keys[heads // group], diagonal, layer.scale)
        if threshold is not None:
            choice = share >= threshold * share.amax(-1, keepdim=True)
        else:
            assert budget is not None
            quota = torch.tensor([kept_quota(int(p), layer, budget) for p in position])[:, None, None]
            share.masked_fill_(always[:, None], torch.inf).masked_fill_(~before[:, None], -1)
            ranked = share.sort(dim=-1, descending=True, stable=True).indices
            choice = torch.zeros_like(choice).scatter_(-1, ranked, (block < quota).expand(share.shape))
        choice = choice & before[:, None] | (always | (position < sparse_from)[:, None] & before)[:, None]
    kept[:, heads] = choice | (block == diagonal[:, None])[:, None]


def _shares(query: torch.Tensor, keys: torch.Tensor, diagonal: torch.Tensor, scale: float) -> torch.Tensor:
    """query [M, H, D], keys [H, N, D] to shares of the blocks before each diagonal, [query blocks, H, N / BLOCK]."""
    num_blocks, per_block = diagonal.numel(), BLOCK // STRIDE
    padded = torch.zeros(num_blocks * BLOCK, *query.shape[1:])
    padded[: query.shape[0]] = query
    rows = padded.unflatten(0, (-1, STRIDE)).permute(2, 0, 1, 3).flatten(2)
    columns = keys.float().unflatten(1, (-1, STRIDE)).flip(2).flatten(2)
    logits = (rows @ columns.transpose(1, 2) * (scale / STRIDE)).unflatten(2, (-1, per_block))
    there = torch.arange(rows.shape[1]) * STRIDE < query.shape[0]
    block = torch.arange(logits.shape[2])
    visible = block < diagonal.repeat_interleave(per_block)[:, None]
    logits.masked_fill_(~visible[..., None], -torch.inf)
    weights = logits.flatten(2).softmax(-1).unflatten(2, (-1, per_block)).sum(-1)
    weights.masked_fill_(~(visible & there[:, None]), 0)
    return weights.unflatten(1, (num_blocks, per_block)).sum(2).transpose(0, 1)
