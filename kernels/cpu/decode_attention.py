"""CPU path of `decode_attention`: gathers the listed pages, then two batched matrix products, a few sequences at a time
where they are long. Pages that all sequences begin with (questions about one document) are decoded once for all.
"""

import torch

from ..views import DecodeBatch, LayerView, Selection
from .codec import decode_keys, decode_values, gather_slots, split_batch

MIN_SHARED = 16
"""Pages that sequences must have in common to be decoded apart: fewer do not repay the second pass."""


def tail_logits(query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Scores of the own page: query [B, H, G, D] (scaled), keys [B, H, P, D] to [B, H, G, P], -inf past the new
    token.
    """
    later = torch.arange(keys.shape[2]) > (positions % keys.shape[2])[:, None]
    return (query @ keys.transpose(2, 3)).masked_fill_(later[:, None, None], -torch.inf)


def num_shared(page_ids: torch.Tensor, listed: torch.Tensor) -> int:
    """How many leading pages of page_ids [B, H, J] are listed, bool [B, H, J], and the same for all of several
    sequences; 0 for fewer than MIN_SHARED.
    """
    if page_ids.shape[0] == 1 or page_ids.shape[2] < MIN_SHARED:
        return 0
    same = ((page_ids == page_ids[:1]) & listed).flatten(0, 1).all(0)
    count = int(same.long().cumprod(0).sum())
    return count if count >= MIN_SHARED else 0


def shared_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [B, H, G, K] times y [H, K, N], which all sequences share: one product a head."""
    folded = x.transpose(0, 1).flatten(1, 2) @ y
    return folded.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def _attend(
    layer: LayerView,
    pool: torch.Tensor,
    slots: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor] | None,
    query: torch.Tensor,
    page_ids: torch.Tensor,
    readable: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """query [B, H, G, D] (scaled) over the heads' slots [H] of pages [B, H or 1, J], of whose tokens readable, bool
    [B, H or 1, J*P], says which count; over the tail; and over shared keys and values [H, S, D], if there are any.
    """
    num_batch, num_heads, _, head_dim = query.shape
    own = tail_logits(query, tail_key, positions)
    listed = readable.shape[2]
    data = gather_slots(pool, page_ids, slots[:, None])
    keys = decode_keys(data, layer.layout).reshape(num_batch, num_heads, listed, head_dim)
    logits = (query @ keys.transpose(2, 3)).masked_fill_(~readable[:, :, None], -torch.inf)
    parts = (logits, own) if shared is None else (logits, own, shared_product(query, shared[0].transpose(1, 2)))
    weights = torch.cat(parts, dim=-1).softmax(-1)
    end = listed + own.shape[3]
    values = decode_values(data, layer.layout).reshape(num_batch, num_heads, listed, head_dim)
    values[positions < layer.layout.page_size] = 0  # nothing is sealed: whatever the page held, 0 * NaN is NaN
    out = torch.matmul(weights[..., :listed], values).add_(weights[..., listed:end] @ tail_value)
    return out if shared is None else out.add_(shared_product(weights[..., end:], shared[1]))


def _decode_shared(
    layer: LayerView, pool: torch.Tensor, slots: torch.Tensor, page_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, S, D] of the heads' slots [H] of pages [H or 1, J]."""
    shape = slots.numel(), -1, layer.layout.head_dim
    data = gather_slots(pool, page_ids, slots[:, None])
    return decode_keys(data, layer.layout).view(shape), decode_values(data, layer.layout).view(shape)


def _retrieval_pages(layer: LayerView, batch: DecodeBatch, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """Page indices [B, R, J] and whether each is to be read: everything sealed where it fits, else the selection."""
    sealed = batch.positions // layer.layout.page_size
    dense = sealed + 1 <= batch.budget_pages
    counts = selection.counts[batch.rows][:, layer.retrieval_heads]
    counts = torch.where(dense[:, None], sealed[:, None], counts)
    width = int(counts.max()) if counts.numel() else 0
    order = torch.arange(width)
    stored = selection.pages[batch.rows][:, layer.retrieval_heads, : min(width, selection.pages.shape[2])].long()
    stored = torch.nn.functional.pad(stored, (0, width - stored.shape[2]))
    readable = order < counts[..., None]
    return torch.where(dense[:, None, None], order, stored).masked_fill_(~readable, 0), readable


def _streaming_pages(layer: LayerView, batch: DecodeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Page indices [B, J] of sink and window, and which of their tokens are readable, bool [B, J, P]."""
    page = layer.layout.page_size
    sealed = batch.positions // page
    num_sink = layer.sink_size // page
    sink = torch.arange(num_sink).expand(sealed.shape[0], -1)
    window = sealed[:, None] - torch.arange(layer.local_window // page, 0, -1)
    index = torch.cat((sink, window), dim=1)
    is_window = torch.arange(index.shape[1]) >= num_sink
    listed = (index < sealed[:, None]) & (index >= torch.where(is_window, num_sink, 0))
    tokens = index[..., None] * page + torch.arange(page)
    in_reach = (tokens < layer.sink_size) | (batch.positions[:, None, None] - tokens < layer.local_window)
    return index.clamp_min(0).masked_fill(~listed, 0), listed[..., None] & in_reach


def decode_attention(query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection) -> torch.Tensor:
    """See `kernels.decode_attention.decode_attention`."""
    num_batch, num_query_heads, head_dim = query.shape
    num_kv_heads = layer.head_slots.numel()
    if not num_batch:
        return torch.empty_like(query)
    grouped = (query.float() * layer.scale).view(num_batch, num_kv_heads, -1, head_dim)
    out = torch.empty_like(grouped)
    page = layer.layout.page_size
    later = torch.arange(page) > (batch.positions % page)[:, None]
    tail_keys = layer.tail_key[batch.rows].float()
    tail_values = layer.tail_value[batch.rows].float().masked_fill_(later[:, None, :, None], 0)
    for heads, is_streaming in ((layer.retrieval_heads, False), (layer.streaming_heads, True)):
        if not heads.numel():
            continue
        slots = layer.head_slots[heads].long()
        if is_streaming:
            index, readable = _streaming_pages(layer, batch)
            page_ids = batch.streaming_table.gather(1, index).long()[:, None]
            listed, readable = readable.all(2)[:, None], readable.flatten(1)[:, None]
            pool = layer.streaming_pool
        else:
            index, listed = _retrieval_pages(layer, batch, selection)
            page_ids = batch.retrieval_table.gather(1, index.flatten(1)).long().view_as(index)
            readable = listed[..., None].expand(*listed.shape, page).flatten(2)
            pool = layer.retrieval_pool
        whole = heads.numel() == num_kv_heads
        tail_key, tail_value = (x if whole else x[:, heads] for x in (tail_keys, tail_values))
        scaled = grouped if whole else grouped[:, heads]
        before, shared = num_shared(page_ids, listed), None
        if before:
            shared = _decode_shared(layer, pool, slots, page_ids[0, :, :before])
            page_ids, readable = page_ids[:, :, before:], readable[:, :, before * page :]
        inputs = scaled, page_ids, readable, tail_key, tail_value, batch.positions
        parts = split_batch(heads.numel() * readable.shape[2] * head_dim, *inputs)
        out[:, heads] = torch.cat([_attend(layer, pool, slots, shared, *part) for part in parts])
    return out.reshape(query.shape).to(query.dtype)
