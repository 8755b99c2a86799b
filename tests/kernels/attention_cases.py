"""Random caches and decode batches: poisoned pools, shuffled page ids, ragged lengths."""

from dataclasses import dataclass, replace

import torch

from lserve.kernels.cpu.codec import encode_slots
from lserve.kernels.slot_layout import SlotLayout, make_slot_layout
from lserve.kernels.views import DecodeBatch, LayerView, Selection

POISON = 0xFF
"""As fp16, bf16 or float32 a run of these bytes is NaN."""


@dataclass
class DecodeCase:
    """One layer's inputs of a decode step."""

    query: torch.Tensor
    layer: LayerView
    batch: DecodeBatch
    selection: Selection

    def to(self, device: str) -> "DecodeCase":
        """The same case on another device."""

        def moved(x):
            return replace(x, **{f: v.to(device) for f, v in _tensors(x).items()})

        return DecodeCase(self.query.to(device), moved(self.layer), moved(self.batch), moved(self.selection))


def _tensors(x) -> dict[str, torch.Tensor]:
    return {f: getattr(x, f) for f in x.__dataclass_fields__ if isinstance(getattr(x, f), torch.Tensor)}


def poisoned_pool(num_pages: int, num_slots: int, layout: SlotLayout, device: str = "cpu") -> torch.Tensor:
    """A pool whose bytes all read as NaN until written."""
    return torch.full((num_pages, max(num_slots, 1), layout.slot_bytes), POISON, dtype=torch.uint8, device=device)


def without_poison(case: DecodeCase) -> DecodeCase:
    """A copy whose unwritten places hold zeros, as an engine's fresh pools do (the CPU path multiplies them by a
    weight of 0).
    """
    pools = {}
    for name in ("retrieval_pool", "streaming_pool"):
        pool = getattr(case.layer, name).clone()
        pool[(pool == POISON).all(-1)] = 0
        pools[name] = pool
    tails = {name: getattr(case.layer, name).nan_to_num(0.0) for name in ("tail_key", "tail_value")}
    return replace(case, layer=replace(case.layer, **pools, **tails))


def make_layer(
    layout: SlotLayout,
    streaming: list[bool],
    num_pages: int,
    num_rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    sink_size: int = 128,
    local_window: int = 256,
) -> LayerView:
    """A middle layer of three: poisoned pools and tails, this layer's slots in the middle of each class's."""
    is_streaming = torch.tensor(streaming, device=device)
    heads = {c: (is_streaming == c).nonzero().flatten() for c in (False, True)}
    slots = torch.empty(len(streaming), dtype=torch.int32, device=device)
    for members in heads.values():
        slots[members] = torch.arange(1, members.numel() + 1, dtype=torch.int32, device=device)
    tail = torch.full((num_rows, 3, len(streaming), 2, layout.page_size, layout.head_dim), torch.nan, device=device)
    tail = tail.to(dtype)
    pools = [
        poisoned_pool(num_pages, members.numel() + 2 if members.numel() else 0, layout, device)
        for members in heads.values()
    ]
    return LayerView(
        layout=layout,
        retrieval_pool=pools[0],
        streaming_pool=pools[1],
        head_slots=slots,
        head_streaming=is_streaming,
        retrieval_heads=heads[False],
        streaming_heads=heads[True],
        first_retrieval_slot=1,
        first_streaming_slot=1,
        tail_key=tail[:, 1, :, 0],
        tail_value=tail[:, 1, :, 1],
        sink_size=sink_size,
        local_window=local_window,
        scale=layout.head_dim**-0.5,
    )


