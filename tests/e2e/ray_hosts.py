"""A Ray cluster whose nodes are hosts of a `Network`: a head, a prefill node, a decode node; Redis on a fourth."""

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml
from namespaces import Host, Network, wait_for

from lserve.deployments.embedded_valkey import _server_binary
from lserve.deployments.serve_environment import SERVE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
APPLICATION = "lserve"
HTTP_PORT, GCS_PORT, DASHBOARD_PORT, REDIS_PORT = 8000, 6379, 8265, 6380


class RayHosts:
    """Starts everything but the application. folder: for logs and Ray's session, on a short path."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.hosts, self.folder = network.hosts, folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UCX_"))},
            **SERVE_ENVIRONMENT,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "LSERVE_CLUSTER_SECRET": secrets.token_hex(32),
            "LSERVE_REDIS_PASSWORD": secrets.token_hex(32),
            "UCX_TLS": "tcp",  # not the memory that these hosts share
            "UCX_NET_DEVICES": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def url(self) -> str:
        """Of the router."""
        return f"http://{self.hosts['head'].address}:{HTTP_PORT}"

    def start(self, name: str) -> None:
        """`ray start` on one host, or Redis there."""
        host = self.hosts[name]
        if name == "redis":
            options = ["--bind", host.address, "--port", str(REDIS_PORT), "--save", "", "--appendonly", "no"]
            password = ["--requirepass", self.environment["LSERVE_REDIS_PASSWORD"]]
            self._start(host, _server_binary(), *options, *password, "--dir", str(self.folder))
            wait_for(lambda: _listens(host.address, REDIS_PORT), 20, "Redis")
            return
        common = ["--block", "--node-ip-address", host.address, "--object-store-memory", str(128 << 20)]
        if name == "head":
            head = [
                "--head",
                "--port",
                str(GCS_PORT),
                "--num-cpus",
                "1",
                "--resources",
                '{"lserve_router": 1}',
                "--temp-dir",
                str(self.folder / "ray"),
            ]
            dashboard = ["--dashboard-host", host.address, "--dashboard-port", str(DASHBOARD_PORT)]
            self._start(host, str(BIN / "ray"), "start", *head, *dashboard, *common)
            wait_for(lambda: _listens(host.address, DASHBOARD_PORT), 60, "Ray's head")
            return
        role = ["--num-cpus", "1", "--resources", f'{{"lserve_{name}": 1}}']
        address = f"{self.hosts['head'].address}:{GCS_PORT}"
        self._start(host, str(BIN / "ray"), "start", "--address", address, *role, *common)

    def deploy(self, settings: dict[str, Any]) -> None:
        """`serve deploy`, from the head."""
        redis = f"redis://{self.hosts['redis'].address}:{REDIS_PORT}/0"
        application = {
            "name": APPLICATION,
            "import_path": "lserve.deployments.app:build",
            "route_prefix": "/",
            "args": {**settings, "redis": {"url": redis}},
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "0.0.0.0", "port": HTTP_PORT},
            "applications": [application],
        }
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        dashboard = f"http://{self.hosts['head'].address}:{DASHBOARD_PORT}"
        self.hosts["head"].run(str(BIN / "serve"), "deploy", str(path), "-a", dashboard, environment=self.environment)

    def wait_until_ready(self, within_s: float = 180.0) -> None:
        """Until the router says that tokens can be served."""

        def ready() -> bool:
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(ready, within_s, "the application")

    def _start(self, host: Host, *command: str) -> None:
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.start(*command, environment=self.environment, private=self.folder / "ray", log=log)


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False
