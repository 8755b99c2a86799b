"""Ray and Ray Serve on this machine, reachable from this machine only, and gone afterwards without a trace."""

import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil

from lserve.deployments import serve_environment
from lserve.deployments.settings import Settings
from lserve.engine.errors import LServeError

LOOPBACK = "127.0.0.1"
APPLICATION = "lserve"
_OBJECT_STORE_BYTES = 128 << 20  # messages between deployments are small; memory is for pages
_STOP_TIMEOUT_S = 10.0

_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's switch for listening on the loopback address only
    "RAY_AUTH_MODE": "token",  # so that no other user of this machine can run code through it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not 15, behind whatever else runs on this machine
    # Threads that wait for each other spin for some 50 us, not for milliseconds: with both workers busy on the same
    # cores a decode step is 5 times as fast, and with one of them as fast as before.
    "GOMP_SPINCOUNT": "10000",
    "UCX_NET_DEVICES": "lo",  # NIXL's connections between the workers
}


@contextmanager
def local_ray(settings: Settings, *, dashboard: bool = False) -> Iterator[list[psutil.Process]]:
    """A Ray cluster of one node on the loopback address, for the length of the block; gives Ray's own processes.

    Ray may hand out as many cores as the settings reserve, whatever the machine has. Logs lie in a temporary directory,
    which goes with the cluster. On exit every process that was started since is gone, killed where it does not end.
    """
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    serve_environment.apply()
    import ray

    before = _descendants()
    logs = tempfile.mkdtemp(prefix="lserve-ray-", dir=_short_temporary_directory())
    try:
        ray.init(
            address="local",
            num_cpus=_reserved_cpus(settings),
            include_dashboard=dashboard,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=logs,
        )
        yield [process for process in _descendants() - before if process.name() in ("gcs_server", "raylet")]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # nothing interrupts the rest of the way down
        started = _descendants() - before
        ray.shutdown()
        _end(started)
        shutil.rmtree(logs, ignore_errors=True)


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The application on the running Ray cluster, for the length of the block; gives its URL once it is up.

    Raises LServeError with a worker's own words when it cannot start.
    """
    from ray import serve

    from lserve.deployments.app import build

    host, port = settings.router.host, settings.router.port
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    application = build(settings.model_dump())
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            deployments = serve.status().applications[APPLICATION].deployments.values()
            raise LServeError(_reason([str(error), *(deployment.message for deployment in deployments)])) from error
        yield f"http://{LOOPBACK if host == '0.0.0.0' else host}:{port}"
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):  # told to stop twice, it does not wait for answers in progress
            serve.delete(APPLICATION)
        raise


def watch(processes: list[psutil.Process]) -> NoReturn:
    """Waits, for ever or until one of the processes ends, which is a LServeError that names it."""
    names = {process: process.name() for process in processes}
    while True:
        for process, name in names.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise LServeError(f"Ray's {name} ended unexpectedly")
        time.sleep(1.0)


def check_port_is_free(host: str, port: int) -> None:
    """Raises LServeError when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LServeError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def _reserved_cpus(settings: Settings) -> int:
    parts = (settings.prefill, settings.decode, settings.router)
    return max(1, math.ceil(sum(part.most_replicas * part.num_cpus for part in parts)))


def _reason(reports: list[str]) -> str:
    """Serve reports a failed start with the worker's whole traceback: its last exception says what was wrong."""
    lines = [line.strip() for report in reports for line in report.splitlines() if line.strip()]
    raised = re.findall(r"^(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception): .*)", "\n".join(lines), re.MULTILINE)
    return f"a worker did not start: {raised[-1] if raised else ' '.join(lines)}"


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _end(processes: set[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(processes), timeout=_STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)


def _short_temporary_directory() -> Path:
    """Ray puts sockets deep below its directory, and a socket's path has 107 bytes at most."""
    chosen = Path(tempfile.gettempdir())
    return chosen if len(str(chosen)) <= 20 else Path("/tmp")
