"""Prefixes from the worker's pool and from Redis: hits where they belong, misses elsewhere, the same answers always."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from workers import Answer, Cluster, again, cluster, prompt, request

from lserve.deployments.directory import Directory
from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.deployments.prefix_lookup import PrefixLookup
from lserve.deployments.settings import cluster_secret
from lserve.deployments.worker import Worker
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.engine import Engine
from lserve.engine.request import Request

ASKED = request(prompt(3000), max_tokens=12)
LAST_RESUME_POINT = 2944


async def hinted(pair: Cluster, asked: Request) -> Answer:
    """The answer, with the hint that the router would give."""

    async def info() -> object:
        return await pair.decode.info()

    key = cluster_secret(pair.settings)
    directory = Directory.from_settings(pair.settings, key)
    pool = SimpleNamespace(info=info)
    hint = await PrefixLookup(directory, key, pool)(asked.tenant, asked.prompt_token_ids)  # type: ignore[arg-type]
    await directory.close()
    return await pair.answer(asked, hint)


def prefix_tokens(pair: Cluster) -> dict[str, float]:
    """Tokens by tier, of all workers."""
    counts: dict[str, float] = {}
    for worker in (*pair.prefills, *pair.decodes):
        for (tier,), tokens in worker._worker.metrics.prefix_tokens.sum.items():  # type: ignore[attr-defined]
            counts[tier] = counts.get(tier, 0) + tokens
    return counts


@contextmanager
def paused(valkey: EmbeddedValkey) -> Iterator[None]:
    """Valkey keeps its connections and says nothing."""
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(valkey.pid, signal.SIGCONT)


async def test_a_second_request_finds_the_prefix_in_the_pool(tiny_model: Path, valkey: EmbeddedValkey) -> None:
    async with cluster(tiny_model, redis=valkey.url) as pair:
        first = await hinted(pair, again(ASKED))
        second = await hinted(pair, again(ASKED))
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, LAST_RESUME_POINT)
        assert first.token_ids == second.token_ids
        counts = prefix_tokens(pair)
        assert counts["pool"] == LAST_RESUME_POINT and "redis" not in counts
        await pair.idle()


@pytest.mark.parametrize("overrides", [(), ("prefill.local_threshold=512",), ("prefill.replicas=0",)])
async def test_redis_keeps_prefixes_when_every_worker_restarts(
    tiny_model: Path, valkey: EmbeddedValkey, overrides: tuple[str, ...]
) -> None:
    prefills = 0 if "prefill.replicas=0" in overrides else 1
    async with cluster(tiny_model, *overrides, prefills=prefills, redis=valkey.url) as pair:
        first = await hinted(pair, again(ASKED))
    async with cluster(tiny_model, *overrides, prefills=prefills, redis=valkey.url) as pair:
        second = await hinted(pair, again(ASKED))
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, LAST_RESUME_POINT)
        assert second.token_ids == first.token_ids
        assert prefix_tokens(pair) == {"redis": LAST_RESUME_POINT, "miss": 3000 - LAST_RESUME_POINT}
        await pair.idle()


@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "int8", "k8v4", "int4"])
async def test_pages_come_back_from_redis_as_they_were_written(
    tiny_model: Path, valkey: EmbeddedValkey, kv_dtype: str
) -> None:
    overrides = (f"cache.kv_dtype={kv_dtype}", "cache.retrieval_pool_bytes=33554432")
    async with cluster(tiny_model, *overrides, redis=valkey.url) as pair:
        await hinted(pair, again(ASKED))
        written = await cached_bytes(pair.prefill._worker)
    async with cluster(tiny_model, *overrides, redis=valkey.url) as pair:
        await hinted(pair, again(ASKED))
        assert prefix_tokens(pair)["redis"] == LAST_RESUME_POINT
        for worker in (pair.prefill._worker, pair.decode._worker):
            assert await cached_bytes(worker) == written


async def cached_bytes(worker: Worker) -> list[bytes]:
    """The pages of both classes that the worker's index has for the prompt."""

    def read(engine: Engine) -> list[bytes]:
        assert engine.index is not None
        root = chain_root(cluster_secret(worker.settings), ASKED.tenant, engine.page_format.format_id)
        hit = engine.index.lookup(chain_hashes(root, ASKED.prompt_token_ids), len(ASKED.prompt_token_ids))
        assert hit.num_tokens == LAST_RESUME_POINT
        streaming = [page for _, page in sorted(hit.streaming_pages.items())]
        retrieval_bytes = engine.cache.export("retrieval", hit.retrieval_pages).numpy().tobytes()
        streaming_bytes = engine.cache.export("streaming", streaming).numpy().tobytes()
        engine.retrieval_pool.release(hit.retrieval_pages)
        engine.streaming_pool.release(streaming)
        return [retrieval_bytes, streaming_bytes]

    return await worker.loop.call(read)


