"""The engine on a CPU against transformers' `generate`, in one run: prefill, decode at batch 1 and batch 8.

Same model, float32, same threads, transformers' default attention and cache. The engine has int4 pages, a token
budget of 1,024 and no streaming heads. Times alternate between the two and are medians, since machines are noisy; of
decode steps, one in four of which selects pages, the mean over such four.

    python benchmarks/bench_cpu.py [--tokens 7500] [--rounds 3] [--steps 16] [--write]
"""

import argparse
import statistics
import time
import warnings

import torch
from common import demo_engine, long_text, print_table, report
from transformers import AutoModelForCausalLM, DynamicCache

from lserve.cli.demo_model import demo_model
from lserve.engine.config import CacheConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.request import Request, SamplingParams


def engine_prefill(engine: Engine, prompt: list[int]) -> float:
    """Seconds from add_request to the first token, nothing cached."""
    assert engine.index is not None
    engine.index.clear()
    request = Request(f"p{time.monotonic_ns()}", tuple(prompt), SamplingParams(temperature=0, max_tokens=1))
    engine.add_request(request)
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def engine_decode(engine: Engine, prompt: list[int], batch: int, steps: int) -> list[float]:
    """Seconds of each decode step of a full batch. One prompt with `batch` choices, their pages unshared."""
    params = SamplingParams(n=batch, temperature=0, max_tokens=steps + 1, ignore_eos=True)
    engine.add_request(Request(f"d{time.monotonic_ns()}", tuple(prompt), params))
    times: list[float] = []
    while engine.has_work:
        decoding = len(engine.scheduler.running)
        if decoding == batch and not times:
            unshare(engine)
        start = time.perf_counter()
        engine.step()
        if decoding == batch:
            times.append(time.perf_counter() - start)
    return times


def unshare(engine: Engine) -> None:
    """Gives every choice but the first its own copy of the prompt's pages, as separate requests have."""
    for sequence in engine.scheduler.running[1:]:
        shared = sequence.retrieval_pages[: sequence.num_prefill // 64]
        copies = engine.retrieval_pool.allocate(len(shared))
        engine.cache.restore("retrieval", copies, engine.cache.export("retrieval", shared))
        engine.retrieval_pool.release(shared)
        sequence.retrieval_pages[: len(shared)] = copies


def reference_prefill(model: torch.nn.Module, prompt: list[int]) -> tuple[float, DynamicCache]:
    start = time.perf_counter()
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start, out.past_key_values


def reference_decode(model: torch.nn.Module, cache: DynamicCache, batch: int, steps: int) -> list[float]:
    grown = DynamicCache()
    for i, layer in enumerate(cache.layers):
        grown.update(layer.keys.repeat(batch, 1, 1, 1), layer.values.repeat(batch, 1, 1, 1), i)
    token, times = torch.ones(batch, 1, dtype=torch.int64), []
    for _ in range(steps):
        start = time.perf_counter()
        token = model(token, past_key_values=grown, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
    return times


def typical_ms(seconds: list[float], interval: int) -> float:
    """Mean over the steps of a reselect interval (one in four selects pages) of each one's median."""
    return statistics.fmean(statistics.median(seconds[i::interval]) for i in range(interval)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    engine = demo_engine(
        cache=CacheConfig(kv_dtype="int4"),
        sparsity=SparsityConfig(token_budget=1024),
        scheduler=SchedulerConfig(max_batch_size=8),
    )
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    prompt = engine.tokenizer.encode(long_text()[: args.tokens * 8])[: args.tokens]
    ours: dict[str, list[float]] = {"prefill": [], "batch 1": [], "batch 8": []}
    theirs: dict[str, list[float]] = {"prefill": [], "batch 1": [], "batch 8": []}
    with torch.inference_mode():
        engine_prefill(engine, prompt[:256])
        for _ in range(args.rounds):
            seconds, cache = reference_prefill(model, prompt)
            theirs["prefill"].append(seconds)
            ours["prefill"].append(engine_prefill(engine, prompt))
            for batch in (1, 8):
                theirs[f"batch {batch}"] += reference_decode(model, cache, batch, args.steps)
                ours[f"batch {batch}"] += engine_decode(engine, prompt, batch, args.steps)
            del cache
    rows, results = [], {}
    bars = {"prefill": "at most 1.15 times its time", "batch 1": "at least 1.3 x", "batch 8": "at least 5 x"}
    for name in ours:
        mine, other = typical_ms(ours[name], 1 if name == "prefill" else 4), typical_ms(theirs[name], 1)
        rows.append((name, f"{other:.0f}", f"{mine:.0f}", f"{other / mine:.2f} x", bars[name]))
        results[name] = {"transformers_ms": other, "lserve_ms": mine, "speedup": other / mine}
    print(f"{args.tokens} tokens of context, float32 weights, int4 pages, token budget 1024; medians, ms")
    print_table(("", "transformers", "lserve", "speed-up", "bar"), rows)
    report("cpu", {"tokens": args.tokens, "results": results}, args.write)


if __name__ == "__main__":
    main()
