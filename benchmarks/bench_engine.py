"""The whole engine on one device: prefill and decode times by context and batch, and where a step's time goes.

Weights and pages are random, so no checkpoint is needed; work and traffic are those of a real model. Decode is one
`Engine.step`, host work and sampling included, averaged over a reselect interval (one step in it chooses pages).
Prefill is from `add_request` to the first token. The parts are device time, from torch's profiler; `host` is what is
left of the step. Beside each time stands the bar that it has to meet and vLLM 0.24's time (fp8 weights and cache), both
on an H200.

    python benchmarks/bench_engine.py --shape llama-3-8b --device cuda --weights w4a8 \\
        --decode 8Kx1,32Kx8,128Kx1,128Kx8,512Kx1 --prefill 32K,128K --prefill-sparse 128K --chunk 8192
    python benchmarks/bench_engine.py          # a tiny shape, seconds on a CPU
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, print_table
from device_parts import device_parts
from random_engine import SHAPES, random_engine, random_model

from lserve.engine.engine import Engine
from lserve.engine.request import AttentionOptions, Request, SampledToken, SamplingParams

BARS = {
    ("decode", 8192, 1): 3.6, ("decode", 32768, 8): 6.0, ("decode", 131072, 1): 3.8, ("decode", 131072, 8): 8.0,
    ("decode", 524288, 1): 4.2, ("prefill", 131072, 1): 7200.0, ("prefill, 25 % of blocks", 131072, 1): 4500.0,
}  # fmt: skip
"""Milliseconds that the Llama-3-8B shape may take at most on an H200."""
VLLM = {
    ("decode", 8192, 1): 4.53, ("decode", 32768, 8): 10.85, ("decode", 131072, 1): 7.33, ("decode", 131072, 8): 28.0,
    ("decode", 524288, 1): 16.38, ("prefill", 32768, 1): 850.0, ("prefill", 131072, 1): 8260.0,
}  # fmt: skip
MAX_TOKENS = 512
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=MAX_TOKENS, ignore_eos=True)


class Report:
    """Results, written to a file after each one, so that a run that is cut short leaves what it has measured."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self._header, self._results = path, header, list[dict[str, Any]]()
        self._has_bars = header["shape"] == "llama-3-8b" and "H200" in header["device"]

    def measure(
        self, what: str, kv_dtype: str, size: tuple[int, int], run: Callable[..., tuple[float, Any]], *arguments: Any
    ) -> None:
        """Runs one case, which returns milliseconds and, maybe, its parts. A failure is kept as its result."""
        context, batch = size
        entry: dict[str, Any] = {"what": what, "kv_dtype": kv_dtype, "context": context, "batch": batch}
        try:
            entry["ms"], parts = run(*arguments)
            if parts is not None:
                entry["parts"], entry["kernels"] = parts
                # what is profiled of a prefill is one chunk, not all of it
                if what.startswith("decode"):
                    entry["parts"]["host"] = entry["ms"] - sum(entry["parts"].values())
        except Exception:
            traceback.print_exc()
            entry["error"] = traceback.format_exc(limit=-2)
        if self._has_bars:
            bar, vllm = (table.get((what, context, batch)) for table in (BARS, VLLM))
            entry |= {"bar_ms": bar, "vllm_ms": vllm}
            if bar is not None:
                entry["met"] = entry.get("ms", float("inf")) <= bar
        self._results.append(entry)
        print(_cells(entry), flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._header | {"results": self._results}, indent=1) + "\n")

    def print(self) -> None:
        """Tables of times and parts, then one line of JSON."""
        header = ("what", "pages", "tokens", "ms", "bar", "vLLM")
        print_table(header, [_cells(entry) for entry in self._results])
        parted = [entry for entry in self._results if "parts" in entry]
        if parted:
            names = list(parted[0]["parts"])
            rows = [
                (*_cells(entry)[:3], *(f"{entry['parts'].get(name, 0.0):.3f}" for name in names)) for entry in parted
            ]
            print("\nmilliseconds of a step, or of a prefill's middle chunk:")
            print_table(("what", "pages", "tokens", *names), rows)
        print(json.dumps(self._header | {"results": [{**e, "kernels": None} for e in self._results]}))

    @property
    def failed(self) -> bool:
        """Whether any case failed."""
        return any("error" in entry for entry in self._results)


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    size = f"{entry['context']} x {entry['batch']}"
    times = [f"{entry[key]:.2f}" if entry.get(key) is not None else "" for key in ("ms", "bar_ms", "vllm_ms")]
    return (entry["what"], entry["kv_dtype"], size, *times)


def seat(engine: Engine, number: int, context: int, params: SamplingParams, dense: bool) -> Request:
    """A request whose prompt of `context` tokens is in the (random) pages; it decodes from now on."""
    request = Request(f"bench-{number}", (1,) * context, params, AttentionOptions(dense=dense))
    engine.add_request(request, hold=True)
    engine.step()
    engine.begin_decode(request.request_id, [SampledToken(1)], 0)
    return request


