"""The prefill worker: computes prompts and announces their pages, chunk by chunk, under leases."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from lserve.engine.request import Request
from lserve.engine.results import ChunkReady, EngineLoad

from . import tracing
from .engine_loop import Subscription
from .messages import LeaseCall, PrefillLoad, PrefillRequest, PrefillStarted, WorkerInfo
from .metrics import Metrics, ServeInstrument
from .replica_logging import log_to_stderr
from .routing import own_worker_id
from .settings import Settings
from .worker import Worker

LEASE_CHECK_S = 0.5
"""How often a worker looks whether leases have run out that nobody released."""


class PrefillWorker:
    """Computes prompts for decode workers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ended = asyncio.Condition()

    async def prefill(self, message: PrefillRequest) -> AsyncIterator[PrefillStarted | ChunkReady]:
        """Who this is, then every chunk as it is done; ends with their leases, so that a drain waits for them.

        Closing the iterator before drops the request and its leases: what is being read then does not count.
        """
        worker = self._worker
        # A retry may come while the first try is still being dropped here.
        request = replace(message.request, request_id=f"{message.request.request_id}~{secrets.token_hex(4)}")
        assert worker.transfer is not None
        yield PrefillStarted(worker.worker_id, worker.transfer.metadata())
        events = worker.loop.subscribe(request.request_id)
        leases: list[tuple[int, int]] = []
        done = False
        span = tracing.start("prefill", request.traceparent, worker=worker.worker_id)
        try:
            started, cached = await self._start(request, message, events)
            if cached is not None:  # it is pulled while the rest is computed
                leases.append((cached.lease_id, cached.generation))
                yield cached
            while True:
                chunk = await events.next()
                assert isinstance(chunk, ChunkReady), chunk
                leases.append((chunk.lease_id, chunk.generation))
                yield chunk
                if chunk.last:
                    break
            worker.metrics.prefill.record(time.monotonic() - started)
            span.end()
            await self._until_ended(leases)
            done = True
        finally:
            span.end()
            if done:
                events.close()
            else:
                worker.spawn(self._drop(request.request_id, events, leases))

    async def release(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease; only what was pulled under a lease that was still held counts."""
        states = await self._worker.loop.call(lambda e: [e.leases.release(*lease) for lease in call.leases])
        async with self._ended:
            self._ended.notify_all()
        return list(states)

    async def extend(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which from now on lives its whole time again."""
        ttl_s = self._worker.settings.prefill.lease_s
        return await self._worker.loop.call(lambda e: [e.leases.extend(*lease, ttl_s) for lease in call.leases])

    async def load(self) -> PrefillLoad:
        """How much this worker has to do."""
        load = await self._worker.load()
        return PrefillLoad(self._worker.worker_id, load.queued_tokens + load.head_tokens)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy; Ray Serve asks by this name."""
        return await self._worker.autoscaling_stats()

    async def counts(self) -> EngineLoad:
        """Everything that this worker holds."""
        return await self._worker.load()

    async def info(self) -> WorkerInfo:
        """What does not change while this worker lives."""
        return self._worker.info

    def check_health(self) -> None:
        """Raises when the engine's thread has failed, so that Serve replaces this replica."""
        self._worker.check_health()

    async def close(self) -> None:
        """Drains and stops."""
        await self._worker.close()

    async def _start(
        self, request: Request, message: PrefillRequest, events: Subscription
    ) -> tuple[float, ChunkReady | None]:
        """Queues the request and gets it going; returns when its prefill began, in monotonic seconds, and what of it
        was cached, when the decode worker lacks that.
        """
        worker, asked = self._worker, time.monotonic()
        await worker.loop.call(
            lambda e: e.add_request(request, prefill_only=True, hold=True, have_tokens=message.have_tokens)
        )
        reservation = await events.reservation()
        assert reservation is not None
        worker.metrics.queue.record(reservation.admitted_at - asked)
        worker.stats.note_wait(reservation.admitted_at - asked)
        own = cached = reservation.num_cached_tokens
        if message.known_tokens > message.have_tokens:
            cached = await worker.fetch_prefix(reservation, message.known_tokens)
        announced = await worker.loop.call(lambda e: e.begin_prefill(request.request_id, cached))
        worker.count_prefix(len(request.input_token_ids), own, cached)
        return reservation.admitted_at, announced

    async def _until_ended(self, leases: Sequence[tuple[int, int]]) -> None:
        """Waits until every one of these leases was released or has run out."""
        while await self._worker.loop.call(lambda e: any(e.leases.is_alive(*lease) for lease in leases)):
            async with self._ended:
                try:
                    await asyncio.wait_for(self._ended.wait(), LEASE_CHECK_S)
                except TimeoutError:
                    continue

    async def _drop(self, request_id: str, events: Subscription, leases: list[tuple[int, int]]) -> None:
        """Ends a request and its leases, those of chunks that nobody has heard of too."""
        loop = self._worker.loop
        await loop.call(lambda e: e.abort(request_id))
        leases += [(event.lease_id, event.generation) for event in events.close() if isinstance(event, ChunkReady)]
        await loop.call(lambda e: [e.leases.release(*lease) for lease in leases])


class PrefillDeployment(PrefillWorker):
    """The Ray Serve deployment; bound in `app.py`."""

    def __init__(self, settings: Settings) -> None:
        log_to_stderr()
        super().__init__(Worker(settings, "prefill", own_worker_id(), Metrics(ServeInstrument)))

    async def __del__(self) -> None:
        await self.close()
