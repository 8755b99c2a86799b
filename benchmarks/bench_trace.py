"""What a trace costs: processor time per token of an answer, with one and without, turn and turn about.

python benchmarks/bench_trace.py [--tokens 4000] [--budget 1024] [--rounds 3] [--write]
"""

import argparse
import statistics
import time

import torch
from common import demo_engine, long_text, print_table, report

from lserve.engine.config import SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.request import AttentionOptions, PageChoice, Request, SamplingParams

ANSWER_TOKENS = 33


def answer(engine: Engine, prompt: tuple[int, ...], trace: bool) -> tuple[float, list[PageChoice]]:
    """Milliseconds of processor time per token after the first, and the page choices."""
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    engine.add_request(Request(f"{time.monotonic_ns()}", prompt, params, AttentionOptions(trace=trace)))
    times, choices = [], []
    while engine.has_work:
        for output in engine.step().outputs:
            times.append(time.process_time())
            choices += output.trace
    return (times[-1] - times[0]) / (len(times) - 1) * 1e3, choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor time counts threads that wait
    engine = demo_engine(sparsity=SparsityConfig(token_budget=args.budget))
    prompt = tuple(engine.tokenizer.encode(long_text()[: args.tokens * 8])[: args.tokens])
    answer(engine, prompt, False)
    pairs, kept = [], 0.0
    for _ in range(args.rounds):
        plain, (traced, choices) = answer(engine, prompt, False)[0], answer(engine, prompt, True)
        pairs.append((plain, traced))
        masses = [choice.mass_kept for choice in choices if choice.mass_kept is not None]
        kept = statistics.mean(masses)
    print_table(("plain, ms", "traced, ms", "ratio"), [(f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}") for a, b in pairs])
    ratio = statistics.median(b / a for a, b in pairs)
    report("trace", {"tokens": args.tokens, "budget": args.budget, "ratio": ratio, "mass_kept": kept}, args.write)


if __name__ == "__main__":
    main()
