"""Sections of `bench_kernels.py`: prefill attention and the block estimator, one layer of an 8B model's shape in bf16.

Dense causal attention stands beside cuDNN's in the same run; streaming and block-sparse runs beside the dense one.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from kernel_timing import Ceilings, Row
from torch.nn.attention import SDPBackend, sdpa_kernel

from lserve.kernels.gpu import prefill_attention as gpu
from lserve.kernels.prefill_attention import prefill_attention
from lserve.kernels.prefill_blocks import prefill_blocks
from lserve.kernels.slot_layout import make_slot_layout
from lserve.kernels.views import BlockLists, LayerView, PrefillBatch

QUERY_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 128


@dataclass(frozen=True)
class PrefillInputs:
    """One layer's tensors for a chunk of `tokens` that starts at `start`."""

    tensors: tuple[torch.Tensor, ...]
    layer: LayerView
    batch: PrefillBatch

    def attend(self, lists: BlockLists | None = None) -> torch.Tensor:
        """The operation."""
        return prefill_attention(*self.tensors, self.layer, self.batch, lists)

    def choose(self, **rule: float) -> BlockLists:
        """The estimator, from position 0 on."""
        query, key, _, scratch_key, _ = self.tensors
        return prefill_blocks(query, key, scratch_key, self.layer, self.batch, 0, **rule)


def make_inputs(start: int, tokens: int, num_streaming: int) -> PrefillInputs:
    """Random queries, keys and values; the scratch holds the same keys, as bf16 pages decode."""
    batch = PrefillBatch.create([start], [tokens], "cuda")
    scratch = torch.randn(2, KV_HEADS, batch.scratch_tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(tokens, QUERY_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key, value = (x[:, start : start + tokens].transpose(0, 1).contiguous() for x in scratch)
    heads, nothing = torch.arange(KV_HEADS, device="cuda"), torch.empty(0, device="cuda")
    streaming = heads < num_streaming
    layer = LayerView(
        make_slot_layout("bf16", HEAD_DIM), nothing, nothing, heads.int(), streaming,
        heads[~streaming], heads[streaming], 0, 0, nothing, nothing, 128, 256, HEAD_DIM**-0.5,
    )  # fmt: skip
    return PrefillInputs((query, key, value, *scratch), layer, batch)


def random_lists(tokens: int, share: float) -> tuple[BlockLists, float]:
    """Random blocks, sink, window and diagonal among them, ceil(share * row) a row; and their share of dense work."""
    rows = triton.cdiv(tokens, BLOCK)
    diagonal = torch.arange(rows, device="cuda")[:, None, None]
    block = torch.arange(rows, device="cuda")
    count = torch.ceil((diagonal + 1) * share).long().clamp(min=4).minimum(diagonal + 1)
    order = torch.rand(rows, QUERY_HEADS, rows, device="cuda")
    order.masked_fill_((block == 0) | (block >= diagonal - 2), 2).masked_fill_(block > diagonal, -1)
    kept = order.argsort(-1, descending=True).masked_fill(block >= count, rows).sort(-1).values
    counts = count[..., 0].expand(rows, QUERY_HEADS).int().contiguous()
    return BlockLists(kept.int(), counts), float(count.sum() / (diagonal + 1).sum())


def event_us(function: Callable[[], object], repeats: int = 7) -> float:
    """Median microseconds of a call; short ones are timed several at a time, so that launching does not count."""

    def sample(calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls * 1e3

    sample(1)
    calls = max(1, int(10_000 / sample(1)))
    return statistics.median(sample(calls) for _ in range(repeats))


def _causal_flops(start: int, tokens: int) -> float:
    return 4 * HEAD_DIM * QUERY_HEADS * (tokens * start + tokens * (tokens + 1) / 2)


def _length(tokens: int, ceilings: Ceilings) -> list[Row]:
    """One prompt from its start; bars at 64K only."""
    rows: list[Row] = []
    name, judged = f"{tokens // 1024}K", tokens == 65536
    flops = _causal_flops(0, tokens)

    def add(case: str, us: float, floor: str, fraction: float, bar: str, met: bool) -> None:
        rows.append(
            Row("prefill", f"{name} {case}", us, floor, fraction, bar if judged else "", met if judged else None)
        )

    dense_inputs = make_inputs(0, tokens, 0)
    query, key, value = (x.transpose(0, 1)[None] for x in dense_inputs.tensors[:3])
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn = event_us(lambda: attend(query, key, value, is_causal=True, enable_gqa=True))
    rows.append(Row("prefill", f"{name} cuDNN SDPA", cudnn, "operations", flops / ceilings.bf16 / cudnn * 1e6))
    dense = event_us(dense_inputs.attend)
    rows.append(Row("prefill", f"{name} dense", dense, "operations", flops / ceilings.bf16 / dense * 1e6))
    add("dense", dense, "cuDNN", cudnn / dense, "at least 0.80 of cuDNN", cudnn / dense >= 0.80)
    tiles = gpu.query_tiles(dense_inputs.batch, query.device)
    out = torch.empty_like(dense_inputs.tensors[0])
    arguments = (*dense_inputs.tensors, out, dense_inputs.layer, dense_inputs.layer.retrieval_heads, tiles, None)
    us = event_us(lambda: gpu.launch(*arguments, streaming=False))
    rows.append(Row("prefill", f"{name} dense, portable kernel", us, "cuDNN", cudnn / us))
    us = event_us(make_inputs(0, tokens, KV_HEADS // 2).attend)
    add("half streaming", us, "dense", dense / us, "at least 1.85 x dense", dense / us >= 1.85)
    for share in (0.5, 0.25, 0.1):
        lists, actual = random_lists(tokens, share)
        us = event_us(lambda lists=lists: dense_inputs.attend(lists))
        relative = us / dense / actual
        bar = f"{relative:.3f}, at most 1.12 x share"
        add(f"block-sparse {actual:.1%}", us, "share", 1 / relative, bar, relative <= 1.12)
        del lists
    for case, rule in (("budget 25 %", {"budget": 0.25}), ("threshold 0.5", {"threshold": 0.5})):
        us = event_us(lambda rule=rule: dense_inputs.choose(**rule))
        rows.append(Row("prefill_blocks", f"{name} {case}", us, "dense", us / dense))
    return rows


def prefill(ceilings: Ceilings) -> list[Row]:
    """16K and 64K from their start."""
    return _length(16384, ceilings) + _length(65536, ceilings)


def prefill_chunk(ceilings: Ceilings) -> list[Row]:
    """A chunk of 8K that ends at 128K: dense, and estimated at a quarter of the blocks, estimation counted."""
    inputs = make_inputs(122880, 8192, 0)
    floor = _causal_flops(122880, 8192) / ceilings.bf16 * 1e6
    dense = event_us(inputs.attend)
    sparse = event_us(lambda: inputs.attend(inputs.choose(budget=0.25)))
    return [
        Row("prefill_chunk", "8K at 120K dense", dense, "operations", floor / dense),
        Row("prefill_chunk", "8K at 120K, 25 % and estimator", sparse, "dense", dense / sparse),
    ]


SECTIONS = {"prefill": prefill, "prefill_chunk": prefill_chunk}
