"""Hosts on one machine: network namespaces with addresses of their own, on a bridge. Needs root and iproute2."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

SUBNET = "10.213.7"
BRIDGE_HOST = 254
LOCK = Path(tempfile.gettempdir()) / "lserve-namespaces.lock"


def why_not() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    made = subprocess.run(["ip", "netns", "add", "lserve-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "lserve-probe"], capture_output=True)
    return f"network namespaces are refused here: {made.stderr.strip()}" if made.returncode else None


class Host:
    """A namespace with `eth0`, and what was started in it."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"{SUBNET}.{number}"
        self.namespace, self.outside = f"lserve-{name}", f"lsv{number}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def plug_in(self, bridge: str) -> None:
        """Makes the namespace and its cable."""
        ip("netns", "add", self.namespace)
        ip("link", "add", self.outside, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.outside, "master", bridge, "up")
        for command in (
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
        ):
            ip("-netns", self.namespace, *command.split())

    def start(self, *command: str, environment: Mapping[str, str], private: Path, log: IO[bytes]) -> None:
        """A process on the host, ended with it; it and its children see no other host's processes.

        private: a directory that all hosts have under this path, each its own.
        """
        own = private.with_name(f"{private.name}-{self.name}")
        for directory in (private, own):
            directory.mkdir(exist_ok=True)
        sealed = ["unshare", "--pid", "--mount-proc", "--fork", "--kill-child"]
        mounted = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(own), str(private)]
        started = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *sealed, *mounted, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(started)

    @property
    def running(self) -> list[psutil.Process]:
        """Every process on the host."""
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout.split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    @property
    def names(self) -> list[str]:
        """Their names."""
        names = []
        for process in self.running:
            with suppress(psutil.NoSuchProcess):
                names.append(process.name())
        return names

    def run(self, *command: str, environment: Mapping[str, str]) -> str:
        """What a command in the namespace prints."""
        call = ["ip", "netns", "exec", self.namespace, *command]
        done = subprocess.run(call, env=dict(environment), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def set_link(self, state: str) -> None:
        """`down` cuts the cable, `up` plugs it in again."""
        ip("link", "set", self.outside, state)

    @property
    def bytes_sent(self) -> int:
        """Over its cable, so far."""
        return int(Path(f"/sys/class/net/{self.outside}/statistics/rx_bytes").read_text())

    def stop(self) -> None:
        """Ends every process in the namespace, and the namespace."""
        for started in self.processes:
            started.kill()  # and with it all that it started
        wait_for(lambda: not self.running, 20, f"the end of {self.namespace}")
        for started in self.processes:
            started.wait()
        for command in (["link", "delete", self.outside], ["netns", "delete", self.namespace]):
            subprocess.run(["ip", *command], capture_output=True)  # one that was never made is fine


class Network:
    """Hosts by name, as a context manager; one at a time on a machine. They and this machine reach each other."""

    def __init__(self, *names: str) -> None:
        self.bridge = "lsvbr0"
        self.hosts: dict[str, Host] = {}
        self._names = names

    def __enter__(self) -> "Network":
        self._lock = LOCK.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        ip("link", "add", self.bridge, "type", "bridge")
        try:
            ip("address", "add", f"{SUBNET}.{BRIDGE_HOST}/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            for number, name in enumerate(self._names, start=1):
                self.hosts[name] = Host(name, number)
                self.hosts[name].plug_in(self.bridge)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts.values():
            host.stop()
        ip("link", "delete", self.bridge)
        self._lock.close()


def ip(*arguments: str) -> None:
    """Runs iproute2. AssertionError with its words when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def wait_for(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """Polls until the condition holds. AssertionError that says what did not come."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(0.1)
