"""Ray's head goes and comes back, its state in a Redis of its own with TLS: workers serve on, the state is found again.

Head, worker and Redis are hosts of their own, set up as the Kubernetes manifests set up their pods.
"""

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import yaml
from namespaces import Host, Network, wait_for, why_not

from lserve.cli.demo_model import SERVED_NAME, demo_model
from lserve.deployments.redis_node import self_signed
from lserve.deployments.serve_environment import SERVE_ENVIRONMENT

pytestmark = [pytest.mark.proof, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
REQUEST = {"model": SERVED_NAME, "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}


class Cluster:
    """A head and one node that holds router and worker."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.hosts, self.folder, self.password = network.hosts, folder, secrets.token_hex(16)
        redis = self.hosts["redis"].address
        certificate, key = self_signed(redis)
        (folder / "ca.crt").write_text(certificate)
        (folder / "tls.key").write_text(key)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UCX_"))},
            **SERVE_ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_REDIS_CA_CERT": str(folder / "ca.crt"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay sets it
            "OMP_NUM_THREADS": "1",
        }
        tls = ["--port", "0", "--tls-port", "6379", "--tls-auth-clients", "no"]
        files = ["--tls-cert-file", str(folder / "ca.crt"), "--tls-key-file", str(folder / "tls.key")]
        safe = ["--requirepass", self.password, "--maxmemory-policy", "noeviction", "--dir", str(folder), "--save", ""]
        self.start("redis", {}, str(SERVER), *tls, *files, *safe)
        wait_for(lambda: listens(redis, 6379), 20, "Redis")

    def start(self, name: str, environment: dict[str, str], *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            environment = self.environment | environment
            self.hosts[name].start(*command, environment=environment, private=self.folder / "ray", log=log)

    def start_head(self) -> None:
        address = self.hosts["head"].address
        ports = ["--port", "6379", "--num-cpus", "0", "--redis-password", self.password, "--dashboard-host", "0.0.0.0"]
        where = {"RAY_REDIS_ADDRESS": f"rediss://{self.hosts['redis'].address}:6379"}
        self.start("head", where, RAY, "start", "--head", "--block", *self.common("head"), *ports)
        wait_for(lambda: listens(address, 8265), 60, "Ray's head")

    def start_worker(self) -> None:
        address = f"{self.hosts['head'].address}:6379"
        self.start(
            "worker", {}, RAY, "start", "--address", address, "--num-cpus", "2", "--block", *self.common("worker")
        )

    def common(self, name: str) -> list[str]:
        memory = ["--object-store-memory", str(128 << 20)]
        return ["--node-ip-address", self.hosts[name].address, "--temp-dir", str(self.folder / "ray"), *memory]

    def kill_head(self) -> None:
        head = self.hosts["head"]
        for process in head.processes:
            process.kill()
            process.wait()
        wait_for(lambda: not head.running, 20, "the head's end")

    def on_head(self, *command: str) -> str:
        return self.hosts["head"].run(*command, environment=self.environment)

    def ask(self) -> str:
        """An answer through the worker's own proxy."""
        url = f"http://{self.hosts['worker'].address}:8000/v1/completions"
        reply = httpx.post(url, json=REQUEST, timeout=30)
        return reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text

    def answers(self) -> bool:
        try:
            return self.ask().startswith(" Paris")
        except httpx.HTTPError:
            return False


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    if SERVER is None:
        pytest.skip("no Redis with TLS: apt-get install redis-server")
    with TemporaryDirectory(prefix="lsv-") as folder, Network("head", "worker", "redis") as network:
        yield Cluster(network, Path(folder))


def worker_pids(host: Host) -> set[int]:
    """Of the decode worker's replica."""
    return {p.pid for p in host.running if "".join(p.cmdline()[:1]).startswith("ray::ServeReplica:lserve:DecodeWorker")}


def test_workers_serve_on_without_the_head_which_finds_its_state_again(cluster: Cluster) -> None:
    cluster.start_head()
    cluster.start_worker()
    args = {
        "model": {"path": str(demo_model()), "served_name": SERVED_NAME},
        "cache": {"retrieval_pool_bytes": 256 << 20},
        "prefill": {"replicas": 0},
        "decode": {"replicas": 1, "num_cpus": 1},
        "router": {"num_cpus": 1},
    }
    application = {"name": "lserve", "import_path": "lserve.deployments.app:build", "route_prefix": "/", "args": args}
    http = {"host": "0.0.0.0", "port": 8000}
    config = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
    (cluster.folder / "serve.yaml").write_text(yaml.safe_dump(config))
    dashboard = f"http://{cluster.hosts['head'].address}:8265"
    cluster.on_head("serve", "deploy", "--address", dashboard, str(cluster.folder / "serve.yaml"))
    wait_for(cluster.answers, 120, "the first answer")
    before = worker_pids(cluster.hosts["worker"])

    cluster.kill_head()
    assert [cluster.answers() for _ in range(5)] == [True] * 5
    cluster.start_head()
    wait_for(lambda: "RUNNING" in cluster.on_head("serve", "status", "--address", dashboard), 120, "Serve's state")
    assert cluster.answers()
    assert worker_pids(cluster.hosts["worker"]) == before != set(), "the worker never stopped"

    (pid,) = before
    os.kill(pid, 9)
    wait_for(lambda: bool(worker_pids(cluster.hosts["worker"]) - before), 120, "a new worker, by the head's order")
    wait_for(cluster.answers, 120, "an answer of the new worker")
