"""What prefill and decode workers share: an engine on its own thread, NIXL, and the prefix pages in Redis."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import torch

from lserve.engine.config import PAGE_SIZE, RESUME_INTERVAL
from lserve.engine.engine import Engine
from lserve.engine.loading import load
from lserve.engine.prefix_store import PrefixStore
from lserve.engine.results import Reservation, StepResult, WrittenPages
from lserve.engine.sealed_page import PageKey
from lserve.engine.transfer import Transfer

from .directory import Directory
from .engine_loop import EngineLoop
from .messages import WorkerInfo
from .settings import Role, Settings, secret

logger = logging.getLogger(__name__)


class Worker:
    """One engine and its connections. Create it inside a running event loop."""

    def __init__(self, settings: Settings, role: Role, worker_id: str) -> None:
        self.settings, self.role, self.worker_id = settings, role, worker_id
        config = settings.engine_config(role)
        if config.device == "cpu":
            torch.set_num_threads(
                max(1, int(settings.prefill.num_cpus if role == "prefill" else settings.decode.num_cpus))
            )
        cluster_secret = (secret(settings.redis.secret_env) or "").encode()
        self.engine = Engine(config, load(config), cluster_secret, lease_ttl_s=settings.prefill.lease_s)
        self.format_id = self.engine.page_format.format_id
        self.transfer: Transfer | None = None
        if settings.prefill.replicas:
            self.transfer = Transfer(f"{role}-{worker_id}", self.engine.cache.pools, format_id=self.format_id)
        self.store: PrefixStore | None = None
        self.directory: Directory | None = None
        if settings.redis.url is not None and config.cache.prefix_cache:
            redis = settings.redis
            self.store = PrefixStore(
                redis.url or "",
                cluster_secret,
                self.format_id,
                password=secret(redis.password_env),
                ttl_s=redis.ttl_s,
                timeout_s=redis.timeout_s,
                max_pending_bytes=redis.max_pending_bytes,
            )
            self.directory = Directory.from_settings(settings, cluster_secret)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._event_loop = asyncio.get_running_loop()
        self.loop = EngineLoop(self.engine, self._after_step)

    @property
    def info(self) -> WorkerInfo:
        """What does not change while the worker lives."""
        return WorkerInfo(self.worker_id, self.format_id, self.engine.max_model_len)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs background work to its end, whatever happens to the caller; failures are logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def fetch_prefix(self, reservation: Reservation, known_tokens: int) -> int:
        """Fills a held request's pages from Redis as far as they are there; returns the tokens that are then cached.

        known_tokens: the resume point that the directory named. Anything missing or not authentic ends the hit at the
        resume point before it. What the pages hold past the returned length is undefined.
        """
        cached = reservation.num_cached_tokens
        if self.store is None or known_tokens <= cached:
            return cached
        chain, format_ = reservation.chain, self.engine.page_format
        if format_.num_retrieval_slots:
            indices = range(cached // PAGE_SIZE, min(known_tokens // PAGE_SIZE, len(chain)))
            pages = await self.store.get_pages([PageKey(chain[i], "retrieval") for i in indices])
            reached = (indices.start + len(pages)) * PAGE_SIZE
            known_tokens = known_tokens if reached >= known_tokens else reached // RESUME_INTERVAL * RESUME_INTERVAL
            if known_tokens <= cached:
                return cached
            count = known_tokens // PAGE_SIZE - indices.start
            targets = [reservation.retrieval_pages[i] for i in indices[:count]]
            await self._fill("retrieval", targets, pages[:count])
        if format_.num_streaming_slots:
            window = await self.loop.call(lambda e: e.reserve_window(reservation.request_id, known_tokens))
            have = range(cached // PAGE_SIZE)
            lacking = [i for i in window if i not in have or i not in reservation.streaming_pages]
            pages = await self.store.get_pages([PageKey(chain[i], "streaming") for i in lacking])
            if len(pages) < len(lacking):
                return cached
            await self._fill("streaming", [window[i] for i in lacking], pages)
        return known_tokens

    async def _fill(self, pool: str, units: list[int], pages: Sequence[memoryview]) -> None:
        data = torch.frombuffer(bytearray(b"".join(pages)), dtype=torch.uint8).view(len(pages), -1)
        await self.loop.call(lambda e: e.cache.restore(pool, units, data))

    def _after_step(self, result: StepResult) -> None:
        """On the engine's thread: copies new prefix pages out before the next step may overwrite them."""
        if self.store is None:
            return
        for written in result.written:
            pages: list[tuple[PageKey, memoryview]] = []
            for pool, pairs in (("retrieval", written.retrieval), ("streaming", written.streaming)):
                if pairs and self.store.has_room:
                    data = self.engine.cache.export(pool, [page for _, page in pairs]).numpy()
                    pages += [(PageKey(h, pool), memoryview(row)) for (h, _), row in zip(pairs, data, strict=True)]
            self._event_loop.call_soon_threadsafe(self._publish, written, pages)

    def _publish(self, written: WrittenPages, pages: list[tuple[PageKey, memoryview]]) -> None:
        assert self.store is not None and self.directory is not None
        self.store.put_pages(pages)
        if written.resume_points:
            self.spawn(self.directory.publish(list(written.resume_points), self.worker_id))

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("background work failed: %s", task.exception(), exc_info=task.exception())

    async def close(self) -> None:
        """Stops the engine's thread, then the connections."""
        await asyncio.to_thread(self.loop.stop)
        if self.transfer is not None:
            await asyncio.to_thread(self.transfer.close)