def random_keys(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Keys with channels of very different offset and spread, as real ones have; float32 [..., D]."""
    offset = torch.randn(shape[-1], device=device) * 2
    return torch.randn(*shape, device=device) * torch.rand(shape[-1], device=device).exp() + offset


def make_decode_case(
    *,
    kv_dtype: str = "int4",
    head_dim: int = 64,
    group_size: int = 2,
    streaming: tuple[bool, ...] = (False, True),
    positions: tuple[int, ...] = (100,),
    budgets: tuple[int, ...] | None = None,
    logical_page_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sink_size: int = 128,
    local_window: int = 256,
    selection_width: int | None = None,
) -> DecodeCase:
    """A batch at the given positions; every page that may be read is written, everything else stays poisoned.

    Selections of sequences that do not fit their budget are random page lists of budget - 1 pages, the always-kept
    ones among them.
    """
    layout = make_slot_layout(kv_dtype, head_dim, logical_page_size)
    page = layout.page_size
    num_batch = len(positions)
    budgets = budgets if budgets is not None else (2**30,) * num_batch
    max_pages = max((p // page + 1 for p in positions), default=1)
    num_rows = num_batch + 2
    sealed = [p // page for p in positions]
    ids = torch.randperm(sum(sealed) + 3)
    layer = make_layer(layout, list(streaming), len(ids), num_rows, dtype, device, sink_size, local_window)
    rows = torch.randperm(num_rows)[:num_batch]
    tables = {c: torch.full((num_batch, max_pages + 1), int(ids[-1]), dtype=torch.int32) for c in (False, True)}
    used = 0
    for b, count in enumerate(sealed):
        own = ids[used : used + count]
        used += count
        tables[False][b, :count] = own.int()
        first = max((positions[b] - local_window + 1) // page, 0)
        kept = [i for i in range(count) if i * page < sink_size or i >= first]
        tables[True][b, kept] = own[kept].int()
        for pool, heads, listed in (
            (layer.retrieval_pool, layer.retrieval_heads, list(range(count))),
            (layer.streaming_pool, layer.streaming_heads, kept),
        ):
            for at in range(0, len(listed) if heads.numel() else 0, 256):
                pages = own[listed[at : at + 256]]
                key = random_keys(len(pages), heads.numel(), page, head_dim).to(dtype)
                value = torch.randn(len(pages), heads.numel(), page, head_dim).to(dtype)
                pool[pages.to(device), 1 : 1 + heads.numel()] = encode_slots(key, value, layout).to(device)
        tail = positions[b] % page + 1
        layer.tail_key[rows[b], :, :tail] = random_keys(len(streaming), tail, head_dim).to(dtype).to(device)
        layer.tail_value[rows[b], :, :tail] = torch.randn(len(streaming), tail, head_dim).to(dtype).to(device)
    width = selection_width or max([b for b in budgets if b < 2**20], default=1)
    selection = Selection(
        torch.full((num_rows, len(streaming), width), -(2**20), dtype=torch.int32),
        torch.full((num_rows, len(streaming)), -1, dtype=torch.int32),
    )
    for b, count in enumerate(sealed):
        if count + 1 > budgets[b]:
            first = max((positions[b] - local_window + 1) // page, 0)
            always = [i for i in range(count) if i * page < sink_size or i >= first]
            others = torch.tensor([i for i in range(count) if i not in always])
            for head in range(len(streaming)):
                extra = others[torch.randperm(len(others))[: max(budgets[b] - 1 - len(always), 0)]].tolist()
                pages = torch.tensor(sorted(always + extra), dtype=torch.int32)
                selection.pages[rows[b], head, : len(pages)] = pages
                selection.counts[rows[b], head] = len(pages)
    batch = DecodeBatch(
        rows=rows.to(device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        retrieval_table=tables[False].to(device),
        streaming_table=tables[True].to(device),
        budget_pages=torch.tensor(budgets, dtype=torch.int32, device=device),
        reselect=torch.ones(num_batch, dtype=torch.bool, device=device),
        max_pages=max_pages,
    )
    query = torch.randn(num_batch, len(streaming) * group_size, head_dim, device=device).to(dtype)
    selection = Selection(selection.pages.to(device), selection.counts.to(device))
    return DecodeCase(query, layer, batch, selection)
