"""A node leaves a Ray cluster of three while requests stream: real Ray, real Serve, stub workers."""

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from stub_application import deploy, prepare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's own, on import
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_STREAMS = 4


@pytest.fixture
def url() -> Iterator[str]:
    """Two nodes that may hold the one worker, and a head that holds proxy and router."""
    prepare()
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "resources": {"head": 1}, "include_dashboard": True}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, resources={"lserve_decode": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield deploy(
        decode={"replicas": 1, "num_cpus": 0, "resources": {"lserve_decode": 1}},
        router={"replicas": 1, "resources": {"head": 1}},
    )
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def stream(url: str, num_tokens: int) -> str:
    body = {"model": "stub", "prompt": "x", "max_tokens": num_tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        *events, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert done == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def home() -> str:
    """The id of the node that the worker runs on."""
    import ray
    from ray.util.state import list_actors

    (node,) = {
        actor.node_id
        for actor in list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
        if actor.class_name.endswith("StubWorker")
    }
    return node


def test_a_node_that_is_drained_breaks_no_stream(url: str) -> None:
    from lserve.deployments.node_drain import drain_node, serving_actors

    first = home()
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(stream(url, 260))) for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    assert drain_node(first, timeout_s=60)
    print(f"drained in {time.monotonic() - start:.1f} s")
    assert serving_actors(first) == []
    for thread in threads:
        thread.join()
    assert texts == [10 * LETTERS] * NUM_STREAMS
    assert home() != first
    assert stream(url, 26) == LETTERS
