"""What prefill and decode workers share: an engine on its own thread, NIXL, the prefix pages in Redis, and metrics."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

import torch

from lserve.engine.config import PAGE_SIZE, RESUME_INTERVAL
from lserve.engine.engine import Engine
from lserve.engine.errors import CapacityError, WorkerLostError
from lserve.engine.loading import LoadedModel, load
from lserve.engine.prefix_index import PrefixIndex
from lserve.engine.prefix_store import PrefixStore
from lserve.engine.results import EngineLoad, Reservation, StepResult, WrittenPages
from lserve.engine.sealed_page import PageKey
from lserve.engine.transfer import Transfer
from lserve.engine.warm_up import warm_up

from .autoscaling import Targets, reported
from .directory import Directory
from .engine_loop import EngineLoop
from .messages import WorkerInfo
from .metrics import Metrics
from .settings import Role, Settings, cluster_secret, secret
from .worker_report import WorkerReport
from .worker_stats import StatsWindow

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
PUBLISH_BATCH = 16
PUBLISH_S = 2.0
"""What a worker that leaves has for Redis, once its requests have taken all of `drain_s`."""


class Worker:
    """One engine and its connections. Create it inside a running event loop.

    metrics: where to count; None keeps the counts in memory. loaded: the model, where the process has it already.
    """

    def __init__(
        self,
        settings: Settings,
        role: Role,
        worker_id: str,
        metrics: Metrics | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self.settings, self.role, self.worker_id = settings, role, worker_id
        self.metrics = metrics or Metrics()
        config = settings.engine_config(role)
        resources = settings.prefill if role == "prefill" else settings.decode
        self._drain_s = resources.drain_s
        if config.device == "cpu":
            torch.set_num_threads(max(1, int(resources.num_cpus)))
        key = cluster_secret(settings)
        self.engine = Engine(config, loaded or load(config), key, lease_ttl_s=settings.prefill.lease_s)
        if self.engine.cache.device.type == "cuda":
            warm_up(self.engine, decodes=role == "decode")
        self.format_id = self.engine.page_format.format_id
        self.transfer: Transfer | None = None
        if settings.prefill.replicas:
            self.transfer = Transfer(f"{role}-{worker_id}", self.engine.cache.pools, format_id=self.format_id)
        self.store: PrefixStore | None = None
        self.directory: Directory | None = None
        if settings.redis.url is not None and config.cache.prefix_cache:
            redis = settings.redis
            self.store = PrefixStore(
                settings.redis.url,
                key,
                self.format_id,
                password=secret(redis.password_env),
                ca=redis.ca,
                ttl_s=redis.ttl_s,
                timeout_s=redis.timeout_s,
                max_pending_bytes=redis.max_pending_bytes,
            )
            self.directory = Directory.from_settings(settings, key)
        self.stats = StatsWindow()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._event_loop = asyncio.get_running_loop()
        self.loop = EngineLoop(self.engine, self._after_step)
        self._reporting = asyncio.create_task(self._report())

    @property
    def info(self) -> WorkerInfo:
        """What does not change while the worker lives."""
        return WorkerInfo(self.worker_id, self.format_id, self.engine.max_model_len)

    async def load(self) -> EngineLoad:
        """How full the engine is."""
        return await self.loop.call(lambda e: e.load())

    async def autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy goes by; only decode workers can run out of places in the batch."""
        batch = self.settings.decode.max_batch_size if self.role == "decode" else None
        ours = self.settings.autoscaling
        targets = Targets(ours.ttft_target_s, ours.itl_target_s, ours.page_use, ours.busy, ours.shrink_after_s)
        return reported(self.stats.stats(await self.load(), batch), targets)

    def check_health(self) -> None:
        """Raises WorkerLostError when the engine's thread has failed."""
        if self.loop.failure is not None:
            raise WorkerLostError(f"the engine failed: {self.loop.failure!r}")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs background work to its end, whatever happens to the caller; failures are logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def fetch_prefix(self, reservation: Reservation, known_tokens: int) -> int:
        """Fills a held request's pages from Redis as far as they are there; returns the tokens that are then cached.

        known_tokens: the resume point that the directory named. Anything missing or not authentic ends the hit at the
        resume point before it. What the retrieval pages hold past the returned length is undefined.
        """
        chain, cached = reservation.chain, reservation.num_cached_tokens
        reach = min(known_tokens, len(chain) * PAGE_SIZE)
        if self.store is None or reach <= cached:
            return cached
        page_format = self.engine.page_format
        if page_format.num_retrieval_slots:
            indices = range(cached // PAGE_SIZE, reach // PAGE_SIZE)
            pages = await self.store.get_pages([PageKey(chain[i], "retrieval") for i in indices])
            found = cached + len(pages) * PAGE_SIZE
            reach = reach if found >= reach else found // RESUME_INTERVAL * RESUME_INTERVAL
            if reach <= cached:
                return cached
            count = reach // PAGE_SIZE - indices.start
            await self._fill("retrieval", [reservation.retrieval_pages[i] for i in indices[:count]], pages[:count])
        if page_format.num_streaming_slots and not await self._fetch_window(reservation, reach):
            return cached
        return reach

    async def _fetch_window(self, reservation: Reservation, num_tokens: int) -> bool:
        """The streaming pages that are needed to go on from num_tokens; False when they are not all to be had.

        They are reserved only once their bytes are here: whatever a sequence holds may go into the prefix index.
        """
        assert self.store is not None
        first = reservation.num_cached_tokens // PAGE_SIZE
        window = self.engine.residency.streaming_pages_to_resume(num_tokens)
        lacking = [i for i in window if i >= first or i not in reservation.streaming_pages]
        pages = await self.store.get_pages([PageKey(reservation.chain[i], "streaming") for i in lacking])
        if len(pages) < len(lacking):
            return False
        data = _tensor(pages)

        def reserve_and_write(engine: Engine) -> None:
            own = engine.reserve_window(reservation.request_id, num_tokens)
            if lacking:
                engine.cache.restore("streaming", [own[i] for i in lacking], data)

        try:
            await self.loop.call(reserve_and_write)
        except CapacityError:
            return False
        return True

    async def _fill(self, pool: str, units: list[int], pages: Sequence[memoryview]) -> None:
        data = _tensor(pages)
        await self.loop.call(lambda e: e.cache.restore(pool, units, data))

    def count_prefix(self, prompt_tokens: int, pool_tokens: int, cached_tokens: int) -> None:
        """Counts where a prompt's tokens came from: this worker's pool, Redis (up to cached_tokens), or neither."""
        tiers = {"pool": pool_tokens, "redis": cached_tokens - pool_tokens, "miss": prompt_tokens - cached_tokens}
        for tier, tokens in tiers.items():
            if tokens > 0:
                self.metrics.prefix_tokens.record(tokens, tier=tier)

    def _after_step(self, result: StepResult) -> None:
        """On the engine's thread: copies new prefix pages out before the next step may overwrite them."""
        published: list[tuple[WrittenPages, list[tuple[PageKey, memoryview]]]] = []
        for written in result.written if self.store is not None else ():
            pages: list[tuple[PageKey, memoryview]] = []
            for pool, pairs in (("retrieval", written.retrieval), ("streaming", written.streaming)):
                if pairs and self.store is not None and self.store.has_room:
                    data = self.engine.cache.export(pool, [page for _, page in pairs]).numpy()
                    pages += [
                        (PageKey(h, "retrieval" if pool == "retrieval" else "streaming"), memoryview(row))
                        for (h, _), row in zip(pairs, data, strict=True)
                    ]
            published.append((written, pages))
        if published or result.density:
            self.loop.call_soon(lambda: self._note(result, published))

    def _note(self, result: StepResult, published: list[tuple[WrittenPages, list[tuple[PageKey, memoryview]]]]) -> None:
        self.stats.note_step(result.seconds, result.prefill_tokens, "decode" in result.density)
        for phase, fraction in result.density.items():
            self.metrics.attention_density.record(fraction, phase=phase)
        for written, pages in published:
            assert self.store is not None and self.directory is not None
            self.store.put_pages(pages)
            if written.resume_points:
                self.spawn(self.directory.publish(list(written.resume_points), self.worker_id))

    async def _report(self) -> None:
        """Says how this worker is, again and again."""
        report = WorkerReport(self.metrics)
        while True:
            load, leases = await self.loop.call(lambda e: (e.load(), e.leases.counts))
            report.record(load, leases, self.store)
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("background work failed: %s", task.exception(), exc_info=task.exception())

    async def publish_rest(self, deadline: float) -> None:
        """Writes to Redis what this worker's prefix cache holds and Redis does not, until the deadline (monotonic).

        Pages are written as they are computed, but dropped while too many wait or Redis is down.
        """
        index = self.engine.index
        if self.store is None or index is None or self.loop.failure is not None:
            return
        keys = await self.loop.call(lambda e: index.keys())
        limit = time.monotonic() + PUBLISH_S
        while (missing := await self.store.missing(keys)) is None:
            if time.monotonic() > limit:
                return
            await asyncio.sleep(0.1)
        for start in range(0, len(missing), PUBLISH_BATCH):
            while not self.store.has_room:
                if time.monotonic() > deadline:
                    return
                await asyncio.sleep(0.02)
            if time.monotonic() > deadline:
                return
            batch = missing[start : start + PUBLISH_BATCH]
            self.store.put_pages(await self.loop.call(partial(_kept_pages, index, batch)))
        await asyncio.to_thread(self.store.flush, max(deadline - time.monotonic(), 0.0))
        if missing and self.directory is not None:
            await self.directory.publish(await self.loop.call(lambda e: index.resume_points()), self.worker_id)

    async def close(self) -> None:
        """Waits for what is still held, at most `drain_s`; then stops the engine's thread and the connections."""
        deadline = time.monotonic() + self._drain_s
        while self.loop.failure is None and time.monotonic() < deadline:
            load = await self.load()
            if not (self._tasks or load.leases or load.running or load.waiting):
                break
            await asyncio.sleep(0.02)
        await self.publish_rest(max(deadline, time.monotonic() + PUBLISH_S))
        for task in (self._reporting, *self._tasks):
            task.cancel()
        await asyncio.to_thread(self.loop.stop)
        await asyncio.gather(self._reporting, *self._tasks, return_exceptions=True)
        if self.transfer is not None:
            await asyncio.to_thread(self.transfer.close)
        if self.store is not None and self.directory is not None:
            await asyncio.to_thread(self.store.close)
            await self.directory.close()


def _kept_pages(index: PrefixIndex, keys: Sequence[PageKey], engine: Engine) -> list[tuple[PageKey, memoryview]]:
    """Copies of those pages that are still kept under these keys; between steps, so that nothing overwrites them."""
    kept = [(key, page) for key in keys if (page := index.page(key)) is not None]
    copies: list[tuple[PageKey, memoryview]] = []
    for pool in ("retrieval", "streaming"):
        ours = [(key, page) for key, page in kept if key.head_class == pool]
        if ours:
            data = engine.cache.export(pool, [page for _, page in ours]).numpy()
            copies += [(key, memoryview(row)) for (key, _), row in zip(ours, data, strict=True)]
    return copies


def _tensor(pages: Sequence[memoryview]) -> torch.Tensor:
    """uint8 [pages, page bytes], a copy."""
    if not pages:
        return torch.empty(0, 0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(pages)), dtype=torch.uint8).view(len(pages), -1)
