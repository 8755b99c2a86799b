"""Bits per character of real text, per weight format, against native weights.

Everything else is equal: float32 pages, everything read, the second half of each passage scored.

    python benchmarks/bench_weights.py [--tokens 3000] [--passages 2] [--write]
"""

import argparse

from bench_kv_dtype import compare
from common import demo_engine

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
    engines = (
        (
            weights,
            demo_engine(
                weights=weights,
                device=args.device,
                cache=CacheConfig(kv_dtype="float32", prefix_cache=False),
                sparsity=SparsityConfig(token_budget=None),
                scheduler=SchedulerConfig(max_batch_size=1),
            ),
        )
        for weights in args.weights.split(",")
    )
    compare("weights", engines, BOUNDS, args)


if __name__ == "__main__":
    main()