def decode(
    engine: Engine, context: int, batch: int, steps: int, profiled: bool, dense: bool, params: SamplingParams
) -> tuple[float, Any]:
    """Milliseconds of a step, mean over the median of each place in a reselect interval; and its parts."""
    requests = [seat(engine, number, context, params, dense) for number in range(batch)]
    interval = engine.config.sparsity.reselect_interval
    for _ in range(2 * interval):  # captures the CUDA graphs
        engine.step()
    times = []
    for _ in range(steps // interval * interval):
        start = time.perf_counter()
        outputs = engine.step().outputs
        times.append((time.perf_counter() - start) * 1e3)
        assert len(outputs) == batch
    parts = None
    if profiled:
        parts = device_parts(lambda: [engine.step() for _ in range(2 * interval)], 2 * interval)
    for request in requests:
        engine.abort(request.request_id)
    return statistics.mean(statistics.median(times[i::interval]) for i in range(interval)), parts


def prefill(engine: Engine, context: int, chunk: int, profiled: bool) -> tuple[float, Any]:
    """Milliseconds from a request to its first token; and the parts of a chunk in the prompt's middle."""
    chunk = min(chunk, context)
    done = 0
    while done < context:  # compiles what depends on the length
        one_chunk(engine, min(done, context - chunk), chunk, engine.step)
        done = max(2 * done, chunk)
    ms = first_token_ms(engine, context)
    parts = None
    if profiled:
        middle = context // 2 // chunk * chunk
        parts = one_chunk(engine, middle, chunk, lambda: device_parts(engine.step, 1))
    return ms, parts


def one_chunk(engine: Engine, start: int, chunk: int, run: Callable[[], Any]) -> Any:
    """Runs the step that computes a prompt's last chunk, after `start` tokens whose pages are random."""
    engine.add_request(Request("chunk", (1,) * (start + chunk), GREEDY), hold=True)
    engine.step()
    engine.reserve_window("chunk", start)
    engine.begin_prefill("chunk", start)
    result = run()
    engine.abort("chunk")
    return result


def first_token_ms(engine: Engine, context: int) -> float:
    prompt = torch.randint(0, engine.model_config.vocab_size, (context,)).tolist()
    start = time.perf_counter()
    engine.add_request(Request("prompt", tuple(prompt), GREEDY))
    while not engine.step().outputs:
        pass
    ms = (time.perf_counter() - start) * 1e3
    engine.abort("prompt")
    return ms


def size(text: str) -> int:
    """128K is 131072."""
    return int(text[:-1]) * 1024 if text.endswith("K") else int(text)


def sizes(text: str) -> list[int]:
    return [size(part) for part in text.split(",") if part]


def cases(text: str) -> list[tuple[int, int]]:
    return [(size(c), int(b)) for c, b in (case.split("x") for case in text.split(",") if case)]


def _tokens(wanted: list[tuple[int, int]]) -> int:
    return max(((context + MAX_TOKENS) * batch for context, batch in wanted), default=0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="native")
    parser.add_argument("--kv-dtype", default="int4")
    parser.add_argument("--token-budget", type=size, default=8192)
    parser.add_argument("--no-streaming", dest="streaming", action="store_false", help="all heads keep all history")
    parser.add_argument("--decode", type=cases, default=cases("2Kx1,8Kx2"), help="context x batch, ...")
    parser.add_argument("--dense", type=cases, default=[], help="decode cases without a budget")
    parser.add_argument("--sampled", type=cases, default=[], help="decode cases drawn with temperature 0.8, top_p 0.9")
    parser.add_argument("--prefill", type=sizes, default=[4096])
    parser.add_argument("--prefill-sparse", type=sizes, default=[], help="prefills with the block estimator")
    parser.add_argument("--prefill-budget", type=float, default=0.25, help="share of the blocks that it keeps")
    parser.add_argument("--chunk", type=size, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--sweep-kv", default="", help="further kv_dtypes, for the cases of --sweep")
    parser.add_argument("--sweep", type=cases, default=[])
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="times only")
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    parser.add_argument("--output", type=Path, help="JSON file, written after each case")
    parser.add_argument("--write", action="store_true", help="the same, to benchmarks/results/engine.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    header = {
        "benchmark": "engine",
        **environment(args.commit),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "shape": args.shape,
        "weights": args.weights,
        "budget": args.token_budget,
        "streaming": "half of the heads" if args.streaming else "none",
        "chunk": args.chunk,
    }
    profiled = args.parts and args.device == "cuda"
    report = Report(args.output or (RESULTS / "engine.json" if args.write else None), header)
    model = random_model(args.shape, args.device, args.weights)

    def build(kv_dtype: str, tokens: int, prefill_budget: float | None = None) -> Engine:
        options = (args.chunk, args.token_budget, args.streaming, prefill_budget)
        return random_engine(model, args.weights, kv_dtype, tokens + MAX_TOKENS, *options)

    kinds = [("decode", args.decode), ("decode dense", args.dense), ("decode, top_p 0.9", args.sampled)]
    engine = build(args.kv_dtype, max([_tokens(wanted) for _, wanted in kinds] + args.prefill))
    for what, wanted in kinds:
        options = (args.steps, profiled, what == "decode dense", SAMPLED if "top_p" in what else GREEDY)
        for case in wanted:
            report.measure(what, args.kv_dtype, case, decode, engine, *case, *options)
    for length in args.prefill:
        report.measure("prefill", args.kv_dtype, (length, 1), prefill, engine, length, args.chunk, profiled)
    del engine
    for length in args.prefill_sparse:
        what = f"prefill, {args.prefill_budget * 100:.0f} % of blocks"
        engine = build(args.kv_dtype, length, args.prefill_budget)
        report.measure(what, args.kv_dtype, (length, 1), prefill, engine, length, args.chunk, profiled)
        del engine
    for kv_dtype in [name for name in args.sweep_kv.split(",") if name]:
        engine = build(kv_dtype, _tokens(args.sweep))
        for case in args.sweep:
            report.measure("decode", kv_dtype, case, decode, engine, *case, args.steps, profiled, False, GREEDY)
        del engine
    report.print()
    if report.failed:
        raise SystemExit("a case failed")


if __name__ == "__main__":
    main()
