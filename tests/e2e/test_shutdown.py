"""The end of the running cluster. After the other files of this folder that use it: nothing is served afterwards."""

import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_cluster import RunningCluster, eventually

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.mark.slow
def test_a_cluster_that_is_shut_down_finishes_what_it_began(running: RunningCluster) -> None:
    text = f"{LICENSE[3000:10_000]}\n\nWhat kind of text is this?"
    messages = [{"role": "user", "content": text}]
    body = {"model": running.model, "messages": messages, "max_tokens": 24, "ignore_eos": True}
    replies: list[Any] = []

    def ask() -> None:
        replies.append(httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=120).json())

    request = threading.Thread(target=ask)
    request.start()
    eventually(lambda: any(load.running for load in running.counts("PrefillWorker")), 20)
    before = running.num_retries()
    processes = running.workers("PrefillWorker") + running.workers("DecodeWorker")
    running.stop()
    request.join()
    assert replies[0]["usage"]["completion_tokens"] == 24
    assert running.num_retries() == before  # its pages came from the worker that was draining
    assert not psutil.wait_procs(processes, timeout=10)[1]
