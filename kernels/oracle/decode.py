"""Decode attention and page selection in float64, sequence by sequence and head by head (DESIGN.md section 4)."""

from dataclasses import dataclass

import torch

from ..views import DecodeBatch, LayerView, Selection
from .kv import decode_slot, key_range


@dataclass(frozen=True)
class PageChoice:
    """One KV head's choice for one sequence, and the scores behind it.

    pages: the choice, ascending. bounds: first-stage score per page index, always-kept pages left out.
    shares: second-stage score per candidate, always-kept pages left out; empty with one stage.
    candidates, always: page indices, ascending.
    """

    pages: list[int]
    bounds: dict[int, float]
    shares: dict[int, float]
    candidates: list[int]
    always: list[int]


def _slot(layer: LayerView, batch: DecodeBatch, sequence: int, head: int, page: int) -> torch.Tensor:
    streaming = bool(layer.head_streaming[head])
    table = batch.streaming_table if streaming else batch.retrieval_table
    pool = layer.streaming_pool if streaming else layer.retrieval_pool
    return pool[int(table[sequence, page]), int(layer.head_slots[head])]


def _queries(query: torch.Tensor, layer: LayerView, sequence: int, head: int) -> torch.Tensor:
    """The scaled queries of a KV head's group, float64 [group_size, D]."""
    group_size = query.shape[1] // layer.head_slots.numel()
    return query[sequence, head * group_size : (head + 1) * group_size].double() * layer.scale


def _tail(layer: LayerView, batch: DecodeBatch, sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The own page's tokens so far, float64 [tokens, D] each."""
    row = int(batch.rows[sequence])
    count = int(batch.positions[sequence]) % layer.layout.page_size + 1
    return layer.tail_key[row, head, :count].double(), layer.tail_value[row, head, :count].double()


def _always_kept(layer: LayerView, position: int) -> list[int]:
    """Sealed pages of the sink and those that overlap the last local_window positions."""
    page_size = layer.layout.page_size
    return [
        page
        for page in range(position // page_size)
        if page * page_size < layer.sink_size or (page + 1) * page_size > position - layer.local_window + 1
    ]


def _largest(scores: dict[int, float], count: int) -> list[int]:
    """Keys of the largest scores; ties go to the lower key."""
    return sorted(sorted(scores, key=lambda page: (-scores[page], page))[: max(count, 0)])


def choose_pages(
    query: torch.Tensor,
    layer: LayerView,
    batch: DecodeBatch,
    sequence: int,
    head: int,
    candidate_factor: int = 4,
    two_stage: bool = True,
) -> PageChoice:
    """The page choice of one retrieval head of one sequence whose pages do not fit its budget."""
    position = int(batch.positions[sequence])
    budget = int(batch.budget_pages[sequence])
    queries = _queries(query, layer, sequence, head)
    sealed = position // layer.layout.page_size
    always = _always_kept(layer, position)
    bounds = {}
    for page in range(sealed):
        if page not in always:
            centre, radius = key_range(_slot(layer, batch, sequence, head, page), layer.layout)
            bounds[page] = float((queries @ centre.T + queries.abs() @ radius.T).max())
    free = budget - 1 - len(always)
    if not two_stage:
        return PageChoice(sorted(always + _largest(bounds, free)), bounds, {}, sorted(bounds), always)
    candidates = _largest(bounds, candidate_factor * budget)
    listed = sorted(always + candidates)
    masses = [
        (queries @ decode_slot(_slot(layer, batch, sequence, head, page), layer.layout)[0].T).logsumexp(-1)
        for page in listed
    ]
    own = (queries @ _tail(layer, batch, sequence, head)[0].T).logsumexp(-1)
    share = torch.stack([*masses, own], dim=-1).softmax(-1).mean(0)
    shares = {page: float(share[i]) for i, page in enumerate(listed) if page not in always}
    return PageChoice(sorted(always + _largest(shares, free)), bounds, shares, candidates, always)


def decode_attention(query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection) -> torch.Tensor:
    """Attention of B new tokens, float64 [B, Hq, D]; see `kernels.decode_attention.decode_attention`."""
    out = torch.empty(query.shape, dtype=torch.float64)
    heads = layer.head_slots.numel()
    group_size = query.shape[1] // heads
    page_size = layer.layout.page_size
    for sequence in range(query.shape[0]):
        position = int(batch.positions[sequence])
        sealed = position // page_size
        for head in range(heads):
            if layer.head_streaming[head]:
                pages = _always_kept(layer, position)
            elif sealed + 1 <= int(batch.budget_pages[sequence]):
                pages = list(range(sealed))
            else:
                row = int(batch.rows[sequence])
                pages = selection.pages[row, head, : int(selection.counts[row, head])].tolist()
            keys, values = _tail(layer, batch, sequence, head)
            tokens = [sealed * page_size + torch.arange(len(keys))]
            parts = [(keys, values)]
            for page in pages:
                parts.append(decode_slot(_slot(layer, batch, sequence, head, page), layer.layout))
                tokens.append(page * page_size + torch.arange(page_size))
            keys, values = (torch.cat(x) for x in zip(*parts, strict=True))
            token = torch.cat(tokens)
            logits = _queries(query, layer, sequence, head) @ keys.T
            if layer.head_streaming[head]:
                reach = (token < layer.sink_size) | (position - token < layer.local_window)
                logits = logits.masked_fill(~reach, -torch.inf)
            out[sequence, head * group_size : (head + 1) * group_size] = logits.softmax(-1) @ values
    return out
