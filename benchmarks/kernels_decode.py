"""Sections of `bench_kernels.py`: writing pages, page selection and decode attention, one layer of an 8B model's
shape.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kernel_timing import Ceilings, Row, copy_us, graph_us

from lserve.kernels.decode_attention import decode_attention
from lserve.kernels.kv_read import read_pages
from lserve.kernels.kv_write import append_tail, write_pages
from lserve.kernels.page_select import page_select
from lserve.kernels.slot_layout import SlotLayout, make_slot_layout
from lserve.kernels.views import DecodeBatch, LayerView, Selection

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
DENSE = 2**30
BUDGET = 8192 // PAGE


def random_pool(num_pages: int, num_slots: int, layout: SlotLayout) -> torch.Tensor:
    """Random codes under sane ranges, uint8 [pages, slots, slot_bytes]."""
    pool = torch.randint(0, 255, (num_pages, num_slots, layout.slot_bytes), dtype=torch.uint8, device="cuda")
    if layout.float_dtype is not None:
        pool.view(layout.float_dtype).normal_()
    half = pool.view(torch.float16)
    for first, last, low, high in (
        (layout.key_min, layout.key_step, -3.0, -1.0),
        (layout.key_step, layout.value_codes, 0.1, 0.3),
        (layout.value_min, layout.value_step, -3.0, -1.0),
        (layout.value_step, layout.slot_bytes, 0.1, 0.3),
    ):
        scale = 1.0 if high < 0 else 15.0 / layout.key_levels
        half[..., first // 2 : last // 2].uniform_(low * scale, high * scale)
    return pool


class DecodeInputs:
    """Several layers over shared page tables, so that repeated calls read different memory."""

    def __init__(
        self, context: int, num_batch: int, kv_dtype: str, num_streaming: int, budget: int, num_layers: int
    ) -> None:
        self.layout = make_slot_layout(kv_dtype, HEAD_DIM)
        pages = context // PAGE
        num_retrieval = KV_HEADS - num_streaming
        ids = torch.randperm(num_batch * pages, device="cuda").int().view(num_batch, pages)
        pool = random_pool(num_batch * pages, num_layers * num_retrieval, self.layout)
        window_pages = 8
        streaming_ids = torch.zeros(num_batch, pages, dtype=torch.int32, device="cuda")
        kept = torch.arange(num_batch * window_pages, dtype=torch.int32, device="cuda").view(num_batch, window_pages)
        streaming_ids[:, :2], streaming_ids[:, -6:] = kept[:, :2], kept[:, 2:]
        streaming_pool = random_pool(num_batch * window_pages, num_layers * max(num_streaming, 1), self.layout)
        tail = torch.randn(num_batch, num_layers, KV_HEADS, 2, PAGE, HEAD_DIM, device="cuda").bfloat16()
        streaming = torch.arange(KV_HEADS, device="cuda") >= num_retrieval
        heads = torch.arange(KV_HEADS, device="cuda")
        self.layers = [
            LayerView(
                layout=self.layout, retrieval_pool=pool, streaming_pool=streaming_pool,
                head_slots=torch.where(streaming, layer * num_streaming + heads - num_retrieval,
                layer * num_retrieval + heads).int(),
                head_streaming=streaming, retrieval_heads=heads[:num_retrieval], streaming_heads=heads[num_retrieval:],
                first_retrieval_slot=layer * num_retrieval, first_streaming_slot=layer * num_streaming,
                tail_key=tail[:, layer, :, 0], tail_value=tail[:, layer, :, 1],
                sink_size=128, local_window=256, scale=HEAD_DIM**-0.5,
            )
            for layer in range(num_layers)
        ]  # fmt: skip
        self.batch = DecodeBatch(
            rows=torch.arange(num_batch, device="cuda"),
            positions=torch.full((num_batch,), context - PAGE // 2, dtype=torch.int64, device="cuda"),
            retrieval_table=ids, streaming_table=streaming_ids,
            budget_pages=torch.full((num_batch,), budget, dtype=torch.int32, device="cuda"),
            reselect=torch.ones(num_batch, dtype=torch.bool, device="cuda"),
            max_pages=pages,
        )  # fmt: skip
        width = min(budget, pages)
        self.selections = [
            Selection(
                torch.zeros(num_batch, KV_HEADS, width, dtype=torch.int32, device="cuda"),
                torch.zeros(num_batch, KV_HEADS, dtype=torch.int32, device="cuda"),
            )
            for _ in range(num_layers)
        ]
        self.query = torch.randn(num_layers, num_batch, QUERY_HEADS, HEAD_DIM, device="cuda").bfloat16()

    def attend(self) -> list[Callable[[], object]]:
        """One decode attention call per layer."""
        return [
            lambda i=i: decode_attention(self.query[i], self.layers[i], self.batch, self.selections[i])
            for i in range(len(self.layers))
        ]

    def select(self, choosing: int) -> list[Callable[[], object]]:
        """One page selection call per layer, in a step in which so many of the sequences choose."""
        reselect = torch.arange(len(self.batch.reselect), device="cuda") < choosing
        batch = replace(self.batch, reselect=reselect)
        return [
            lambda i=i: page_select(self.query[i], self.layers[i], batch, self.selections[i])
            for i in range(len(self.layers))
        ]


def dense_decode(ceilings: Ceilings) -> list[Row]:
    """All heads read everything: bytes of pages over the copy bandwidth."""
    rows = []
    bars = {("int8", 65536, 8): 0.76, ("int4", 65536, 8): 0.60}
    for kv_dtype in ("int8", "int4", "k8v4", "bf16"):
        for context, num_batch in ((65536, 8), (8192, 1), (131072, 1), (8192, 64)):
            if kv_dtype in ("k8v4", "bf16") and (context, num_batch) != (65536, 8):
                continue
            layers = max(1, 8 * 65536 // (context * num_batch) // 4)
            inputs = DecodeInputs(context, num_batch, kv_dtype, 0, DENSE, layers)
            us = graph_us(inputs.attend())
            read = (context // PAGE - 1) * num_batch * KV_HEADS * inputs.layout.slot_bytes
            fraction = read / ceilings.copy / us * 1e6
            bar = bars.get((kv_dtype, context, num_batch))
            rows.append(
                Row(
                    "dense decode", f"{kv_dtype} {context // 1024}K x {num_batch}", us, "bytes", fraction,
                    f">= {bar} of copy bandwidth" if bar else "", None if bar is None else fraction >= bar,
                )
            )  # fmt: skip
    return rows


def _selection_rows(inputs: DecodeInputs, name: str, attention_us: float, bar: float | None, copy: float) -> list[Row]:
    """Page selection beside the attention that follows it.

    A choice serves four steps, and the engine launches nothing in a step in which no sequence chooses. So sequences
    in step cost a choice of all in every fourth step; out of step, a choice of a quarter of them in every step.
    """
    num_batch = len(inputs.batch.reselect)
    layout, pages = inputs.layout, inputs.batch.max_pages
    scored = min(4 * BUDGET, pages)
    read = num_batch * (KV_HEADS // 2) * (pages * (layout.value_codes - layout.key_min) + scored * layout.value_codes)
    choosing = graph_us(inputs.select(num_batch))
    share = choosing / 4 / attention_us
    said = "" if bar is None else f"<= {bar:.2f} of attention"
    rows = [
        Row("page_select", f"{name} choosing", choosing, "bytes", read / copy / choosing * 1e6),
        Row(
            "page_select", f"{name} a step of 4, in step", choosing / 4, "attention", share,
            said, None if bar is None else share <= bar,
        ),
    ]  # fmt: skip
    if num_batch >= 4:
        quarter = graph_us(inputs.select(num_batch // 4))
        rows.append(
            Row("page_select", f"{name} a step of 4, out of step", quarter, "attention", quarter / attention_us)
        )
    rows.append(Row("page_select", f"{name} launched, none chooses", graph_us(inputs.select(0))))
    return rows


def sparse_decode(ceilings: Ceilings) -> list[Row]:
    """Half the heads streaming, budget 8192, int4; page selection beside it."""
    rows = []
    times: dict[tuple[int, int], float] = {}
    selection_bars = {(131072, 8): 0.60, (1048576, 1): 1.50}
    for context, num_batch, layers in (
        (32768, 1, 32),
        (131072, 1, 16),
        (524288, 1, 8),
        (1048576, 1, 8),
        (32768, 8, 8),
        (131072, 8, 8),
    ):
        inputs = DecodeInputs(context, num_batch, "int4", KV_HEADS // 2, BUDGET, layers)
        for call in inputs.select(num_batch):
            call()
        us = times[context, num_batch] = graph_us(inputs.attend())
        read = num_batch * (KV_HEADS // 2) * inputs.layout.slot_bytes * (BUDGET - 1 + 6)
        name = f"int4 {context // 1024}K x {num_batch}"
        bar, met = "", None
        if (context, num_batch) == (131072, 8):
            bar, met = "<= 40 us", us <= 40
        if (context, num_batch) == (524288, 1):
            bar, met = "<= 1.15 of 32K x 1", us <= 1.15 * times[32768, 1]
        rows.append(Row("sparse decode", name, us, "bytes", read / ceilings.copy / us * 1e6, bar, met))
        rows += _selection_rows(inputs, name, us, selection_bars.get((context, num_batch)), ceilings.copy)
    return rows


def _traffic_of(kv_dtype: str) -> list[Row]:
    num_pages, buffers = 8192 // PAGE, 4
    heads = torch.arange(KV_HEADS, device="cuda")
    layout = make_slot_layout(kv_dtype, HEAD_DIM)
    pool = random_pool(num_pages * buffers, KV_HEADS, layout)
    ids = torch.randperm(num_pages * buffers, device="cuda").view(buffers, num_pages)
    key, value = torch.randn(2, buffers, num_pages, PAGE, KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    scratch = torch.empty(buffers, 2, KV_HEADS, num_pages * PAGE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    offsets = torch.arange(num_pages, device="cuda") * PAGE
    moved = 2 * key[0].nbytes + num_pages * KV_HEADS * layout.slot_bytes
    source, target = torch.empty(2, buffers, moved // 2, dtype=torch.uint8, device="cuda").random_()

    def write(i: int) -> None:
        write_pages(key[i], value[i], heads, pool, ids[i], heads, layout)

    def read(i: int) -> None:
        read_pages(pool, ids[i], heads, layout, scratch[i, 0], scratch[i, 1], heads, offsets)

    name = f"{kv_dtype} 8K tokens"
    plain = copy_us([(target[i], source[i]) for i in range(buffers)])
    us = graph_us([partial(write, i) for i in range(buffers)], rounds=4)
    rows = [Row("kv_write", name, us, "copy", plain / us, ">= 0.60 of a copy", plain / us >= 0.60)]
    us = graph_us([partial(read, i) for i in range(buffers)], rounds=4)
    return [*rows, Row("kv_read", name, us, "copy", plain / us)]


def page_traffic(_: Ceilings) -> list[Row]:
    """Writing and reading back 8K tokens of all heads, beside a plain copy of the same number of bytes."""
    rows = [row for kv_dtype in ("int4", "int8", "k8v4", "bf16") for row in _traffic_of(kv_dtype)]
    tail = torch.zeros(64, KV_HEADS, 2, PAGE, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(64, KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    at = torch.arange(64, device="cuda")
    us = graph_us([lambda: append_tail(new, new, tail[:, :, 0], tail[:, :, 1], at, at)], rounds=8)
    return [*rows, Row("kv_write", "one token x 64", us)]


SECTIONS = {"dense_decode": dense_decode, "sparse_decode": sparse_decode, "page_traffic": page_traffic}
