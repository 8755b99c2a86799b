"""The whole engine on one device: prefill and decode times by context and batch, dense and sparse.

Weights are random (`--shape`), pages hold random keys and values, so that no checkpoint is needed; work and traffic are
those of a real model. Decode times are medians over steps of which one in `reselect_interval` selects pages, host work
and sampling included.

    python benchmarks/bench_engine.py --shape llama-3-8b --device cuda [--weights w4a8] [--kv-dtype int4] [--write]
    python benchmarks/bench_engine.py --shape tiny          # seconds on a CPU
"""

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from common import print_table, report

from lserve.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SparsityConfig,
)
from lserve.engine.engine import Engine
from lserve.engine.loading import LoadedModel
from lserve.engine.page_format import make_page_format
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import AttentionOptions, Request, SamplingParams
from lserve.engine.sampling import SamplingRow, sample
from lserve.engine.sequence import PrefillChunk, Sequence, State
from lserve.engine.weights import build_model
from lserve.kernels.kv_write import write_pages

SHAPES = {
    "llama-3-8b": ModelConfig("llama", 32, 4096, 14336, 32, 8, 128, 128256, 1 << 20, 5e5, 1e-5),
    "tiny": ModelConfig("llama", 4, 256, 512, 8, 2, 64, 1024, 1 << 16, 5e5, 1e-5),
}
GREEDY = SamplingParams(temperature=0, max_tokens=1)


@dataclass
class RandomTensors:
    """A checkpoint of random weights, made one tensor at a time."""

    config: ModelConfig
    device: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        layer = {
            "input_layernorm": (c.hidden_size,),
            "post_attention_layernorm": (c.hidden_size,),
            "self_attn.q_proj": (c.num_heads * c.head_dim, c.hidden_size),
            "self_attn.k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "self_attn.v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "self_attn.o_proj": (c.hidden_size, c.num_heads * c.head_dim),
            "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
            "mlp.up_proj": (c.intermediate_size, c.hidden_size),
            "mlp.down_proj": (c.hidden_size, c.intermediate_size),
        }
        all_layers = {f"model.layers.{i}.{n}.weight": s for i in range(c.num_layers) for n, s in layer.items()}
        vocabulary = (c.vocab_size, c.hidden_size)
        ends = {
            "model.embed_tokens.weight": vocabulary,
            "model.norm.weight": (c.hidden_size,),
            "lm_head.weight": vocabulary,
        }
        return all_layers | ends

    def names(self) -> Iterable[str]:
        return self.shapes()

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes()[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16).mul_(shape[1] ** -0.5)


