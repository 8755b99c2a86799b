"""The page format: which slot of a page belongs to which layer and head, and what identifies the numbers in it.

A page holds 64 tokens for every slot of one head class: all retrieval slots of all layers in a retrieval page, all
streaming slots in a streaming page. The same bytes are the device page, the transfer unit and the Redis value.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from lserve.kernels.slot_layout import SlotLayout, make_slot_layout

from .config import PAGE_SIZE, CacheConfig, ModelConfig, SparsityConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Layout and identity of one rank's pages.

    streaming: per layer and KV head, whether the head streams. Slots of a class run layer by layer, head by head.
    tail_row_bytes: one request's newest, incomplete page, unquantized: [layers, KV heads, K and V, 64, head_dim].
    format_id: hash of everything that changes a page's numbers; a page of another format_id is refused.
    """

    layout: SlotLayout
    streaming: tuple[tuple[bool, ...], ...]
    tail_row_bytes: int
    format_id: str

    @property
    def num_streaming_slots(self) -> int:
        """Slots in a streaming page; 0 means the class needs no pages at all."""
        return sum(sum(layer) for layer in self.streaming)

    @property
    def num_retrieval_slots(self) -> int:
        """Slots in a retrieval page; 0 means the class needs no pages at all."""
        return sum(len(layer) for layer in self.streaming) - self.num_streaming_slots

    @property
    def retrieval_page_bytes(self) -> int:
        """Bytes of a retrieval page."""
        return self.num_retrieval_slots * self.layout.slot_bytes

    @property
    def streaming_page_bytes(self) -> int:
        """Bytes of a streaming page."""
        return self.num_streaming_slots * self.layout.slot_bytes

    def first_slots(self, layer: int) -> tuple[int, int]:
        """First retrieval slot and first streaming slot of a layer."""
        streaming = sum(sum(heads) for heads in self.streaming[:layer])
        return sum(len(heads) for heads in self.streaming[:layer]) - streaming, streaming

    def head_slots(self, layer: int) -> list[int]:
        """Each KV head's slot in its own class's pages."""
        retrieval, streaming = self.first_slots(layer)
        slots = []
        for is_streaming in self.streaming[layer]:
            slots.append(streaming if is_streaming else retrieval)
            streaming, retrieval = streaming + is_streaming, retrieval + (not is_streaming)
        return slots


def make_page_format(
    model: ModelConfig,
    cache: CacheConfig,
    sparsity: SparsityConfig,
    streaming: tuple[tuple[bool, ...], ...],
    fingerprint: str,
    weights: str,
    compute_dtype: str,
    value_rotation: str = "hadamard-block",
) -> PageFormat:
    """The format of a model under these settings; everything that changes a page's numbers enters format_id.

    fingerprint: of the checkpoint. weights: their format, and what tells calibrated ones apart. streaming: [layers][KV
    heads]. compute_dtype: float32, bfloat16 or float16.
    """
    layout = make_slot_layout(cache.kv_dtype, model.head_dim, cache.logical_page_size, PAGE_SIZE)
    identity = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "weights": weights,
        "compute_dtype": compute_dtype,
        "rope": [model.rope_theta, model.max_position, model.rope_scaling, model.rope_frequency_factors],
        "value_rotation": value_rotation,
        "streaming": streaming,
        "sink_size": sparsity.sink_size,
        "local_window": sparsity.local_window,
        "prefill_sparse_from": sparsity.prefill_sparse_from,
        "prefill_threshold": sparsity.prefill_threshold if sparsity.prefill_sparse_from is not None else None,
        "prefill_budget": sparsity.prefill_budget if sparsity.prefill_sparse_from is not None else None,
        "layout": asdict(layout),
        "ranks": 1,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    element = 4 if compute_dtype == "float32" else 2
    tail = model.num_layers * model.num_kv_heads * 2 * PAGE_SIZE * model.head_dim * element
    return PageFormat(layout, streaming, tail, digest)
