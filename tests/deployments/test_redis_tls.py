"""Pages and directory over TLS, with a real Redis under a certificate of its own."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from lserve.deployments.directory import Directory, DirectoryHit
from lserve.deployments.redis_node import RedisEndpoint, RedisNode, self_signed
from lserve.deployments.settings import load_settings
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.errors import SettingsError
from lserve.engine.prefix_store import PageKey, PrefixStore
from lserve.engine.redis_client import client_options

PASSWORD = "correct horse"
SECRET = b"secret"
HASHES = chain_hashes(chain_root(SECRET, "tenant", "format"), range(64 * 16))
PAGES = [(PageKey(chain_hash, "retrieval"), chain_hash * 1000) for chain_hash in HASHES]
needs_server = pytest.mark.skipif(
    not (shutil.which("valkey-server") or shutil.which("redis-server")),
    reason="no Redis with TLS: apt-get install redis-server",
)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[RedisEndpoint]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LSERVE_REDIS_PASSWORD", PASSWORD)
        node = RedisNode(64 << 20, port, "127.0.0.1")
    yield node.endpoint()
    node.stop()


def make_store(url: str, ca: str | None, password: str = PASSWORD) -> PrefixStore:
    return PrefixStore(url, SECRET, "format", password=password, ca=ca, timeout_s=2.0)


@needs_server
@pytest.mark.parametrize("as_file", [False, True])
async def test_pages_and_directory_pass_over_tls(endpoint: RedisEndpoint, tmp_path: Path, as_file: bool) -> None:
    ca = endpoint.ca
    if as_file:
        (tmp_path / "ca.crt").write_text(ca)
        ca = str(tmp_path / "ca.crt")
    store = make_store(endpoint.url, ca)
    store.put_pages(PAGES)
    assert store.flush(10)
    assert [bytes(page) for page in await store.get_pages([key for key, _ in PAGES])] == [page for _, page in PAGES]
    assert store.is_available
    store.close()
    directory = Directory(endpoint.url, SECRET, password=PASSWORD, ca=ca, timeout_s=2.0)
    await directory.publish([(1024, HASHES[-1])], "worker")
    assert await directory.lookup([(1024, HASHES[-1])]) == DirectoryHit(1024, ("worker",))
    await directory.close()


@needs_server
@pytest.mark.parametrize("case", ["no authority", "another authority", "another host", "wrong password", "no TLS"])
async def test_a_server_that_cannot_be_trusted_gets_nothing(endpoint: RedisEndpoint, case: str) -> None:
    url, ca, password = endpoint.url, endpoint.ca, PASSWORD
    if case == "no authority":
        ca = None
    elif case == "another authority":
        ca = self_signed("127.0.0.1")[0]
    elif case == "another host":
        url = url.replace("127.0.0.1", "127.0.0.2")
    elif case == "wrong password":
        password = "battery staple"
    else:
        url, ca = url.replace("rediss", "redis"), None
    store = make_store(url, ca, password)
    assert await store.get_pages([PAGES[0][0]]) == []
    assert not store.is_available
    store.close()


@needs_server
def test_the_password_stands_on_no_command_line(endpoint: RedisEndpoint) -> None:
    command_lines = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout
    assert PASSWORD not in command_lines
    with redis.Redis.from_url(endpoint.url, **client_options(endpoint.url, PASSWORD, endpoint.ca, 2.0)) as client:
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"
        assert client.config_get("save")["save"] == ""


def test_a_node_without_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LSERVE_REDIS_PASSWORD", raising=False)
    with pytest.raises(SettingsError, match="LSERVE_REDIS_PASSWORD"):
        RedisNode(1 << 20, 0, "127.0.0.1")


@pytest.mark.parametrize(
    ("url", "ca", "message"),
    [
        ("rediss://x", "/no/such/ca.crt", "redis.ca: cannot use '/no/such/ca.crt': No such file"),
        ("rediss://x", __file__, f"redis.ca: cannot use {__file__!r}"),
        ("rediss://x", "-----BEGIN CERTIFICATE-----\nAAAA", "redis.ca: cannot use the certificate"),
        ("redis://x", "/ca.crt", "redis.ca is set, so redis.url must start with rediss://, got 'redis://x'"),
    ],
)
def test_an_authority_that_cannot_be_used_is_named(url: str, ca: str, message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)) as caught:
        make_store(url, ca)
    assert "\n" not in str(caught.value)


def test_the_settings_hold_an_authority() -> None:
    certificate, key = self_signed("10.0.0.1")
    settings = load_settings({"model": {"path": "/m"}, "redis": {"url": "rediss://10.0.0.1:1", "ca": certificate}})
    assert settings.redis.ca == certificate
    assert "PRIVATE" in key