async def test_a_longer_prompt_takes_up_the_common_part(tiny_model: Path, valkey: EmbeddedValkey) -> None:
    longer = request(ASKED.prompt_token_ids[:2100] + prompt(700, seed=5), max_tokens=12)
    async with cluster(tiny_model, redis=valkey.url) as pair:
        await hinted(pair, again(ASKED))
    async with cluster(tiny_model, redis=valkey.url) as pair:
        answer = await hinted(pair, again(longer))
        assert answer.num_cached_tokens == 2048
        await pair.idle()
    async with cluster(tiny_model, "cache.prefix_cache=false") as fresh:
        assert (await fresh.answer(again(longer))).token_ids == answer.token_ids


async def test_nobody_hits_what_another_tenant_or_secret_wrote(
    tiny_model: Path, valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tiny_model, redis=valkey.url) as pair:
        mine = await hinted(pair, again(ASKED, tenant="me"))
        other = await hinted(pair, again(ASKED, tenant="someone else"))
        assert other.num_cached_tokens == 0 and other.token_ids == mine.token_ids
        assert (await hinted(pair, again(ASKED, tenant="me"))).num_cached_tokens == LAST_RESUME_POINT
    monkeypatch.setenv("LSERVE_CLUSTER_SECRET", "another secret")
    async with cluster(tiny_model, redis=valkey.url) as pair:
        assert (await hinted(pair, again(ASKED, tenant="me"))).num_cached_tokens == 0
        await pair.idle()


@pytest.mark.parametrize(("lost", "expected"), [(2943, 2048), (2047, 1024), (100, 0)])
async def test_a_page_that_redis_lost_ends_the_hit_before_it(
    tiny_model: Path, valkey: EmbeddedValkey, lost: int, expected: int
) -> None:
    async with cluster(tiny_model, redis=valkey.url) as pair:
        first = await hinted(pair, again(ASKED))
        engine = pair.prefill._worker.engine
        root = chain_root(cluster_secret(pair.settings), ASKED.tenant, engine.page_format.format_id)
    name = chain_hashes(root, ASKED.prompt_token_ids)[lost // 64].hex()
    with redis.Redis.from_url(valkey.url) as client:
        assert client.delete(f"lserve:page:{name}:r") == 1
    async with cluster(tiny_model, redis=valkey.url) as pair:
        answer = await hinted(pair, again(ASKED))
        assert answer.num_cached_tokens == expected and answer.token_ids == first.token_ids
        await pair.idle()


async def test_a_redis_that_pauses_or_dies_costs_misses_only(tiny_model: Path, valkey: EmbeddedValkey) -> None:
    async with cluster(tiny_model, "redis.timeout_s=0.2", redis=valkey.url) as pair:
        first = await hinted(pair, again(ASKED))
    async with cluster(tiny_model, "redis.timeout_s=0.2", redis=valkey.url) as pair:
        with paused(valkey):
            started = time.monotonic()
            during = await hinted(pair, again(ASKED))
            assert time.monotonic() - started < 3
            assert during.num_cached_tokens == 0 and during.token_ids == first.token_ids
        valkey.stop()
        after = await hinted(pair, again(ASKED))  # from the pool
        assert after.num_cached_tokens == LAST_RESUME_POINT and after.token_ids == first.token_ids
        other = await hinted(pair, request(prompt(1500, seed=9)))
        assert other.num_cached_tokens == 0
        await pair.idle()


async def test_a_worker_that_leaves_hands_redis_what_it_lacks(tiny_model: Path, valkey: EmbeddedValkey) -> None:
    """An outage, or a Redis that was replaced, loses nothing that workers still have when they are scaled down."""
    async with cluster(tiny_model, redis=valkey.url) as pair:
        first = await hinted(pair, again(ASKED))
        with redis.Redis.from_url(valkey.url) as client:
            store = pair.prefill._worker.store
            assert store is not None and await asyncio.to_thread(store.flush, 10.0)
            assert client.dbsize() > 50
            client.flushall()
    async with cluster(tiny_model, redis=valkey.url) as pair:
        second = await hinted(pair, again(ASKED))
        assert second.num_cached_tokens == LAST_RESUME_POINT and second.token_ids == first.token_ids
        await pair.idle()
