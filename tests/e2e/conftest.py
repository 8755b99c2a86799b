"""Fixtures of the end-to-end tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_cluster import RunningCluster, free_port
from tiny_model import make_tiny_model
from trace_collector import TraceCollector

from lserve.cli.demo_model import SERVED_NAME, demo_model
from lserve.deployments import serve_environment
from lserve.deployments.embedded_valkey import EmbeddedValkey

SECRET = "a secret of the tests"


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 3 layers."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def valkey(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedValkey]:
    """An empty Valkey of its own, and a cluster secret."""
    monkeypatch.setenv("LSERVE_CLUSTER_SECRET", SECRET)
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(scope="package")
def collector() -> Iterator[TraceCollector]:
    """Takes the running cluster's traces."""
    with TraceCollector.started() as collector:
        yield collector


@pytest.fixture(scope="package")
def running(collector: TraceCollector) -> Iterator[RunningCluster]:
    """The demo model behind real Ray Serve: a router, one prefill and two decode workers, and a Valkey."""
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as environment, EmbeddedValkey() as valkey:
        environment.setenv("PYTHONPATH", root + os.pathsep + os.environ.get("PYTHONPATH", ""))
        environment.setenv("LSERVE_CLUSTER_SECRET", SECRET)
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        for name, value in serve_environment.SERVE_ENVIRONMENT.items():
            environment.setenv(name, value)
        settings = {
            "model": {"path": str(demo_model()), "served_name": SERVED_NAME},
            "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 256 << 20},
            "sparsity": {"token_budget": 1024},
            "prefill": {"replicas": 1, "local_threshold": 0, "chunk_size": 128},
            "decode": {"replicas": 2, "max_batch_size": 8},
            "router": {"port": free_port(), "max_running_requests": 8, "max_queued_requests": 2},
            "redis": {"url": valkey.url},
        }
        with RunningCluster.started(settings) as cluster:
            yield cluster
