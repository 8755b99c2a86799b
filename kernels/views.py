"""What attention kernels are told about the caches and the batch: plain tensors, grouped so that calls stay short."""

from dataclasses import dataclass

import torch

from .slot_layout import SlotLayout
from .upload import upload


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's share of the pools and of the tail pool.

    Shapes use Hkv = KV heads, D = head_dim, P = page_size. A head class's slots of one layer are consecutive, in head
    order.

    retrieval_pool, streaming_pool: uint8 [pages, slots of the class over all layers, slot_bytes].
    head_slots: int32 [Hkv], each head's slot in its own class's pool. head_streaming: bool [Hkv].
    retrieval_heads, streaming_heads: int64, the KV heads of each class, ascending (either may be empty).
    tail_key, tail_value: compute dtype [rows, Hkv, P, D], strided views of the tail pool; V is rotated.
    sink_size, local_window: tokens a streaming head keeps; always-kept pages of a retrieval head. scale: head_dim **
    -0.5.
    """

    layout: SlotLayout
    retrieval_pool: torch.Tensor
    streaming_pool: torch.Tensor
    head_slots: torch.Tensor
    head_streaming: torch.Tensor
    retrieval_heads: torch.Tensor
    streaming_heads: torch.Tensor
    first_retrieval_slot: int
    first_streaming_slot: int
    tail_key: torch.Tensor
    tail_value: torch.Tensor
    sink_size: int
    local_window: int
    scale: float


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One new token for each of B sequences.

    rows: int64 [B], each sequence's row in the tail pool and the selection state.
    positions: int64 [B], the new token's position; its own page is positions // P, whose tokens so far lie in the
    tail row. retrieval_table, streaming_table: int32 [B, pages], page ids by page index; streaming entries outside
    sink and window are
        never read, nor entries at or past the own page.
    budget_pages: int32 [B], pages (the own one included) that a retrieval head may read. A sequence whose pages all fit
        (positions // P + 1 <= budget_pages) reads everything; so a dense request just has a huge budget.
    reselect: bool [B], whether this step makes a new page choice. max_pages: host-side bound on positions // P + 1.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    retrieval_table: torch.Tensor
    streaming_table: torch.Tensor
    budget_pages: torch.Tensor
    reselect: torch.Tensor
    max_pages: int


@dataclass(frozen=True, slots=True)
class Selection:
    """A layer's page choices, kept between steps.

    pages: int32 [rows, Hkv, J], page indices (not ids), ascending, own page excluded; entries past the count are
    undefined. counts: int32 [rows, Hkv]. Only retrieval heads of sequences that do not fit their budget are written
    or read.
    """

    pages: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Chunks of B requests, their T tokens laid end to end.

    starts: each chunk's first position, a multiple of 128. lengths: tokens of each chunk. scratch_offsets: where
    position 0 of each request lies in the scratch. Host tuples; `*_device` are the same as int32 [B] (query_offsets
    int32 [B + 1]).
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    scratch_offsets: tuple[int, ...]
    starts_device: torch.Tensor
    query_offsets_device: torch.Tensor
    scratch_offsets_device: torch.Tensor

    @classmethod
    def create(cls, starts: list[int], lengths: list[int], device: torch.device | str) -> "PrefillBatch":
        """Lays the requests' scratch areas end to end, each rounded up to whole 128-token blocks."""
        scratch, total, query = [], 0, [0]
        for start, length in zip(starts, lengths, strict=True):
            scratch.append(total)
            total += (start + length + 127) // 128 * 128
            query.append(query[-1] + length)
        to_device = [upload(x, torch.int32, torch.device(device)) for x in (starts, query, scratch)]
        return cls(tuple(starts), tuple(lengths), tuple(scratch), *to_device)

    @property
    def scratch_tokens(self) -> int:
        """Tokens of scratch that the batch needs."""
        if not self.starts:
            return 0
        return self.scratch_offsets[-1] + (self.starts[-1] + self.lengths[-1] + 127) // 128 * 128


@dataclass(frozen=True, slots=True)
class BlockLists:
    """Key blocks that each query block of each query head reads (dynamic prefill).

    Query blocks are numbered over the batch in order (request by request, ceil(length / 128) each).
    blocks: int32 [query blocks, Hq, max blocks], key block indices (position // 128), ascending, the diagonal block
    last. counts: int32 [query blocks, Hq]. Rows of streaming heads are not read.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
