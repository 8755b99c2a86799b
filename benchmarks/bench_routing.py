"""Prefix-aware routing against random and round-robin, where prefill is the bottleneck.

    python benchmarks/bench_routing.py [--requests 2000] [--write]

Four prefill and four decode workers without engines, in virtual time (tests/deployments/stub_fleet.py says what their
times are): the choices, hashes and resume points are LServe's own. Workloads:

- shared: questions about 64 documents of 16,384 tokens, Poisson arrivals. One worker's prefix cache holds 24 of them.
  With `redis`, pages that a worker lacks are fetched, at 2 GB/s for all workers together.
- single: prompts of 2,000 to 30,000 tokens that have nothing in common.

The bar: with shared prefixes a p90 of TTFT at least 2 times lower than the better of the others, and not above it
without. Prints a table and one JSON line.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests" / "deployments")]

from common import print_table, report  # noqa: E402
from stub_fleet import Outcome, Policy, play, shared_prefixes, single_prompts  # noqa: E402

POLICIES: tuple[Policy, ...] = ("prefix-aware", "random", "round-robin")
SHARED_RATES, SINGLE_RATE = (12.0, 20.0), 4.5


def main() -> None:
    """Plays every workload under every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    workloads = [(f"shared {rate:g}/s", shared_prefixes(arguments.requests, rate, seed=1)) for rate in SHARED_RATES]
    cases = [
        (f"{name}{', redis' * has_redis}", prompts, has_redis) for name, prompts in workloads for has_redis in (0, 1)
    ]
    cases.append((f"single {SINGLE_RATE:g}/s", single_prompts(arguments.requests, SINGLE_RATE, seed=1), 0))
    rows: list[tuple[object, ...]] = []
    results: dict[str, object] = {"requests": arguments.requests}
    for name, prompts, has_redis in cases:
        outcomes = {policy: play(policy, prompts, bool(has_redis)) for policy in POLICIES}
        ratio = advantage(outcomes)
        for policy, outcome in outcomes.items():
            times = f"{outcome.ttft_p50_s:.2f}", f"{outcome.ttft_p90_s:.2f}"
            bar = "" if policy != "prefix-aware" else f"{ratio:.1f} ({'>= 1' if name.startswith('single') else '>= 2'})"
            rows.append((name, policy, f"{100 * outcome.hit_rate:.1f} %", *times, bar))
        results[name] = {policy: asdict(outcome) for policy, outcome in outcomes.items()} | {"p90_ratio": ratio}
    print_table(("workload", "policy", "hits", "TTFT p50 (s)", "p90 (s)", "times lower p90 (bar)"), rows)
    report("routing", results, arguments.write)


def advantage(outcomes: dict[Policy, Outcome]) -> float:
    """How many times lower the p90 is than the better of the other policies'."""
    others = min(outcomes[policy].ttft_p90_s for policy in POLICIES[1:])
    return others / outcomes["prefix-aware"].ttft_p90_s


if __name__ == "__main__":
    main()
