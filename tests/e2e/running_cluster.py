"""A whole cluster on this machine, started for tests: what it says over HTTP, and its workers, which may be killed."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from workers import held_by

APPLICATION = "lserve"


class RunningCluster:
    """url: of the router. model: the served name."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    @classmethod
    @contextmanager
    def started(cls, settings: dict[str, Any]) -> Iterator["RunningCluster"]:
        """Ray, Serve and the application of these settings, for the length of the block."""
        import ray
        from ray import serve

        from lserve.deployments.app import build

        ray.init(
            "local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=128 << 20,
        )
        try:
            port = settings["router"]["port"]
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(settings), name=APPLICATION)
            cluster = cls(f"http://127.0.0.1:{port}", settings["model"]["served_name"])
            cluster.wait_until_ready(settings["prefill"]["replicas"], settings["decode"]["replicas"])
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()

    def wait_until_ready(self, prefill: int = 1, decode: int = 2, within_s: float = 90.0) -> None:
        """Until so many workers are there and the router answers."""
        eventually(lambda: len(self.counts("PrefillWorker")) == prefill, within_s)
        eventually(lambda: len(self.counts("DecodeWorker")) == decode, within_s)
        eventually(lambda: httpx.get(f"{self.url}/health").status_code == 200, within_s)

    def counts(self, deployment: str) -> list[Any]:
        """Everything that each live worker holds."""
        from ray import serve

        handle = serve.get_deployment_handle(deployment, APPLICATION)
        try:
            answers = handle.broadcast("counts").results(timeout_s=10, return_exceptions=True)
        except Exception:  # between a worker's end and its successor
            return []
        return [answer for answer in answers if not isinstance(answer, Exception)]

    def held(self) -> list[tuple[int, ...]]:
        """What is held by the workers that hold anything."""
        loads = self.counts("PrefillWorker") + self.counts("DecodeWorker")
        return [held_by(load) for load in loads if any(held_by(load))]

    def wait_until_idle(self, within_s: float = 1.0) -> None:
        """Until no worker holds a page, a tail row or a lease."""
        eventually(lambda: not self.held(), within_s)

    def workers(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas."""
        title = f"ray::ServeReplica:{APPLICATION}:{deployment}"
        return [p for p in psutil.Process().children(recursive=True) if "".join(p.cmdline()[:1]).startswith(title)]

    def kill(self, process: psutil.Process) -> None:
        """Without any warning."""
        os.kill(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Shuts the application down, with time for what it has begun."""
        from ray import serve

        serve.delete(APPLICATION)

    def redeploy(self, settings: dict[str, Any]) -> None:
        """Replaces every replica by one with these settings, a few at a time; returns when that is done."""
        from ray import serve

        from lserve.deployments.app import build

        serve.run(build(settings), name=APPLICATION)

    def num_retries(self) -> int:
        """How often a decode worker has asked for a prefill again, as the workers' logs say."""
        import ray

        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        return sum(path.read_text(errors="replace").count("prefill ended with") for path in logs.glob("worker-*.err"))

    def metric(self, name: str, **labels: str) -> float:
        """A metric's sum over all replicas with these labels; Ray exports with some seconds' delay."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name + "{") and all(f'{label}="{value}"' in line for label, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total


def eventually(condition: Callable[[], bool], within_s: float) -> None:
    """Polls until the condition holds. AssertionError when it takes too long."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.05)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
