"""A script for `sealed`: load makes nodes and decode workers appear, idleness removes them, no request fails.

    python autoscaled_nodes.py MODEL

Ray's autoscaler runs with its fake provider, whose nodes are further raylets on this machine. Prints one line of JSON.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.autoscaler._private import fake_multi_node
from ray.cluster_utils import AutoscalingCluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from stream_clients import Clients

from lserve.deployments.embedded_valkey import EmbeddedValkey

PORT = 8000
DECODE_NODE = {"CPU": 1, "lserve_decode": 1, "object_store_memory": 128 << 20}
MOST = 3
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
EXAMPLE: dict[str, Any] = {
    "cluster_name": "fake_multinode",
    "max_workers": 8,
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {},
    "head_node_type": "ray.head.default",
    "upscaling_speed": 20.0,
    "idle_timeout_minutes": 0.1,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    **{f"{part}_commands": [] for part in COMMANDS},
}


def config(model: str, redis: str) -> dict[str, Any]:
    """As in cluster.yaml, on a small scale; the policy looks at what the last seconds brought."""
    settings = {
        "model": {"path": model, "served_name": "tiny"},
        "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 64 << 20},
        "sparsity": {"head_profile": f"{model}/heads.json", "token_budget": 1024},
        "prefill": {"local_threshold": 0, "chunk_size": 128},
        "decode": {"min_replicas": 1, "max_replicas": MOST, "max_batch_size": 2, "resources": {"lserve_decode": 1}},
        "autoscaling": {"shrink_after_s": 10.0},
        "redis": {"url": redis},
    }
    return {
        "applications": [
            {
                "name": "lserve",
                "import_path": "lserve.deployments.app:build",
                "autoscaling_policy": {"policy_function": "lserve.deployments.autoscaling:scale_application"},
                "args": settings,
            }
        ]
    }


def provide_example() -> None:
    """Gives Ray's fake provider the configuration that its wheels lack, for this script's mount namespace only."""
    package = Path(fake_multi_node.__file__).parent
    copy = Path(tempfile.mkdtemp()) / package.name
    shutil.copytree(package, copy)
    (copy / "example.yaml").write_text(json.dumps(EXAMPLE))
    subprocess.run(["mount", "--bind", str(copy), str(package)], check=True)


def num_decode_nodes() -> int:
    """Nodes that are alive and carry the resource."""
    return sum(node["Alive"] and "lserve_decode" in node["Resources"] for node in ray.nodes())


def num_workers() -> int:
    """Decode workers that run."""
    return int(serve.status().applications["lserve"].deployments["DecodeWorker"].replica_states.get("RUNNING", 0))


def until(condition: Any, within_s: float, what: str) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"{what}: not within {within_s:g} s; {num_decode_nodes()} nodes"
        time.sleep(0.2)
    return time.monotonic() - started


def is_healthy() -> bool:
    """Whether tokens can be served."""
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def main(model: str) -> None:
    """Starts everything, loads it, lets it rest."""
    types = {"decode": {"resources": DECODE_NODE, "node_config": {}, "min_workers": 0, "max_workers": MOST}}
    head = {"CPU": 2, "object_store_memory": 128 << 20}
    provide_example()
    cluster = AutoscalingCluster(head, types, autoscaler_v2=True)
    cluster.start()
    with EmbeddedValkey() as valkey:
        ray.init("auto", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config(model, valkey.url)))
        until(is_healthy, 120, "the first worker")
        first = num_decode_nodes()
        most = 0
        with Clients(f"http://127.0.0.1:{PORT}") as clients:
            grew_s = until(lambda: num_decode_nodes() > first, 90, "another node")
            until(lambda: num_workers() > 1, 60, "another worker")
            answered = clients.complete
            until(lambda: clients.complete > answered + 8, 60, "answers from more workers")
            most = num_decode_nodes()
        shrank_s = until(lambda: num_decode_nodes() == 1, 120, "an idle node's end")
        until(is_healthy, 20, "the last worker")
        report = {"nodes": [first, most, num_decode_nodes()], "complete": clients.complete, "failed": clients.failures}
        print(json.dumps(report | {"grew_s": round(grew_s, 1), "shrank_s": round(shrank_s, 1)}))
        serve.shutdown()
        ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
