import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from lserve.deployments.directory import Directory, DirectoryHit
from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.errors import SettingsError

SECRET = b"secret"
HASHES = chain_hashes(chain_root(SECRET, "tenant", "format"), range(4096))
POINTS = [(n, HASHES[n // 64 - 1]) for n in (1024, 2048, 3072, 3968)]


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as valkey:
        yield valkey


@pytest.fixture
def client(valkey: EmbeddedValkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        yield client


@pytest.fixture
async def directory(valkey: EmbeddedValkey, client: redis.Redis) -> AsyncIterator[Directory]:
    directory = Directory(valkey.url, SECRET, retry_after_s=0.05)
    yield directory
    await directory.close()


async def test_the_longest_published_prefix_is_found(directory: Directory) -> None:
    assert await directory.lookup(POINTS) is None
    await directory.publish(POINTS[:2], "prefill-1")
    assert await directory.lookup(POINTS) == DirectoryHit(2048, ("prefill-1",))
    assert await directory.lookup(list(reversed(POINTS))) == DirectoryHit(2048, ("prefill-1",))
    assert await directory.lookup(POINTS[2:]) is None
    assert await directory.lookup([]) is None


async def test_an_entry_names_its_latest_workers_first(directory: Directory) -> None:
    for worker in range(6):
        await directory.publish(POINTS[:1], f"prefill-{worker}")
    await directory.publish(POINTS[:1], "prefill-3")
    hit = await directory.lookup(POINTS)
    assert hit == DirectoryHit(1024, ("prefill-3", "prefill-5", "prefill-4", "prefill-2"))


async def test_a_hint_lives_for_its_time_only(
    valkey: EmbeddedValkey, directory: Directory, client: redis.Redis
) -> None:
    await directory.publish(POINTS[:1], "prefill-1")
    [key] = client.keys()
    assert 0 < client.ttl(key) <= 3600
    client.persist(key)
    short = Directory(valkey.url, SECRET, ttl_s=1)
    await short.publish(POINTS[1:2], "prefill-1")
    value = client.get("lserve:directory:" + POINTS[1][1].hex())
    deadline = time.monotonic() + 5
    while await short.lookup(POINTS[1:2]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    client.set("lserve:directory:" + POINTS[1][1].hex(), value)
    assert await short.lookup(POINTS[1:2]) is None, "an old entry written back does not count"
    await short.close()


async def test_a_forged_foreign_or_swapped_entry_is_a_miss(
    valkey: EmbeddedValkey, directory: Directory, client: redis.Redis
) -> None:
    await directory.publish(POINTS[:2], "prefill-1")
    first, second = ("lserve:directory:" + chain_hash.hex() for _, chain_hash in POINTS[:2])
    good = client.get(second)
    for bad in (b"", b"x", good[:-1], good + b" ", bytes([good[0] ^ 1]) + good[1:], client.get(first)):
        client.set(second, bad)
        assert await directory.lookup(POINTS) == DirectoryHit(1024, ("prefill-1",))
    client.delete(second)
    client.lpush(second, "a list")
    assert await directory.lookup(POINTS) == DirectoryHit(1024, ("prefill-1",))

    stranger = Directory(valkey.url, b"other secret")
    await stranger.publish(POINTS, "prefill-9")
    assert await directory.lookup(POINTS) is None
    await stranger.close()


async def test_a_paused_redis_is_a_bounded_miss_and_then_none_at_all(
    valkey: EmbeddedValkey, directory: Directory
) -> None:
    await directory.publish(POINTS, "prefill-1")
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert await directory.lookup(POINTS) is None
        assert 0.09 < time.monotonic() - start < 0.5
        assert not directory.is_available
        start = time.monotonic()
        assert await directory.lookup(POINTS) is None
        await directory.publish(POINTS, "prefill-1")
        assert time.monotonic() - start < 0.05, "the breaker is open"
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    deadline = time.monotonic() + 5
    while await directory.lookup(POINTS) is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert directory.is_available


async def test_no_redis_at_all_is_a_miss() -> None:
    directory = Directory("unix:///nowhere/valkey.sock", SECRET)
    await directory.publish(POINTS, "prefill-1")
    assert await directory.lookup(POINTS) is None
    await directory.close()
    with pytest.raises(SettingsError, match="malformed"):
        Directory("http://localhost", SECRET)
