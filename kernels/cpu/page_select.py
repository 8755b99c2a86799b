"""CPU path of `page_select`."""

import torch

from ..slot_layout import SlotLayout
from ..views import DecodeBatch, LayerView, Selection
from .codec import decode_keys, gather_slots, key_range, split_batch
from .decode_attention import num_shared, shared_product, tail_logits


def page_bounds(query: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """First stage: query [B, H, G, D] (scaled), centre and radius [B, H, pages, groups, D] to scores [B, H, pages]."""
    centre_t, radius_t = (x.flatten(2, 3).transpose(2, 3) for x in (centre, radius))
    bound = (query @ centre_t).add_(query.abs() @ radius_t).amax(2)
    return bound.unflatten(2, centre.shape[2:4]).amax(3)


def _statistics(
    pool: torch.Tensor, page_ids: torch.Tensor, first_slot: int, heads: int, layout: SlotLayout
) -> torch.Tensor:
    """Bytes of the key statistics, uint8 [B * heads * pages, value_codes - key_min], of page_ids [B, pages]."""
    words = pool.view(torch.int64)[:, first_slot : first_slot + heads, layout.key_min // 8 : layout.value_codes // 8]
    gathered = words[page_ids].transpose(1, 2)
    return gathered.reshape(-1, gathered.shape[-1]).view(torch.uint8)


def _top(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mask of the counts [B] largest scores of each row of [B, H, N]; ties go to the lower index; -inf is never
    taken.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(scores.shape[-1]) < counts[:, None, None]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, order, taken.expand_as(order))
    return mask & (scores > -torch.inf)


def _compact(mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending indices of the set entries of [B, H, N], padded to width with 0, and which are real."""
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    real = torch.arange(order.shape[-1]) < mask.sum(-1, keepdim=True)
    return order.masked_fill(~real, 0), real


def _masses(layer: LayerView, query: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the scores in each page of the retrieval heads: query [B, H, G, D] (scaled), page_ids [B, H, J],
    or [1, H, J] of pages that all sequences share, to [B, H, G, J].
    """
    slots = gather_slots(layer.retrieval_pool, page_ids, layer.head_slots[layer.retrieval_heads].long()[:, None])
    keys = decode_keys(slots, layer.layout).reshape(*page_ids.shape[:2], -1, layer.layout.head_dim).transpose(2, 3)
    scores = shared_product(query, keys[0]) if len(keys) == 1 else query @ keys
    return scores.unflatten(3, (-1, layer.layout.page_size)).logsumexp(-1)


def page_select(
    query: torch.Tensor,
    layer: LayerView,
    batch: DecodeBatch,
    selection: Selection,
    candidate_factor: int,
    two_stage: bool,
) -> None:
    """See `kernels.page_select.page_select`."""
    layout, heads = layer.layout, layer.retrieval_heads
    page = layout.page_size
    sealed = batch.positions // page
    chosen_rows = (batch.reselect & (sealed + 1 > batch.budget_pages)).nonzero().squeeze(1)
    if not chosen_rows.numel() or not heads.numel():
        return
    query, positions, rows = query[chosen_rows], batch.positions[chosen_rows], batch.rows[chosen_rows]
    sealed, budget = sealed[chosen_rows], batch.budget_pages[chosen_rows].long()
    num_batch, num_heads = rows.numel(), heads.numel()
    width = int(sealed.max())
    index = torch.arange(width)
    grouped = (query.float() * layer.scale).unflatten(1, (layer.head_slots.numel(), -1))
    tail_key = layer.tail_key[rows].float()
    if num_heads != layer.head_slots.numel():
        grouped, tail_key = grouped[:, heads], tail_key[:, heads]

    exists = index < sealed[:, None]
    first_window = (positions - layer.local_window + 1).clamp_min(0) // page
    always = exists & ((index < layer.sink_size // page) | (index >= first_window[:, None]))
    table = batch.retrieval_table[chosen_rows, :width].long().masked_fill_(~exists, 0)

    data = _statistics(layer.retrieval_pool, table, layer.first_retrieval_slot, num_heads, layout)
    centre, radius = (x.view(num_batch, num_heads, width, layout.num_groups, -1) for x in key_range(data, layout))
    scores = page_bounds(grouped, centre, radius).masked_fill_((always | ~exists)[:, None], -torch.inf)
    free = budget - 1 - always.sum(1)
    if two_stage:
        candidates = _top(scores, candidate_factor * budget) | always[:, None]
        listed, real = _compact(candidates, int(candidates.sum(-1).max()))
        page_ids = table.gather(1, listed.flatten(1)).view_as(listed)
        before = num_shared(page_ids, real)
        own_ids = page_ids[:, :, before:]
        parts = split_batch(num_heads * own_ids.shape[2] * page * layout.head_dim, grouped, own_ids)
        mass = torch.cat([_masses(layer, *part) for part in parts])
        if before:
            mass = torch.cat((_masses(layer, grouped, page_ids[:1, :, :before]), mass), dim=-1)
        mass = mass.masked_fill_(~real[:, :, None], -torch.inf)
        own = tail_logits(grouped, tail_key, positions).logsumexp(-1, keepdim=True)
        share = torch.cat((mass, own), dim=-1).softmax(-1)[..., :-1].mean(2)
        fixed = always[:, None].expand(-1, num_heads, -1).gather(2, listed) | ~real
        share = share.masked_fill_(fixed, -torch.inf)
        picked = torch.zeros_like(candidates).scatter_(2, listed, _top(share, free)) & ~always[:, None]
    else:
        picked = _top(scores, free)
    picked |= always[:, None]
    counts = picked.sum(-1)
    pages, _ = _compact(picked, min(width, selection.pages.shape[2]))
    target = (rows[:, None], heads[None])
    selection.counts[target] = counts.int()
    stored = torch.zeros(num_batch, num_heads, selection.pages.shape[2], dtype=torch.int32)
    stored[..., : pages.shape[2]] = pages
    selection.pages[target] = stored
