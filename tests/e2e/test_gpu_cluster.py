"""The whole path on one GPU that a prefill and a decode worker share: HTTP, Ray Serve, NIXL, pages from Valkey."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from running_cluster import RunningCluster, eventually, free_port

from lserve.cli.demo_model import SERVED_NAME, demo_model
from lserve.deployments import serve_environment
from lserve.deployments.embedded_valkey import EmbeddedValkey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
QUESTION = "What is the capital of France?"


def settings(valkey: str, num_gpus: float) -> dict[str, Any]:
    """A short prompt, or the short rest of a long one, is prefilled by its decode worker.

    float32, since bfloat16 rounds the demo model's two best first tokens of the answer to the question into one.
    """
    return {
        "model": {"path": str(demo_model()), "served_name": SERVED_NAME, "dtype": "float32"},
        "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 1 << 30},
        "sparsity": {"token_budget": 1024},
        "prefill": {"replicas": 1, "num_gpus": num_gpus, "local_threshold": 512, "chunk_size": 512},
        "decode": {"replicas": 1, "num_gpus": num_gpus, "max_batch_size": 8},
        "router": {"port": free_port()},
        "redis": {"url": valkey},
    }


def start(num_gpus: float) -> Iterator[RunningCluster]:
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as environment, EmbeddedValkey() as valkey:
        environment.setenv("PYTHONPATH", root + os.pathsep + os.environ.get("PYTHONPATH", ""))
        environment.setenv("LSERVE_CLUSTER_SECRET", "a secret of the tests")
        for name, value in serve_environment.SERVE_ENVIRONMENT.items():
            environment.setenv(name, value)
        with RunningCluster.started(settings(valkey.url, num_gpus)) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    yield from start(num_gpus=0.5)


def stream(cluster: RunningCluster, question: str) -> tuple[str, dict[str, Any]]:
    """The streamed answer and its usage."""
    body = {
        "model": cluster.model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, usage = "", {}
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    for chunk in map(json.loads, lines[:-1]):
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        usage = chunk.get("usage") or usage
    return text, usage


def test_a_question_is_answered_in_a_stream(cluster: RunningCluster) -> None:
    text, usage = stream(cluster, QUESTION)
    assert "Paris" in text
    assert usage["completion_tokens"] > 4
    cluster.wait_until_idle()


def test_a_long_prompt_comes_over_nixl_and_its_prefix_out_of_valkey(cluster: RunningCluster) -> None:
    """The second time the decode worker is a new one, whose own pool is empty."""
    question = f"{LICENSE[:5000]}\n\nWhat kind of text is this?"
    first, usage = stream(cluster, question)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0 and usage["prompt_tokens"] > 1024
    pages = usage["prompt_tokens"] // 64
    eventually(lambda: cluster.metric("lserve_kv_transfer_bytes_total") > pages * 400_000, 30)
    (worker,) = cluster.workers("DecodeWorker")
    cluster.kill(worker)
    eventually(lambda: [w.pid for w in cluster.workers("DecodeWorker")] not in ([], [worker.pid]), 60)
    cluster.wait_until_ready(1, 1)
    second, usage = stream(cluster, question)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 1024
    assert second == first
    eventually(lambda: cluster.metric("lserve_prefix_tokens_total", tier="redis") >= 1024, 30)
    cluster.wait_until_idle()
