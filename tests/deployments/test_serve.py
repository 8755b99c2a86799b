"""The router under real Ray Serve and real HTTP, before stub workers that can be killed."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from running_cluster import eventually
from stub_application import deploy, prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on import

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = {"model": "stub", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Two stub workers that write a letter every 20 ms."""
    prepare()
    import ray
    from ray import serve

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield deploy(decode={"replicas": 2, "num_cpus": 0})
    serve.shutdown()
    ray.shutdown()


def ask_workers(method: str) -> list[Any]:
    """What each live stub worker answers."""
    from ray import serve

    answers = serve.get_deployment_handle("StubWorker", "stub").broadcast(method).results(return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, Exception)]


def running() -> list[int]:
    """How many requests each live worker has."""
    return [load.running for load in ask_workers("load")]


def test_health_models_and_answers(url: str) -> None:
    eventually(lambda: httpx.get(f"{url}/health").status_code == 200, 10)
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "stub"
    reply = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 26}).json()
    assert reply["choices"][0]["message"]["content"] == LETTERS


def test_calls_of_one_request_do_not_take_each_others_place(url: str) -> None:
    for _ in range(4):
        body = {"model": "stub", "prompt": ["hi"] * 16, "max_tokens": 2}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=20).json()
        assert [choice["text"] for choice in reply["choices"]] == ["ab"] * 16


@pytest.mark.parametrize("status", [413, 429, 500])
def test_what_a_worker_raises_becomes_its_status(url: str, status: int) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "seed": status, "stream": True})
    assert response.status_code == status
    assert ("retry-after" in response.headers) is (status == 429)


def test_requests_go_to_the_worker_with_the_fewest_pages(url: str) -> None:
    parts = []  # an iterator that nobody holds any more closes its stream
    with httpx.Client() as client, ExitStack() as streams:
        for _ in range(4):
            body = {**CHAT, "max_tokens": 1000, "stream": True}
            response = streams.enter_context(client.stream("POST", f"{url}/v1/chat/completions", json=body))
            parts.append(response.iter_raw())
            next(parts[-1])
        assert running() == [2, 2]


def test_a_client_that_leaves_ends_the_work_within_a_second(url: str) -> None:
    eventually(lambda: sum(running()) == 0, 1)
    body = {**CHAT, "max_tokens": 5000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        parts = response.iter_raw()
        next(parts)
        assert sum(running()) == 1
    eventually(lambda: sum(running()) == 0, 1)


def test_a_client_that_leaves_without_streaming_ends_the_work_too(url: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": 5000}, timeout=0.3)
    eventually(lambda: sum(running()) == 0, 1)


def test_a_worker_killed_in_mid_stream_goes_unnoticed(url: str) -> None:
    body = {"model": "stub", "prompt": "x", "max_tokens": 104, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        read = [next(lines) for _ in range(9)]
        (busy,) = [pid for count, pid in ask_workers("process_id") if count]
        os.kill(busy, signal.SIGKILL)
        read += list(lines)
    *events, done = [line.removeprefix("data: ") for line in read if line]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == 4 * LETTERS
    assert choices[-1]["finish_reason"] == "length"
    eventually(lambda: sum(running()) == 0, 1)


def test_the_nodes_metrics_are_passed_on(url: str) -> None:
    eventually(lambda: "lserve_time_to_first_token_seconds_bucket" in httpx.get(f"{url}/metrics").text, 20)
    names = {line.split("{")[0] for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("lserve_")}
    assert {"lserve_requests_total", "lserve_running_requests"} <= names
