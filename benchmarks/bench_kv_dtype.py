"""Bits per character of real text, per kv_dtype, against float32 pages.

The text is cut into passages; the first part of each is context, the rest is scored token by token by prefill, where
every token reads the earlier pages as they decode (DESIGN: prefill and decode compute the same function).

    python benchmarks/bench_kv_dtype.py [--tokens 6000] [--passages 2] [--write]
"""

import argparse
import math
from collections.abc import Iterable

import torch
from common import demo_engine, long_text, print_table, report

from lserve.engine.attention import PrefillStep
from lserve.engine.config import CacheConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.request import Request
from lserve.engine.sequence import PrefillChunk, Sequence

BOUNDS = {"int8": 0.1, "k8v4": 0.5, "int4": 1.0}


@torch.inference_mode()
def negative_log_likelihood(engine: Engine, tokens: list[int], scored_from: int, chunk: int = 1024) -> float:
    """Sum over tokens[scored_from:] of -log2 p(token | all before), through the engine's own pages."""
    request = Request("score", tuple(tokens))
    sequence = Sequence(request, 0, tokens, len(tokens))
    sequence.row = engine.row_pool.allocate(1)[0]
    sequence.retrieval_pages = engine.retrieval_pool.allocate(len(tokens) // 64 + 1)
    total = 0.0
    for start in range(0, len(tokens), chunk):
        part = PrefillChunk(sequence, start, min(chunk, len(tokens) - start))
        step = PrefillStep(engine.cache, engine.config.sparsity, [part])
        positions = torch.arange(part.start, part.end)
        hidden = engine.runner.model.forward(torch.tensor(tokens[part.start : part.end]), positions, step)
        first = max(scored_from - 1, part.start)
        last = min(part.end, len(tokens) - 1)
        if first < last:
            log_probs = engine.runner.model.logits(hidden[first - start : last - start]).log_softmax(-1)
            targets = torch.tensor(tokens[first + 1 : last + 1])
            total -= log_probs.gather(1, targets[:, None]).double().sum().item() / math.log(2)
    engine.retrieval_pool.release(sequence.retrieval_pages)
    engine.row_pool.release([sequence.row])
    return total


def compare(
    name: str, engines: Iterable[tuple[str, Engine]], bounds: dict[str, float], args: argparse.Namespace
) -> None:
    """Prints, and reports under `name`, bits per character of each engine beside the first one's."""
    text, rows, results, base = long_text(args.text), [], {}, 0.0
    for choice, engine in engines:
        bits = characters = 0.0
        for passage in range(args.passages):
            start = len(text) * passage // args.passages
            ids = engine.tokenizer.encode(text[start:][: args.tokens * 8])[: args.tokens]
            bits += negative_log_likelihood(engine, ids, len(ids) // 2)
            characters += len(engine.tokenizer.decode(ids[len(ids) // 2 :]))
        value = bits / characters
        base = base or value
        rise, bound = (value / base - 1) * 100, bounds.get(choice)
        verdict = "" if bound is None else f"{'within' if rise <= bound else 'OVER'} {bound} %"
        rows.append((choice, f"{value:.4f}", f"{rise:+.3f} %", verdict))
        results[choice] = {"bits_per_character": value, "rise_percent": rise}
    print(f"bits per character, {args.passages} passages of {args.tokens} tokens, second half of each scored")
    print_table((name, "bits/char", "rise", "bound"), rows)
    report(name, {"tokens": args.tokens, "passages": args.passages, "results": results}, args.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--kv-dtypes", default="float32,int8,k8v4,int4")
    parser.add_argument("--text")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    engines = (
        (
            kv_dtype,
            demo_engine(
                cache=CacheConfig(kv_dtype=kv_dtype, prefix_cache=False),
                sparsity=SparsityConfig(token_budget=None),
                scheduler=SchedulerConfig(max_batch_size=1),
            ),
        )
        for kv_dtype in args.kv_dtypes.split(",")
    )
    compare("kv_dtype", engines, BOUNDS, args)


if __name__ == "__main__":
    main()
