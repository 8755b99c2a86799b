"""Prefill attention on a GPU, one layer of Llama-3-8B's shape (32 query and 8 KV heads, head_dim 128, bf16).

Times dense causal attention next to cuDNN's, half the heads streaming, block-sparse runs of several shares (their cost
against their share of the dense time), the block estimator, and a chunk late in a long prompt; fresh random data,
medians of event timings. Prints a table and one line of JSON.

    python benchmarks/bench_prefill.py --tokens 65536 --out results.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from lserve.kernels.gpu import prefill_attention as gpu
from lserve.kernels.prefill_attention import prefill_attention
from lserve.kernels.prefill_blocks import prefill_blocks
from lserve.kernels.slot_layout import make_slot_layout
from lserve.kernels.views import BlockLists, LayerView, PrefillBatch

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 128


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors for a chunk of `tokens` that starts at `start`."""

    tensors: tuple[torch.Tensor, ...]
    layer: LayerView
    batch: PrefillBatch


def make_inputs(start: int, tokens: int, num_streaming: int) -> Inputs:
    """Random bf16 queries, keys and values; the scratch holds the same keys, as bf16 pages decode."""
    batch = PrefillBatch.create([start], [tokens], "cuda")
    scratch = torch.randn(2, NUM_KV_HEADS, batch.scratch_tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(tokens, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key, value = (x[:, start : start + tokens].transpose(0, 1).contiguous() for x in scratch)
    streaming = torch.arange(NUM_KV_HEADS, device="cuda") < num_streaming
    heads = torch.arange(NUM_KV_HEADS, device="cuda")
    nothing = torch.empty(0, device="cuda")
    layer = LayerView(
        layout=make_slot_layout("bf16", HEAD_DIM),
        retrieval_pool=nothing,
        streaming_pool=nothing,
        head_slots=heads.int(),
        head_streaming=streaming,
        retrieval_heads=heads[~streaming],
        streaming_heads=heads[streaming],
        first_retrieval_slot=0,
        first_streaming_slot=0,
        tail_key=nothing,
        tail_value=nothing,
        sink_size=128,
        local_window=256,
        scale=HEAD_DIM**-0.5,
    )
    return Inputs((query, key, value, *scratch), layer, batch)


def random_lists(start: int, tokens: int, share: float) -> tuple[BlockLists, float]:
    """Random blocks, sink, window and diagonal among them, ceil(share * row) a row; and the share of dense work."""
    first, rows = start // BLOCK, triton.cdiv(tokens, BLOCK)
    width = first + rows
    diagonal = torch.arange(first, width, device="cuda")[:, None, None]
    block = torch.arange(width, device="cuda")
    count = torch.ceil((diagonal + 1) * share).long().clamp(min=4).minimum(diagonal + 1)
    noise = torch.rand(rows, NUM_HEADS, width, device="cuda")
    noise.masked_fill_((block == 0) | (block >= diagonal - 2), 2).masked_fill_(block > diagonal, -1)
    kept = noise.argsort(-1, descending=True)
    kept = kept.masked_fill(torch.arange(width, device="cuda") >= count, width).sort(-1).values
    counts = count[..., 0].expand(rows, NUM_HEADS).int().contiguous()
    return BlockLists(kept.int(), counts), float(count.sum() / (diagonal + 1).sum())


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a call; short ones are timed several at a time, so that launching does not count."""

    def sample(calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    sample(1)
    calls = max(1, int(10 / sample(1)))
    return statistics.median(sample(calls) for _ in range(repeats))


def bench(tokens: int, repeats: int) -> list[dict[str, float | str]]:
    """Rows of name, milliseconds, TFLOP/s of the work done, and what the bar compares."""
    operations = 4 * HEAD_DIM * NUM_HEADS * tokens * (tokens + 1) / 2
    rows: list[dict[str, float | str]] = []

    def add(name: str, ms: float, flops: float, note: str = "", ratio: float = 0.0) -> None:
        rows.append(
            {"name": name, "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1), "note": note, "ratio": ratio}
        )
        print(f"{tokens:>7} {name:<34} {ms:>10.3f} ms {flops / ms / 1e9:>8.1f} TFLOP/s  {note}", flush=True)

    inputs = make_inputs(0, tokens, 0)
    query, key, value = (x.transpose(0, 1)[None] for x in inputs.tensors[:3])
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn = timed(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            ),
            repeats,
        )
    add("cuDNN SDPA", cudnn, operations)
    dense = timed(lambda: prefill_attention(*inputs.tensors, inputs.layer, inputs.batch), repeats)
    add("dense", dense, operations, f"{cudnn / dense:.3f} of cuDNN's rate", cudnn / dense)
    out = torch.empty_like(inputs.tensors[0])
    tiles = gpu.query_tiles(inputs.batch, out.device)
    arguments = (*inputs.tensors, out, inputs.layer, inputs.layer.retrieval_heads, tiles, None)
    portable = timed(lambda: gpu.launch(*arguments, streaming=False), repeats)
    add("dense, portable kernel", portable, operations, f"{cudnn / portable:.3f} of cuDNN's rate", cudnn / portable)

    half = make_inputs(0, tokens, NUM_KV_HEADS // 2)
    ms = timed(lambda: prefill_attention(*half.tensors, half.layer, half.batch), repeats)
    add("half the heads streaming", ms, operations / 2, f"{dense / ms:.3f} x dense", dense / ms)
    every = make_inputs(0, tokens, NUM_KV_HEADS)
    ms = timed(lambda: prefill_attention(*every.tensors, every.layer, every.batch), repeats)
    add("all heads streaming", ms, 4 * HEAD_DIM * NUM_HEADS * tokens * 384, f"{ms / dense:.4f} of dense", ms / dense)

    for share in (0.5, 0.25, 0.1):
        lists, actual = random_lists(0, tokens, share)
        ms = timed(lambda lists=lists: prefill_attention(*inputs.tensors, inputs.layer, inputs.batch, lists), repeats)
        relative = ms / dense / actual
        add(f"block-sparse, {actual:.1%}", ms, operations * actual, f"{relative:.3f} x its share of dense", relative)
        del lists
    arguments = (inputs.tensors[0], inputs.tensors[1], inputs.tensors[3], inputs.layer, inputs.batch, 0)
    for name, rule in (("budget 25 %", {"budget": 0.25}), ("threshold", {"threshold": 0.5})):
        ms = timed(lambda rule=rule: prefill_blocks(*arguments, **rule), repeats)
        note = f"{ms / dense:.4f} of dense"
        add(f"prefill_blocks, {name}", ms, operations / 32, note, ms / dense)
    return rows


def bench_chunk(start: int, tokens: int, repeats: int) -> list[dict[str, float | str]]:
    """A chunk late in a prompt, dense and by the estimator at a quarter of the blocks, estimation included."""
    inputs = make_inputs(start, tokens, 0)
    operations = 4 * HEAD_DIM * NUM_HEADS * (tokens * start + tokens * (tokens + 1) / 2)
    dense = timed(lambda: prefill_attention(*inputs.tensors, inputs.layer, inputs.batch), repeats)

    def estimated() -> torch.Tensor:
        query, key, _, scratch_key, _ = inputs.tensors
        lists = prefill_blocks(query, key, scratch_key, inputs.layer, inputs.batch, 0, budget=0.25)
        return prefill_attention(*inputs.tensors, inputs.layer, inputs.batch, lists)

    sparse = timed(estimated, repeats)
    rows: list[dict[str, float | str]] = []
    for name, ms in ((f"chunk at {start}, dense", dense), (f"chunk at {start}, estimator 25 %", sparse)):
        rate = operations / ms / 1e9
        rows.append(
            {"name": name, "ms": round(ms, 4), "tflops": round(rate, 1), "note": "dense work", "ratio": ms / dense}
        )
        print(f"{tokens:>7} {name:<34} {ms:>10.3f} ms {rate:>8.1f} TFLOP/s of dense work", flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="also write the JSON here")
    arguments = parser.parse_args()
    hardware = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(hardware)
    result = {"hardware": hardware, "prefill": {str(n): bench(n, arguments.repeats) for n in arguments.tokens}}
    result["chunk"] = bench_chunk(122880, 8192, arguments.repeats)
    line = json.dumps(result)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
