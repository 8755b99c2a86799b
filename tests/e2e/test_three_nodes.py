"""A head, a prefill and a decode node, each a host of its own, and Redis on a fourth: pages travel over TCP."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from namespaces import Network, wait_for, why_not
from ray_hosts import RayHosts

from lserve.cli.demo_model import SERVED_NAME, demo_model

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
DEADLINE_S, PREFILL_TIMEOUT_S = 90.0, 10.0
PAGE_BYTES = 400_000
"""Of the demo model at int4, at least."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    """The demo model on three Ray nodes."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    settings = {
        "model": {"path": str(demo_model()), "served_name": SERVED_NAME},
        "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 256 << 20},
        "sparsity": {"token_budget": 1024},
        "prefill": {
            "local_threshold": 0,
            "chunk_size": 128,
            "timeout_s": PREFILL_TIMEOUT_S,
            "lease_s": PREFILL_TIMEOUT_S,
            "resources": {"lserve_prefill": 1},
        },
        "decode": {"max_batch_size": 8, "resources": {"lserve_decode": 1}},
        "router": {"request_timeout_s": DEADLINE_S, "resources": {"lserve_router": 1}},
    }
    with (
        TemporaryDirectory(prefix="lsv-", dir="/tmp") as folder,
        Network("head", "prefill", "decode", "redis") as network,
    ):
        hosts = RayHosts(network, Path(folder))
        for name in ("redis", "head", "prefill", "decode"):
            hosts.start(name)
        hosts.deploy(settings)
        hosts.wait_until_ready()
        yield hosts


def ask(cluster: RayHosts, text: str) -> httpx.Response:
    """A greedy answer."""
    messages = [{"role": "user", "content": f"{text}\n\nWhat kind of text is this?"}]
    body: dict[str, Any] = {"model": SERVED_NAME, "messages": messages, "temperature": 0, "max_tokens": 16}
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=DEADLINE_S + 30)


def test_a_request_crosses_the_nodes_and_its_pages_travel_over_tcp(
    cluster: RayHosts, record_property: Callable[[str, object], None]
) -> None:
    sent, received = (cluster.hosts[name].bytes_sent for name in ("prefill", "redis"))
    first = ask(cluster, LICENSE[:5000]).json()
    pages = first["usage"]["prompt_tokens"] // 64
    moved = cluster.hosts["prefill"].bytes_sent - sent
    record_property("bytes_from_prefill", moved)
    assert moved > pages * PAGE_BYTES * 2  # to the decode worker, and to Redis
    again = ask(cluster, LICENSE[:5000]).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 896
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    assert cluster.hosts["redis"].bytes_sent > received  # it answered


def test_a_cable_that_is_cut_in_mid_prefill_costs_time_only(
    cluster: RayHosts, record_property: Callable[[str, object], None]
) -> None:
    """Last: the prefill node is not there any more."""
    prefill, text = cluster.hosts["prefill"], LICENSE[1000:10_000]
    replies: list[httpx.Response] = []
    started, before = time.monotonic(), prefill.bytes_sent
    request = threading.Thread(target=lambda: replies.append(ask(cluster, text)))
    request.start()
    wait_for(lambda: prefill.bytes_sent - before > 4 * PAGE_BYTES, 60, "the first chunks' pages")
    prefill.set_link("down")
    request.join()
    took = time.monotonic() - started
    assert took < DEADLINE_S + 5
    disturbed = replies[0].json()
    record_property("status", replies[0].status_code)
    record_property("answered_after_s", round(took, 1))
    if replies[0].status_code != 200:
        assert disturbed["error"]["type"] and replies[0].status_code in (503, 504)
    undisturbed = ask(cluster, text).json()
    if replies[0].status_code == 200:
        assert disturbed["choices"][0]["message"] == undisturbed["choices"][0]["message"]
