"""What `compile_check` compiles of the cache kernels, page selection and decode attention."""

import torch

from .compile_check import Case
from .gpu import decode_attention, kv_read, kv_write, page_select
from .slot_layout import SlotLayout, make_slot_layout
from .views import DecodeBatch, LayerView, Selection


def _layer(layout: SlotLayout) -> LayerView:
    """Eight KV heads, half of them streaming; shapes and strides only."""
    pool = torch.empty(1, 4, layout.slot_bytes, dtype=torch.uint8)
    tail = torch.empty(1, 8, 2, layout.page_size, layout.head_dim, dtype=torch.bfloat16)
    heads = torch.arange(8)
    return LayerView(
        layout=layout, retrieval_pool=pool, streaming_pool=pool, head_slots=heads.int() % 4, head_streaming=heads >= 4,
        retrieval_heads=heads[:4], streaming_heads=heads[4:], first_retrieval_slot=0, first_streaming_slot=0,
        tail_key=tail[:, :, 0], tail_value=tail[:, :, 1], sink_size=128, local_window=256, scale=layout.head_dim**-0.5,
    )  # fmt: skip


def _batch(num_batch: int, max_pages: int = 2048) -> DecodeBatch:
    row = torch.zeros(num_batch, dtype=torch.int64)
    table = torch.zeros(1, max_pages, dtype=torch.int32).expand(num_batch, -1)
    return DecodeBatch(row, row, table, table, row.int(), row.bool(), max_pages)


def _selection() -> Selection:
    return Selection(torch.zeros(1, 8, 256, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32))


def _query(layer: LayerView, num_batch: int, group_size: int) -> torch.Tensor:
    return torch.empty(num_batch, 8 * group_size, layer.layout.head_dim, dtype=layer.tail_key.dtype)


def decode(kv_dtype: str, head_dim: int = 128, group_size: int = 4) -> None:
    """Decode attention and its merge."""
    layer = _layer(make_slot_layout(kv_dtype, head_dim))
    decode_attention.decode_attention(_query(layer, 8, group_size), layer, _batch(8), _selection())


def select(kv_dtype: str, head_dim: int = 128, group_size: int = 4, max_pages: int = 2048) -> None:
    """The four kernels of page selection."""
    layer = _layer(make_slot_layout(kv_dtype, head_dim))
    page_select.page_select(_query(layer, 8, group_size), layer, _batch(8, max_pages), _selection(), 4, True)


def write(kv_dtype: str, head_dim: int = 128) -> None:
    """Whole pages of a chunk."""
    layer = _layer(make_slot_layout(kv_dtype, head_dim))
    key = torch.empty(2, layer.layout.page_size, 8, head_dim, dtype=torch.bfloat16)
    index = torch.arange(2)
    kv_write.write_pages(key, key, index, layer.retrieval_pool, index, index, layer.layout)


def read(kv_dtype: str, head_dim: int = 128) -> None:
    """Whole pages of a chunk."""
    layer = _layer(make_slot_layout(kv_dtype, head_dim))
    scratch = torch.empty(8, 128, head_dim, dtype=torch.bfloat16)
    index = torch.arange(2)
    kv_read.read_pages(layer.retrieval_pool, index, index, layer.layout, scratch, scratch, index, index)


DECODE_CASES = [
    Case("decode int4", lambda: decode("int4")),
    Case("decode int8", lambda: decode("int8")),
    Case("decode bf16", lambda: decode("bf16")),
    Case("decode int4, head_dim 64, group 3", lambda: decode("int4", 64, 3)),
    Case("decode int4, head_dim 128, group 16", lambda: decode("int4", 128, 16)),
    Case("decode int4, head_dim 256, group 2", lambda: decode("int4", 256, 2)),
    Case("select int4", lambda: select("int4")),
    Case("select int4, 1M tokens", lambda: select("int4", max_pages=16384)),
    Case("write int4", lambda: write("int4")),
    Case("write int4, head_dim 256", lambda: write("int4", 256)),
    Case("read int4", lambda: read("int4")),
]
