"""What an operator sees: a real Prometheus finds data for every panel, and a trace has a span for every stage."""

import json
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus import program
from running_cluster import RunningCluster, eventually, free_port
from trace_collector import TraceCollector

DASHBOARD = Path(__file__).parents[2] / "k8s" / "overlays" / "monitoring" / "lserve-dashboard.json"
RATE_INTERVAL = "2m"


@pytest.fixture
def prometheus(running: RunningCluster, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes every node of the running cluster."""
    import ray

    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    jobs = [{"job_name": "lserve", "static_configs": [{"targets": targets}]}]
    config = tmp_path / "prometheus.yaml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    address = f"127.0.0.1:{free_port()}"
    command = [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            eventually(lambda: _answers(f"http://{address}/-/ready"), 30)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(20)


def test_every_panel_has_data(running: RunningCluster, prometheus: str) -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    queries = {target["expr"]: panel["title"] for panel in panels for target in panel["targets"]}
    assert len(queries) > 30
    question = " ".join(f"Line {number} says nothing of note." for number in range(200))
    deadline = time.monotonic() + 150
    lacking = dict(queries)
    while lacking and time.monotonic() < deadline:
        _ask(running, question)
        lacking = {query: title for query, title in lacking.items() if not _result(prometheus, query)}
    assert not lacking


def test_a_request_is_one_trace_with_a_span_for_every_stage(running: RunningCluster, collector: TraceCollector) -> None:
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    _ask(running, f"How far is it to the moon? {trace_id}", traceparent=f"00-{trace_id}-{caller}-01")
    stages = {"request", "queue", "prefix_lookup", "prefill", "transfer", "decode"}
    eventually(lambda: stages <= collector.of(trace_id).keys(), 30)
    spans = collector.of(trace_id)
    (root,) = spans.pop("request")
    assert root.parent_span_id.hex() == caller
    for span in (span for group in spans.values() for span in group):
        assert span.parent_span_id == root.span_id
        assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano


def _ask(running: RunningCluster, question: str, **headers: str) -> None:
    body = {
        "model": running.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 4,
    }
    httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=120).raise_for_status()


def _result(prometheus: str, query: str) -> list[object]:
    """What a panel's query gives now, series without a number left out."""
    query = query.replace("$__rate_interval", RATE_INTERVAL)
    assert not re.search(r"\$\w", query)
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).raise_for_status().json()
    return [series for series in answer["data"]["result"] if series["value"][1] != "NaN"]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
