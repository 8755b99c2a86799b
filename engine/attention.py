"""Write, select, attend: the only file that calls kernels for attention.

Each step object is the model's `attend` callback for one batch: it writes the new keys and values of a layer, reads
back or selects what the queries may see, and attends.
"""

from collections.abc import Callable

import torch

from lserve.kernels.decode_attention import decode_attention
from lserve.kernels.kv_read import read_pages
from lserve.kernels.kv_write import append_tail, write_pages
from lserve.kernels.page_select import page_select
from lserve.kernels.prefill_attention import prefill_attention
from lserve.kernels.prefill_blocks import prefill_blocks
from lserve.kernels.upload import upload
from lserve.kernels.views import BlockLists, DecodeBatch, LayerView, PrefillBatch

from .config import PAGE_SIZE, SparsityConfig
from .kv_cache import KVCache
from .sequence import PrefillChunk, Sequence

UNLIMITED_PAGES = 2**30


class PrefillStep:
    """Attention of one prefill batch.

    Every chunk starts on a page boundary; its whole pages are written to the pools, the rest to the tail row.
    """

    def __init__(self, cache: KVCache, sparsity: SparsityConfig, chunks: list[PrefillChunk]) -> None:
        self._cache, self._sparsity, self._chunks = cache, sparsity, chunks
        device = cache.device
        self._batch = PrefillBatch.create([c.start for c in chunks], [c.length for c in chunks], device)
        heads, head_dim = cache.tail.shape[2], cache.tail.shape[5]
        self._scratch = torch.empty(2, heads, self._batch.scratch_tokens, head_dim, dtype=cache.dtype, device=device)
        self._written: list[tuple[slice, dict[str, torch.Tensor]]] = []
        read: dict[str, tuple[list[int], list[int]]] = {"retrieval": ([], []), "streaming": ([], [])}
        first = 0
        for chunk, offset in zip(chunks, self._batch.scratch_offsets, strict=True):
            sequence = chunk.sequence
            whole = range(chunk.start // PAGE_SIZE, chunk.end // PAGE_SIZE)
            ids: dict[str, torch.Tensor] = {}
            if cache.page_format.num_retrieval_slots:
                ids["retrieval"] = upload([sequence.retrieval_pages[i] for i in whole], torch.int64, device)
                read["retrieval"][0].extend(sequence.retrieval_pages[: whole.stop])
                read["retrieval"][1].extend(offset + i * PAGE_SIZE for i in range(whole.stop))
            if cache.page_format.num_streaming_slots:
                ids["streaming"] = upload([sequence.streaming_pages[i] for i in whole], torch.int64, device)
                held = [i for i in sorted(sequence.streaming_pages) if i < whole.stop]
                read["streaming"][0].extend(sequence.streaming_pages[i] for i in held)
                read["streaming"][1].extend(offset + i * PAGE_SIZE for i in held)
            self._written.append((slice(first, first + len(whole) * PAGE_SIZE), ids))
            first += chunk.length
        self._read = {
            name: (upload(ids, torch.int64, device), upload(at, torch.int64, device))
            for name, (ids, at) in read.items()
        }

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One layer: query [T, Hq, D], key and value [T, Hkv, D]; returns [T, Hq, D]."""
        view = self._cache.layers[layer]
        self._write(view, key, value)
        scratch_key, scratch_value = self._scratch[0], self._scratch[1]
        for name, (page_ids, offsets) in self._read.items():
            pool, heads, slots = _head_class(view, name)
            read_pages(pool, page_ids, slots, view.layout, scratch_key, scratch_value, heads, offsets)
        blocks = self._block_lists(view, query, key, scratch_key)
        return prefill_attention(query, key, value, scratch_key, scratch_value, view, self._batch, blocks)

    def _write(self, view: LayerView, key: torch.Tensor, value: torch.Tensor) -> None:
        first = 0
        for chunk, (whole, ids) in zip(self._chunks, self._written, strict=True):
            for name, page_ids in ids.items():
                if page_ids.numel():
                    pool, heads, slots = _head_class(view, name)
                    paged = [x[whole].view(-1, PAGE_SIZE, *x.shape[1:]) for x in (key, value)]
                    write_pages(paged[0], paged[1], heads, pool, page_ids, slots, view.layout)
            first += chunk.length
            rest = first - whole.stop
            if rest:
                view.tail_key[chunk.sequence.row, :, :rest] = key[whole.stop : first].transpose(0, 1)
                view.tail_value[chunk.sequence.row, :, :rest] = value[whole.stop : first].transpose(0, 1)

    def _block_lists(
        self, view: LayerView, query: torch.Tensor, key: torch.Tensor, scratch_key: torch.Tensor
    ) -> BlockLists | None:
        sparse_from = self._sparsity.prefill_sparse_from
        if sparse_from is None or all(c.end <= sparse_from or c.sequence.request.attention.dense for c in self._chunks):
            return None
        budget = self._sparsity.prefill_budget
        threshold = self._sparsity.prefill_threshold if budget is None else None
        return prefill_blocks(query, key, scratch_key, view, self._batch, sparse_from, threshold, budget)


class DecodeStep:
    """Attention of one new token for each of B sequences.

    any_reselect: whether the batch's reselect has a True. observe: called with each layer and its query [B, Hq, D].
    """

    def __init__(
        self,
        cache: KVCache,
        sparsity: SparsityConfig,
        batch: DecodeBatch,
        any_reselect: bool,
        observe: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self._cache, self._sparsity, self._any_reselect = cache, sparsity, any_reselect
        self.batch, self._observe = batch, observe

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One layer: query [B, Hq, D], key and value [B, Hkv, D]; returns [B, Hq, D]."""
        view, selection = self._cache.layers[layer], self._cache.selections[layer]
        append_tail(key, value, view.tail_key, view.tail_value, self.batch.rows, self.batch.positions)
        if self._any_reselect:
            two_stage = self._sparsity.rule == "two_stage"
            page_select(query, view, self.batch, selection, self._sparsity.candidate_factor, two_stage)
        if self._observe is not None:
            self._observe(layer, query)
        return decode_attention(query, view, self.batch, selection)


def seal_pages(cache: KVCache, sequences: list[Sequence]) -> None:
    """After the last layer: writes the tails that the newest token filled into their pages, all layers at once."""
    sealing = [s for s in sequences if s.position % PAGE_SIZE == PAGE_SIZE - 1]
    if not sealing:
        return
    rows = upload([s.row for s in sealing], torch.int64, cache.device)
    tail = cache.tail[rows].flatten(1, 2).permute(2, 0, 3, 1, 4)
    for name, heads in cache.class_heads.items():
        pool = cache.retrieval if name == "retrieval" else cache.streaming
        if heads.numel():
            tables = [s.retrieval_pages if name == "retrieval" else s.streaming_pages for s in sealing]
            ids = [table[s.own_page] for table, s in zip(tables, sealing, strict=True)]
            page_ids = upload(ids, torch.int64, cache.device)
            slots = torch.arange(heads.numel(), device=cache.device)
            write_pages(tail[0], tail[1], heads, pool, page_ids, slots, cache.page_format.layout)


def budget_pages(sequence: Sequence, sparsity: SparsityConfig) -> int:
    """Pages that a retrieval head may read for this sequence, its own page included."""
    options = sequence.request.attention
    budget = options.token_budget if options.token_budget is not None else sparsity.token_budget
    return UNLIMITED_PAGES if options.dense or budget is None else budget // PAGE_SIZE


def _head_class(view: LayerView, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool, heads and slots of one class of a layer."""
    if name == "retrieval":
        return view.retrieval_pool, view.retrieval_heads, view.head_slots[view.retrieval_heads].long()
    return view.streaming_pool, view.streaming_heads, view.head_slots[view.streaming_heads].long()
