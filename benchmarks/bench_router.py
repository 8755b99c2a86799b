"""What HTTP, the router and Ray Serve add around an engine: a stub worker stands in for it.

    python benchmarks/bench_router.py [--streams 32] [--tokens 500] [--interval-ms 5] [--requests 200]

- added TTFT: from sending a streamed chat request to its first token, with a worker that answers at once; one request
  at a time on a connection that stays open. Everything measured is overhead. The bar is 15 ms.
- tokens/s: that many streams at once, each from a worker that never waits for anybody (`fast`), and from one that makes
  a token every 5 ms per stream, as a fast engine does (`paced`: 6,400 tokens/s are offered). The bar is 2,000 tokens/s.

Prints a table and one JSON line. Ray Serve runs as `lserve up` sets it up; what the environment says goes before that,
for comparing (RAY_SERVE_THROUGHPUT_OPTIMIZED=0 is Ray Serve as it comes).
"""

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

import httpx
import ray
from ray import serve

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "tests" / "deployments")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # for the replicas

from fake_pool import ByteTokenizer  # noqa: E402
from stub_worker import StubWorker  # noqa: E402

from lserve.deployments import serve_environment  # noqa: E402
from lserve.deployments.app import bind_router, worker  # noqa: E402
from lserve.deployments.settings import load_settings  # noqa: E402

CHAT = {"model": "stub", "messages": [{"role": "user", "content": "Say something."}], "stream": True}


def start(interval_s: float, port: int) -> str:
    """The real application with a stub for its decode worker; returns its URL."""
    settings = load_settings({"model": {"path": "stub", "served_name": "stub"}, "router": {"port": port}})
    decode = worker(StubWorker, settings.decode.model_copy(update={"num_cpus": 0.0})).bind(interval_s)
    serve.run(bind_router(settings, decode, ByteTokenizer()), name="bench", route_prefix="/")
    return f"http://127.0.0.1:{port}"


async def first_token_s(client: httpx.AsyncClient) -> float:
    """Seconds from sending a request to the first byte of its first event."""
    started = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 1}) as response:
        response.raise_for_status()
        async for _ in response.aiter_raw():
            return time.perf_counter() - started
    raise AssertionError("no event came")


async def measure_first_token(url: str, requests: int) -> list[float]:
    """Added TTFT of each request, sorted, in milliseconds."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(20):
            await first_token_s(client)
        return sorted([1000 * await first_token_s(client) for _ in range(requests)])


async def measure_streams(url: str, streams: int, tokens: int) -> tuple[float, int]:
    """(tokens per second of all streams together, events received) for that many streams of that many tokens."""

    async def read(client: httpx.AsyncClient) -> int:
        events = 0
        async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": tokens}) as response:
            response.raise_for_status()
            text = b""
            async for part in response.aiter_raw():
                text += part
                events += part.count(b"data: {")
        assert text.endswith(b"data: [DONE]\n\n"), text[-200:]
        return events

    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(read(client) for _ in range(streams)))  # connections and code paths are warm after this
        started = time.perf_counter()
        events = await asyncio.gather(*(read(client) for _ in range(streams)))
        return streams * tokens / (time.perf_counter() - started), sum(events)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500, help="per stream")
    parser.add_argument("--interval-ms", type=float, default=5.0, help="between two tokens of a paced stream")
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()

    serve_environment.apply()
    port = free_port()
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        url = start(0.0, port)
        ttft = asyncio.run(measure_first_token(url, arguments.requests))
        fast, fast_events = asyncio.run(measure_streams(url, arguments.streams, arguments.tokens))
        url = start(arguments.interval_ms / 1000, port)
        paced, paced_events = asyncio.run(measure_streams(url, arguments.streams, arguments.tokens))
    finally:
        serve.shutdown()
        ray.shutdown()
    p50, p99 = statistics.median(ttft), ttft[int(len(ttft) * 0.99)]
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("RAY_SERVE_")}
    print(f"{'':36}{'measured':>12}{'bar':>10}")
    print(f"{'added TTFT, p50 (ms)':36}{p50:12.2f}{'< 15':>10}")
    print(f"{'added TTFT, p99 (ms)':36}{p99:12.2f}")
    for name, rate, events in (("fast", fast, fast_events), ("paced", paced, paced_events)):
        label = f"{arguments.streams} streams, {name} (tokens/s)"
        per_event = arguments.streams * arguments.tokens / events
        print(f"{label:36}{rate:12.0f}{'>= 2000':>10}   {per_event:.1f} tokens per event")
    result = {
        "benchmark": "router",
        "added_ttft_p50_ms": round(p50, 2),
        "added_ttft_p99_ms": round(p99, 2),
        "streams": arguments.streams,
        "fast_tokens_per_s": round(fast),
        "paced_tokens_per_s": round(paced),
        "interval_ms": arguments.interval_ms,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "ray": ray.__version__,
        "environment": variables,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
