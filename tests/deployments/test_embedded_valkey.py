import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.engine.errors import SettingsError

ROOT = Path(__file__).parents[2]


def wait_until_gone(pid: int, deadline_s: float = 5.0) -> None:
    deadline = time.monotonic() + deadline_s
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_it_serves_on_a_private_socket_and_leaves_nothing_behind() -> None:
    with EmbeddedValkey(max_memory_bytes=64 << 20) as valkey:
        assert stat.S_IMODE(valkey.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(valkey.socket.stat().st_mode) == 0o700
        with redis.Redis.from_url(valkey.url) as client:
            client.set("a", "b")
            assert client.config_get("port")["port"] == "0"
            assert client.config_get("maxmemory")["maxmemory"] == str(64 << 20)
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"
        assert valkey.is_running
    assert not valkey.is_running
    assert not valkey.directory.exists()
    wait_until_gone(valkey.pid)
    valkey.stop()


def test_a_paused_server_stops_too() -> None:
    valkey = EmbeddedValkey()
    os.kill(valkey.pid, signal.SIGSTOP)
    valkey.stop()
    wait_until_gone(valkey.pid)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", ""])
def test_it_goes_with_its_owner_however_that_ends(end: str) -> None:
    script = f"""
import os
from lserve.deployments.embedded_valkey import EmbeddedValkey
valkey = EmbeddedValkey()
print(valkey.pid, valkey.directory, flush=True)
{end}
"""
    owner = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, timeout=30
    )
    pid, directory = owner.stdout.decode().split()
    wait_until_gone(int(pid))
    assert not Path(directory).exists()


def test_a_server_that_does_not_start_is_one_line() -> None:
    with pytest.raises(SettingsError, match="did not start: .*argument") as caught:
        EmbeddedValkey(policy="no-such-policy")
    assert "\n" not in str(caught.value)
