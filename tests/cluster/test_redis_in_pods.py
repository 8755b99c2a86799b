"""Both Redis servers as the pods start them: the manifests' commands, configurations and probes, with a real server."""

import base64
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from rendered import ROOT, find_tool

from lserve.engine.redis_client import client_options

Resource = dict[str, Any]


@pytest.fixture(scope="module")
def secrets() -> dict[str, Resource]:
    """What k8s/secrets.sh prints, by name."""
    tools = f"{Path(find_tool('kubectl')).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = subprocess.run(
        [ROOT / "k8s" / "secrets.sh"],
        env={**os.environ, "PATH": tools, "LSERVE_API_KEYS": "one,two"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    namespace, *made = yaml.safe_load_all(printed)
    assert namespace["metadata"]["name"] == "lserve"
    return {secret["metadata"]["name"]: secret for secret in made}


def test_the_secrets_hold_what_the_manifests_refer_to(secrets: dict[str, Resource], resources: list[Resource]) -> None:
    wanted: set[tuple[str, str]] = set()
    stack: list[Any] = list(resources)
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if "secretKeyRef" in node:
                wanted.add((node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]))
            if "secretName" in node:
                wanted |= {(node["secretName"], item["key"]) for item in node.get("items", ())}
            stack += node.values()
        elif isinstance(node, list):
            stack += node
    has = {(name, key) for name, secret in secrets.items() for key in secret["data"]}
    assert wanted <= has
    assert len(wanted) == 5  # two passwords, the cluster's secret, API keys, the authority
    assert all(secret["metadata"]["namespace"] == "lserve" for secret in secrets.values())


@pytest.fixture(params=["lserve-redis", "lserve-ray-redis"])
def server(
    request: pytest.FixtureRequest,
    render: Callable[[str], list[Resource]],
    secrets: dict[str, Resource],
    tmp_path: Path,
) -> Iterator[tuple[str, Path, int, dict[str, str]]]:
    """A pod's container as a process: its volumes are folders here, its port is a free one."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        pytest.skip("no Redis with TLS: apt-get install redis-server")
    name: str = request.param
    resources = {(r["kind"], r["metadata"]["name"]): r for r in render("cpu")}
    workload = resources.get(("Deployment", name)) or resources["StatefulSet", name]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def here(text: str) -> str:
        text = re.sub(r" (/tls|/secrets|/etc/valkey|/data|/tmp)\b", rf" {tmp_path}\1", text)
        text = text.replace("valkey-server", binary).replace(
            "valkey-cli", f"{binary.replace('-server', '-cli')} -p {port}"
        )
        return text.replace("tls-port 6379", f"tls-port {port}")

    for folder in ("tls", "secrets", "etc/valkey", "data", "tmp"):
        (tmp_path / folder).mkdir(parents=True)
    for key, value in secrets["lserve-redis-tls"]["data"].items():
        (tmp_path / "tls" / key).write_bytes(base64.b64decode(value))
    key = "redis-password" if name == "lserve-redis" else "ray-redis-password"
    (tmp_path / "secrets" / "password").write_bytes(base64.b64decode(secrets["lserve"]["data"][key]))
    configuration = resources["ConfigMap", name]["data"]["valkey.conf"]
    (tmp_path / "etc/valkey/valkey.conf").write_text(here(configuration))
    environment = {variable["name"]: variable["value"] for variable in container.get("env", ())}
    command = [*container["command"], here(container["args"][0])]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    probe = here(container["readinessProbe"]["exec"]["command"][2])
    deadline = time.monotonic() + 10
    while subprocess.run(["sh", "-c", probe], capture_output=True).returncode:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    yield name, tmp_path, port, environment
    process.terminate()
    process.wait(10)


def test_a_redis_pod_serves_over_tls_as_configured(server: tuple[str, Path, int, dict[str, str]]) -> None:
    name, folder, port, environment = server
    url = f"rediss://localhost:{port}/0"
    options = client_options(url, (folder / "secrets/password").read_text(), str(folder / "tls/ca.crt"), 2.0)
    with redis.Redis.from_url(url, **options) as client:
        client.set("a", "b")
        policy = client.config_get("maxmemory-policy")["maxmemory-policy"]
        assert policy == ("allkeys-lru" if name == "lserve-redis" else "noeviction")
        assert client.config_get("appendonly")["appendonly"] == ("no" if name == "lserve-redis" else "yes")
        assert client.config_get("save")["save"] == "" or name != "lserve-redis"
        maximum = int(client.config_get("maxmemory")["maxmemory"])
        assert maximum == (2 << 30 if environment.get("MAX_MEMORY") else 400 << 20)
    with (
        pytest.raises(redis.exceptions.AuthenticationError),
        redis.Redis.from_url(url, **{**options, "password": "wrong"}) as client,
    ):
        client.ping()
