import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.errors import SettingsError
from lserve.engine.prefix_store import PageKey, PrefixStore

SECRET = b"secret"
PAGE_BYTES = 50_000
HASHES = chain_hashes(chain_root(SECRET, "tenant", "format"), range(64 * 64))
KEYS = [PageKey(chain_hash, "retrieval") for chain_hash in HASHES]
PAGES = [os.urandom(PAGE_BYTES) for _ in KEYS]

MakeStore = Callable[..., PrefixStore]


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(policy="noeviction") as valkey:
        yield valkey


@pytest.fixture
def client(valkey: EmbeddedValkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        yield client
        client.config_set("maxmemory", 1 << 30)


@pytest.fixture
def make_store(valkey: EmbeddedValkey, client: redis.Redis) -> Iterator[MakeStore]:
    stores: list[PrefixStore] = []

    def make(url: str = valkey.url, secret: bytes = SECRET, format_id: str = "format", **options: float) -> PrefixStore:
        stores.append(PrefixStore(url, secret, format_id, **({"retry_after_s": 0.05} | options)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def put(store: PrefixStore, *indices: int) -> None:
    store.put_pages([(KEYS[i], PAGES[i]) for i in indices])
    assert store.flush(10)


def name(key: PageKey) -> str:
    return f"lserve:page:{key.chain_hash.hex()}:{key.letter}"


async def test_pages_come_back_byte_for_byte_from_another_store(make_store: MakeStore) -> None:
    writer, reader = make_store(), make_store()
    put(writer, *range(64))
    assert await reader.get_pages(KEYS) == PAGES
    assert await reader.get_pages([]) == []
    assert writer.counters.stored == 64
    assert writer.counters.bytes_written == reader.counters.bytes_read > 64 * PAGE_BYTES
    assert (reader.counters.hits, reader.counters.misses) == (64, 0)


async def test_a_hit_ends_at_the_first_missing_page(make_store: MakeStore) -> None:
    store = make_store()
    put(store, *(i for i in range(64) if i != 5))
    assert await store.get_pages(KEYS) == PAGES[:5]
    assert (store.counters.hits, store.counters.misses, store.counters.rejected) == (5, 59, 0)


async def test_head_classes_are_apart(make_store: MakeStore) -> None:
    store = make_store()
    put(store, 0)
    assert await store.get_pages([PageKey(HASHES[0], "streaming")]) == []


async def test_a_page_that_is_there_is_not_written_again(make_store: MakeStore, client: redis.Redis) -> None:
    store = make_store(ttl_s=100)
    put(store, 0, 1)
    before = client.get(name(KEYS[0]))
    assert 0 < client.ttl(name(KEYS[0])) <= 100
    put(store, 0, 1, 2)
    assert client.get(name(KEYS[0])) == before
    assert (store.counters.stored, store.counters.present) == (3, 2)


async def test_other_tenants_secrets_and_formats_never_hit(make_store: MakeStore, client: redis.Redis) -> None:
    put(make_store(), 0)
    tenant = chain_hashes(chain_root(SECRET, "other", "format"), range(64))
    assert await make_store().get_pages([PageKey(tenant[0], "retrieval")]) == []
    for stranger in (make_store(secret=b"other"), make_store(format_id="other")):
        value = client.get(name(KEYS[0]))
        assert await stranger.get_pages(KEYS[:1]) == []
        assert stranger.counters.rejected == 1
        client.set(name(KEYS[0]), value)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda value, other: value[:-1], id="truncated"),
        pytest.param(lambda value, other: value[:60], id="cut within the header"),
        pytest.param(lambda value, other: b"", id="empty"),
        pytest.param(lambda value, other: value + b"\0", id="longer"),
        pytest.param(lambda value, other: value[:-1] + bytes([value[-1] ^ 1]), id="forged payload"),
        pytest.param(lambda value, other: other, id="swapped"),
        pytest.param(lambda value, other: value[:96] + other[96:], id="header of one, payload of another"),
        pytest.param(lambda value, other: b"foreign" * 9000, id="foreign"),
    ],
)
async def test_a_bad_value_is_a_miss_and_makes_room_for_a_good_one(
    make_store: MakeStore, client: redis.Redis, spoil: Callable[[bytes, bytes], bytes]
) -> None:
    store = make_store()
    put(store, 0, 1, 2)
    client.set(name(KEYS[1]), spoil(client.get(name(KEYS[1])), client.get(name(KEYS[2]))))
    assert await store.get_pages(KEYS[:3]) == PAGES[:1]
    assert store.counters.rejected == 1
    put(store, 0, 1, 2)
    assert await store.get_pages(KEYS[:3]) == PAGES[:3]
    assert store.is_available


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=400), start=st.integers(0, PAGE_BYTES), end=st.integers(0, PAGE_BYTES + 200))
def test_whatever_bytes_are_stored_nothing_but_the_page_itself_comes_back(
    make_store: MakeStore, client: redis.Redis, noise: bytes, start: int, end: int
) -> None:
    store = make_store()
    put(store, 0)
    value = client.get(name(KEYS[0]))
    spoiled = value[:start] + noise + value[max(start, end) :]
    client.set(name(KEYS[0]), spoiled)
    assert asyncio.run(store.get_pages(KEYS[:1])) == (PAGES[:1] if spoiled == value else [])
    store.close()


