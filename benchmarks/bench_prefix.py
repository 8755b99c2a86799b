"""What a prefix in Redis saves: time to the first token of a long prompt, over HTTP, through the whole cluster.

    python benchmarks/bench_prefix.py [--tokens 6000] [--prompts 3] [--write] [--model PATH] [--SECTION.KEY VALUE ...]

- cold: no worker and no Redis has seen the prompt.
- redis: every worker was stopped and started again, so that its pool is empty; Redis has the prompt's pages.
- pool: the same prompt once more; the workers have its pages.

Medians over the prompts, one request at a time, each on a connection of its own. The bar: redis is at least 20 times
faster than cold. Prints a table and one line of JSON.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # for the replicas
sys.path.insert(0, str(ROOT))

from lserve.deployments import serve_environment  # noqa: E402

serve_environment.apply()

from common import long_text, print_table, report  # noqa: E402

from lserve.cli.ask import wait_until_ready  # noqa: E402
from lserve.cli.local_cluster import local_ray, serving  # noqa: E402
from lserve.cli.local_settings import local_settings  # noqa: E402
from lserve.cli.main import split_settings  # noqa: E402
from lserve.deployments.embedded_valkey import EmbeddedValkey  # noqa: E402

READY_TIMEOUT_S = 180.0


def first_token(url: str, model: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds from sending a streamed completion to its first event with a token, and the prompt's cached tokens."""
    body: dict[str, object] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    body["stream_options"] = {"include_usage": True}
    first, cached = 0.0, 0
    started = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - started
            usage = json.loads(line.removeprefix("data: ")).get("usage")
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
    return first, cached


def prompts(url: str, num_tokens: int, num_prompts: int) -> list[list[int]]:
    """Different pieces of real text, in tokens."""
    reply = httpx.post(f"{url}/tokenize", json={"prompt": long_text()}, timeout=60, trust_env=False)
    ids: list[int] = reply.raise_for_status().json()["tokens"]
    return [ids[start : start + num_tokens] for start in range(0, num_prompts * num_tokens, num_tokens)]


def main() -> None:
    """Runs it."""
    rest, overrides = split_settings(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    options = parser.parse_args(rest)
    os.environ["LSERVE_CLUSTER_SECRET"] = secrets.token_hex(32)
    times: dict[str, list[float]] = {"cold": [], "redis": [], "pool": []}
    cached: dict[str, set[int]] = {name: set() for name in times}

    def measure(name: str, url: str, prompt: list[int]) -> None:
        seconds, tokens = first_token(url, settings.served_name, prompt)
        times[name].append(seconds)
        cached[name].add(tokens)

    with EmbeddedValkey() as valkey:
        settings = local_settings(None, options.model, [f"redis.url={valkey.url}", "router.port=8137", *overrides])
        with local_ray(settings):
            for names in (("cold",), ("redis", "pool")):
                with serving(settings) as url:
                    wait_until_ready(url, READY_TIMEOUT_S)
                    for prompt in prompts(url, 500, 2):
                        first_token(url, settings.served_name, prompt[::-1])  # what only the first request costs
                    for prompt in prompts(url, options.tokens, options.prompts):
                        for name in names:
                            measure(name, url, prompt)
                stop()
    medians = {name: statistics.median(values) for name, values in times.items()}
    assert cached["cold"] == {0} and min(cached["redis"]) > options.tokens - 256, cached
    rows = [
        (name, f"{value * 1000:.0f}", f"{medians['cold'] / value:.1f}", *sorted(cached[name]))
        for name, value in medians.items()
    ]
    print_table(("prefix", "TTFT ms", "times faster", "cached tokens"), rows)
    results: dict[str, object] = {f"ttft_{name}_ms": round(value * 1000, 1) for name, value in medians.items()}
    results["speedup_redis"] = round(medians["cold"] / medians["redis"], 1)
    report("prefix", {"tokens": options.tokens, "prompts": options.prompts, **results}, options.write)


def stop() -> None:
    """Ends the application, workers and all."""
    from ray import serve

    from lserve.cli.local_cluster import APPLICATION

    serve.delete(APPLICATION)


if __name__ == "__main__":
    main()
