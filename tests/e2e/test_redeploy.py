"""A rolling redeploy under load: every replica is replaced, and nobody notices."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_cluster import RunningCluster, eventually, free_port
from stream_clients import STREAMS, TOKENS, Clients

from lserve.deployments import serve_environment
from lserve.deployments.embedded_valkey import EmbeddedValkey

pytestmark = [pytest.mark.proof, pytest.mark.timeout(400)]

ROLES = ("PrefillWorker", "DecodeWorker", "Router")


@pytest.fixture
def settings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A tiny model behind two routers, a prefill and two decode workers, and a Valkey."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("LSERVE_CLUSTER_SECRET", secrets.token_hex(32))
    for name, value in serve_environment.SERVE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with EmbeddedValkey() as valkey:
        yield {
            "model": {"path": str(tiny_model), "served_name": "tiny"},
            "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 64 << 20},
            "sparsity": {"head_profile": str(tiny_model / "heads.json"), "token_budget": 1024},
            "prefill": {"replicas": 1, "local_threshold": 0, "chunk_size": 128},
            "decode": {"replicas": 2, "max_batch_size": 8},
            "router": {"replicas": 2, "port": free_port()},
            "redis": {"url": valkey.url},
        }


def test_no_stream_notices_that_every_replica_is_replaced(
    settings: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    with RunningCluster.started(settings) as cluster:
        before = {role: {process.pid for process in cluster.workers(role)} for role in ROLES}
        assert [len(before[role]) for role in ROLES] == [1, 2, 2]
        with Clients(cluster.url) as clients:
            eventually(lambda: clients.complete >= STREAMS, 60)
            changed = {**settings, "decode": {**settings["decode"], "max_waiting": 100}}
            cluster.redeploy(changed)
            replaced = clients.complete
            eventually(lambda: clients.complete >= replaced + 2 * STREAMS or bool(clients.failures), 60)
        assert not clients.failures, "\n".join(clients.failures)
        eventually(lambda: [len(cluster.workers(role)) for role in ROLES] == [1, 2, 2], 60)
        for role in ROLES:
            assert before[role].isdisjoint(process.pid for process in cluster.workers(role))
        cluster.wait_until_idle(within_s=5.0)
        record_property("streams_at_once", STREAMS)
        record_property("tokens_each", TOKENS)
        record_property("complete", clients.complete)
        record_property("failed", len(clients.failures))
