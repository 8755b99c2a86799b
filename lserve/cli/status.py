"""`lserve status`: how a running cluster is doing, from its own endpoints."""

import argparse
from collections import defaultdict
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from lserve.engine.errors import LServeError

Samples = Mapping[str, Mapping[str, float]]
"""Metric name to label value (that of `state` or `tier`, else "") to the sum over everything else."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `status` to the command line."""
    parser = commands.add_parser("status", allow_abbrev=False, help="show how a running cluster is doing")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.set_defaults(run=run, takes_settings=False)


def run(options: argparse.Namespace) -> int:
    """Prints the state; 0 when tokens can be served, else 1. Raises LServeError when nothing answers."""
    url = options.url.rstrip("/")
    with httpx.Client(base_url=url, timeout=10.0) as client:
        try:
            health = client.get("/health")
            models = client.get("/v1/models")
            metrics = client.get("/metrics")
        except httpx.HTTPError as error:
            raise LServeError(f"no answer from {url}: {error or type(error).__name__}") from None
    healthy = health.status_code == 200
    table = Table(show_header=False, box=None)
    table.add_row("health", "ready" if healthy else f"not ready ({health.status_code})")
    if models.status_code == 200:
        table.add_row("model", ", ".join(model["id"] for model in models.json()["data"]))
    for name, value in summary(read_samples(metrics.text if metrics.status_code == 200 else "")):
        table.add_row(name, value)
    Console(highlight=False).print(table)
    return 0 if healthy else 1


def read_samples(text: str) -> Samples:
    """LServe's gauges and counters out of a Prometheus page."""
    samples: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # workers count the choices they run, the router counts requests: the latter are what a user sees
            of_worker = sample.name.endswith("_requests") and sample.labels.get("deployment", "Router") != "Router"
            if sample.name.startswith("lserve_") and not of_worker:
                samples[sample.name][sample.labels.get("state") or sample.labels.get("tier") or ""] += sample.value
    return samples


def summary(samples: Samples) -> list[tuple[str, str]]:
    """(what, value) lines; what was not measured yet is left out."""
    lines = []
    for label, name in (
        ("running requests", "lserve_running_requests"),
        ("waiting requests", "lserve_waiting_requests"),
    ):
        if name in samples:
            lines.append((label, f"{sum(samples[name].values()):.0f}"))
    for label, name in (("pages", "lserve_kv_pages"), ("leases", "lserve_leases")):
        if samples.get(name):
            lines.append((label, ", ".join(f"{count:.0f} {state}" for state, count in sorted(samples[name].items()))))
    tiers = samples.get("lserve_prefix_tokens_total", {})
    total = sum(tiers.values())
    if total:
        hit = ", ".join(f"{count / total:.0%} {tier}" for tier, count in sorted(tiers.items()))
        lines.append(("prompt tokens", f"{total:.0f}: {hit}"))
    return lines