def make_engine(args: argparse.Namespace, tokens: int, sparse_from: int | None = None) -> Engine:
    """An engine whose pools hold about `tokens` tokens in all, filled with random pages."""
    config = SHAPES[args.shape]
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    sparsity = SparsityConfig(
        token_budget=args.token_budget,
        max_token_budget=max(args.token_budget, 16384),
        prefill_sparse_from=sparse_from,
        prefill_threshold=args.prefill_threshold,
    )
    settings = EngineConfig(
        model=args.shape,
        device=args.device,
        compute_dtype=dtype,
        weights=args.weights,
        cache=CacheConfig(kv_dtype=args.kv_dtype, prefix_cache=False),
        sparsity=sparsity,
        scheduler=SchedulerConfig(chunk_size=args.chunk, max_batch_size=64, max_model_len=config.max_position),
    )
    streaming = tuple(
        tuple(args.streaming and (head + layer) % 2 == 0 for head in range(config.num_kv_heads))
        for layer in range(config.num_layers)
    )
    page_format = make_page_format(config, settings.cache, sparsity, streaming, "random", args.weights, dtype)
    if args.model is None:
        source = RandomTensors(config, args.device)
        args.model = build_model(config, source, torch.device(args.device), getattr(torch, dtype), args.weights)
    pages = tokens // 64 + 64
    sizes = PoolSizes(pages, 16 * 64 + 2 * args.chunk // 64 + 64 if args.streaming else 0, 66)
    engine = Engine(settings, LoadedModel(args.model, None, page_format, sparsity), sizes=sizes)  # type: ignore[arg-type]
    fill(engine)
    return engine


def fill(engine: Engine) -> None:
    """Random keys and values in every page of both pools."""
    layout, device = engine.page_format.layout, engine.cache.device
    for pool in (engine.cache.retrieval, engine.cache.streaming):
        if pool.numel():
            slots = torch.arange(pool.shape[1], device=device)
            shape = (16, 64, pool.shape[1], layout.head_dim)
            key, value = (torch.randn(shape, device=device, dtype=engine.cache.dtype) for _ in range(2))
            for first in range(0, pool.shape[0], 16):
                ids = torch.arange(first, min(first + 16, pool.shape[0]), device=device)
                write_pages(key[: len(ids)], value[: len(ids)], slots, pool, ids, slots, layout)
    engine.cache.tail.normal_()


def seat(engine: Engine, context: int, dense: bool) -> Sequence:
    """A sequence that has `context` tokens in pages, ready to decode."""
    request = Request("bench", (1,), GREEDY, AttentionOptions(dense=dense))
    sequence = Sequence(request, 0, [1] * context, context)
    sequence.row = engine.row_pool.allocate(1)[0]
    if engine.page_format.num_retrieval_slots:
        sequence.retrieval_pages = engine.retrieval_pool.allocate(context // 64 + 8)
    window = [*engine.residency.streaming_pages_to_resume(context), *range(context // 64, context // 64 + 8)]
    engine.scheduler.reserve_streaming(sequence, window)
    sequence.state = State.RUNNING
    return sequence


def leave(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.scheduler.finish(sequence)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def decode_ms(engine: Engine, context: int, batch: int, dense: bool, steps: int, device: str) -> float:
    """Median milliseconds of a step, sampling and host work included, mean over a reselect interval."""
    sequences = [seat(engine, context, dense) for _ in range(batch)]
    interval = engine.config.sparsity.reselect_interval
    times = []
    for step in range(steps + 2 * interval):
        synchronize(device)
        start = time.perf_counter()
        logits = engine.runner.decode(sequences)
        rows = [SamplingRow(GREEDY, 0, s.num_tokens) for s in sequences]
        tokens = sample(logits, rows)
        synchronize(device)
        if step >= 2 * interval:
            times.append((time.perf_counter() - start) * 1e3)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.token_ids.append(token.token_id)
            sequence.fresh = False
    leave(engine, sequences)
    groups = [times[i::interval] for i in range(interval)]
    return sum(statistics.median(group) for group in groups) / interval


def prefill_s(engine: Engine, context: int, chunk: int, device: str) -> float:
    """Seconds to prefill a prompt of `context` tokens, chunk by chunk."""
    sequence = Sequence(Request("bench", (1,), GREEDY), 0, [1] * context, context)
    sequence.row = engine.row_pool.allocate(1)[0]
    if engine.page_format.num_retrieval_slots:
        sequence.retrieval_pages = engine.retrieval_pool.allocate(context // 64 + 1)
    synchronize(device)
    start = time.perf_counter()
    for first in range(0, context, chunk):
        part = PrefillChunk(sequence, first, min(chunk, context - first))
        engine.scheduler.reserve_streaming(sequence, list(range(part.start // 64, part.end // 64 + 1)))
        engine.runner.prefill([part])
        sequence.num_computed = part.end
        engine.scheduler.drop_stale_streaming(sequence)
    synchronize(device)
    seconds = time.perf_counter() - start
    leave(engine, [sequence])
    return seconds


def parse_cases(text: str) -> list[tuple[int, int]]:
    return [(int(c), int(b)) for c, b in (case.split("x") for case in text.split(",") if case)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="native")
    parser.add_argument("--kv-dtype", default="int4")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--no-streaming", dest="streaming", action="store_false", help="all heads keep all history")
    parser.add_argument("--decode", default="2048x1,8192x2", help="context x batch, ...")
    parser.add_argument("--dense", default="", help="decode cases to time densely too")
    parser.add_argument("--prefill", default="4096")
    parser.add_argument("--prefill-sparse", default="", help="prefill lengths to time with the block estimator")
    parser.add_argument("--prefill-threshold", type=float, default=0.05)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--name", default="engine")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    args.model = None
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    sparse, dense = parse_cases(args.decode), parse_cases(args.dense)
    lengths = [int(x) for x in args.prefill.split(",") if x]
    tokens = max([c * b + 1024 * b for c, b in sparse + dense] + lengths)
    engine = make_engine(args, tokens)
    with torch.inference_mode():
        for is_dense, cases in ((False, sparse), (True, dense)):
            for context, batch in cases:
                ms = decode_ms(engine, context, batch, is_dense, args.steps, args.device)
                name = "decode dense" if is_dense else "decode sparse"
                rows.append((name, f"{context} x {batch}", f"{ms:.3f} ms"))
                results.append({"what": name, "context": context, "batch": batch, "ms": ms})
        for length in lengths:
            prefill_s(engine, min(length, 4 * args.chunk), args.chunk, args.device)
            seconds = prefill_s(engine, length, args.chunk, args.device)
            rows.append(("prefill", length, f"{seconds:.3f} s"))
            results.append({"what": "prefill", "context": length, "s": seconds})
        del engine
        for length in [int(x) for x in args.prefill_sparse.split(",") if x]:
            engine = make_engine(args, length, sparse_from=0)
            prefill_s(engine, min(length, 4 * args.chunk), args.chunk, args.device)
            seconds = prefill_s(engine, length, args.chunk, args.device)
            rows.append((f"prefill, estimator at {args.prefill_threshold}", length, f"{seconds:.3f} s"))
            results.append({"what": "prefill sparse", "context": length, "s": seconds})
            del engine
    streaming = "half the heads streaming" if args.streaming else "no streaming heads"
    print(f"{args.shape}, {args.weights} weights, {args.kv_dtype} pages, budget {args.token_budget}, {streaming}")
    print_table(("what", "tokens", "time"), rows)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    settings = {"shape": args.shape, "weights": args.weights, "kv_dtype": args.kv_dtype, "budget": args.token_budget}
    report(args.name, {"device": device, **settings, "streaming": args.streaming, "results": results}, args.write)


if __name__ == "__main__":
    main()
