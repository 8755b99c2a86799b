"""Bits per character of real text, per weight format, against native weights.

Everything else is equal: float32 pages, everything read, the second half of each passage scored.

    python benchmarks/bench_weights.py [--tokens 3000] [--passages 2] [--write]
"""

import argparse

from bench_kv_dtype import negative_log_likelihood
from common import demo_engine, long_text, print_table, report

from lserve.engine.config import CacheConfig, SchedulerConfig, SparsityConfig

BOUNDS = {"fp8": 0.5, "int8": 0.7, "w4a8": 3.0}


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--weights", default="native,fp8,int8,w4a8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    text = long_text(args.text)
    rows, results, base = [], {}, 0.0
    for weights in args.weights.split(","):
        engine = demo_engine(
            weights=weights,
            device=args.device,
            cache=CacheConfig(kv_dtype="float32", prefix_cache=False),
            sparsity=SparsityConfig(token_budget=None),
            scheduler=SchedulerConfig(max_batch_size=1),
        )
        bits = characters = 0.0
        for passage in range(args.passages):
            start = len(text) * passage // args.passages
            ids = engine.tokenizer.encode(text[start:][: args.tokens * 8])[: args.tokens]
            bits += negative_log_likelihood(engine, ids, len(ids) // 2)
            characters += len(engine.tokenizer.decode(ids[len(ids) // 2 :]))
        value = bits / characters
        base = base or value
        rise = (value / base - 1) * 100
        bound = BOUNDS.get(weights)
        verdict = "" if bound is None else f"{'within' if rise <= bound else 'OVER'} {bound} %"
        rows.append((weights, f"{value:.4f}", f"{rise:+.3f} %", verdict))
        results[weights] = {"bits_per_character": value, "rise_percent": rise}
    print(f"bits per character, {args.passages} passages of {args.tokens} tokens, second half of each scored")
    print_table(("weights", "bits/char", "rise", "bound"), rows)
    report("weights", {"tokens": args.tokens, "passages": args.passages, "results": results}, args.write)


if __name__ == "__main__":
    main()