async def test_a_key_of_another_type_is_a_miss(make_store: MakeStore, client: redis.Redis) -> None:
    store = make_store()
    client.lpush(name(KEYS[0]), "a list")
    assert await store.get_pages(KEYS[:1]) == []


async def test_no_redis_costs_misses_and_one_line_of_log(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store("unix:///nowhere/valkey.sock", retry_after_s=60)
    for _ in range(3):
        assert await store.get_pages(KEYS) == []
        put(store, 0)
    assert not store.is_available and not store.has_room
    assert (store.counters.misses, store.counters.unavailable, store.counters.dropped) == (192, 192, 3)
    assert len([r for r in caplog.records if "reads of prefix pages" in r.message]) == 1
    assert len([r for r in caplog.records if "writes of prefix pages" in r.message]) == 1


async def test_a_paused_redis_costs_one_bounded_wait_until_it_runs_again(
    make_store: MakeStore, valkey: EmbeddedValkey
) -> None:
    store = make_store(timeout_s=0.2)
    put(store, 0)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        results = await asyncio.gather(*(store.get_pages(KEYS[:1]) for _ in range(12)))
        assert results == [[]] * 12
        assert 0.15 < time.monotonic() - start < 1.0
        start = time.monotonic()
        assert await store.get_pages(KEYS[:1]) == []
        assert time.monotonic() - start < 0.3
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    deadline = time.monotonic() + 10
    while await store.get_pages(KEYS[:1]) != PAGES[:1]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert store.is_available


async def test_pages_that_came_before_a_stall_count(make_store: MakeStore, valkey: EmbeddedValkey) -> None:
    store = make_store(timeout_s=0.2)
    put(store, *range(64))
    real = store._reader.mget

    def stalls_at_the_third(names: list[str]) -> object:
        stalls_at_the_third.calls += 1
        if stalls_at_the_third.calls == 3:
            os.kill(valkey.pid, signal.SIGSTOP)
        return real(names)

    stalls_at_the_third.calls = 0
    store._reader.mget = stalls_at_the_third
    many = [KEYS[i % 64] for i in range(200)]
    try:
        pages = await store.get_pages(many)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert 2 < len(pages) < 200
    assert pages == [PAGES[i % 64] for i in range(len(pages))]


async def test_a_full_redis_still_reads(
    make_store: MakeStore, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store()
    put(store, 0)
    client.config_set("maxmemory", 1 << 20)
    put(store, *range(1, 64))
    put(store, *range(1, 64))
    assert store.counters.dropped > 0
    assert await store.get_pages(KEYS[:1]) == PAGES[:1]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    client.config_set("maxmemory", 1 << 30)
    deadline = time.monotonic() + 10
    while await store.get_pages(KEYS) != PAGES:
        assert time.monotonic() < deadline
        if store.has_room:
            put(store, *range(64))
        await asyncio.sleep(0.02)


async def test_what_does_not_fit_the_queue_is_dropped_not_waited_for(
    make_store: MakeStore, valkey: EmbeddedValkey
) -> None:
    store = make_store(max_pending_bytes=3 * PAGE_BYTES)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        store.put_pages(zip(KEYS, PAGES, strict=True))
        assert time.monotonic() - start < 0.2
        assert store.counters.dropped == 61
        assert not store.has_room
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert store.flush(10)
    assert store.has_room
    assert await store.get_pages(KEYS) == PAGES[:3]


async def test_a_closed_store_only_misses(make_store: MakeStore) -> None:
    store = make_store()
    put(store, 0)
    store.close()
    assert await store.get_pages(KEYS[:1]) == []
    store.put_pages([(KEYS[1], PAGES[1])])
    assert store.counters.dropped == 1 and not store.has_room


def test_a_malformed_url_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"redis\.url is malformed"):
        PrefixStore("http://localhost", SECRET, "format")
