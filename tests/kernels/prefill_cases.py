"""Random prefill batches: ragged chunks, scratch poisoned wherever no head may read."""

from dataclasses import dataclass

import torch
from attention_cases import make_layer, random_keys

from lserve.kernels.slot_layout import make_slot_layout
from lserve.kernels.views import BlockLists, LayerView, PrefillBatch

BLOCK = 128


@dataclass
class PrefillCase:
    """One layer's inputs of a prefill step; `arguments` are the attention launcher's."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scratch_key: torch.Tensor
    scratch_value: torch.Tensor
    layer: LayerView
    batch: PrefillBatch

    @property
    def arguments(self) -> tuple:
        return (
            self.query,
            self.key,
            self.value,
            self.scratch_key,
            self.scratch_value,
            self.layer,
            self.batch,
        )

    @property
    def retrieval_query_heads(self) -> list[int]:
        group = self.query.shape[1] // self.key.shape[1]
        return [int(h) * group + g for h in self.layer.retrieval_heads for g in range(group)]


def make_prefill_case(
    starts: list[int],
    lengths: list[int],
    *,
    streaming: list[bool],
    group_size: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    sink_size: int = 128,
    local_window: int = 256,
    device: str = "cpu",
) -> PrefillCase:
    """Decoded pages differ from what was written, so a path that mixes them up is found out."""
    batch = PrefillBatch.create(starts, lengths, device)
    layer = make_layer(
        make_slot_layout("int8", head_dim),
        streaming,
        1,
        1,
        dtype,
        device,
        sink_size=sink_size,
        local_window=local_window,
    )
    num_tokens, num_kv_heads = sum(lengths), len(streaming)
    query = torch.randn(num_tokens, num_kv_heads * group_size, head_dim, device=device).to(dtype)
    key = random_keys(num_tokens, num_kv_heads, head_dim, device=device).to(dtype)
    value = torch.randn(num_tokens, num_kv_heads, head_dim, device=device).to(dtype)
    scratch_key = torch.full((num_kv_heads, batch.scratch_tokens, head_dim), torch.nan, device=device, dtype=dtype)
    scratch_value = scratch_key.clone()
    for start, length, offset in zip(batch.starts, batch.lengths, batch.scratch_offsets, strict=True):
        whole = (start + length) // 64 * 64
        first_of_window = max(start - local_window + 1, 0) // 64 * 64
        for head, is_streaming in enumerate(streaming):
            token = torch.arange(whole, device=device)
            page = token // 64 * 64
            readable = token if not is_streaming else token[(page < sink_size) | (page >= first_of_window)]
            scratch_key[head, offset + readable] = random_keys(len(readable), head_dim, device=device).to(dtype)
            values = torch.randn(len(readable), head_dim, device=device).to(dtype)
            scratch_value[head, offset + readable] = values
    return PrefillCase(query, key, value, scratch_key, scratch_value, layer, batch)


def random_lists(case: PrefillCase, share: float = 0.5) -> BlockLists:
    """Any blocks of a retrieval head, the diagonal always; unused entries and streaming rows are out of range."""
    positions = [s + i for s, n in zip(case.batch.starts, case.batch.lengths, strict=True) for i in range(0, n, BLOCK)]
    width = max((p // BLOCK + 1 for p in positions), default=0)
    blocks = torch.full((len(positions), case.query.shape[1], width), 2**24, dtype=torch.int32)
    counts = torch.full((len(positions), case.query.shape[1]), 2**24, dtype=torch.int32)
    for row, position in enumerate(positions):
        diagonal = position // BLOCK
        for head in case.retrieval_query_heads:
            kept = [b for b in range(diagonal) if torch.rand(()) < share] + [diagonal]
            blocks[row, head, : len(kept)] = torch.tensor(kept)
            counts[row, head] = len(kept)
    return BlockLists(blocks.to(case.query.device), counts.to(case.query.device))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; NaN where anything is NaN."""
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()
