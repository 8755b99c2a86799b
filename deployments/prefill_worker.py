"""The prefill worker: computes prompts and announces their pages, chunk by chunk, under leases."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

from ray import serve

from lserve.engine.errors import WorkerLostError
from lserve.engine.results import ChunkReady

from .messages import LeaseCall, PrefillRequest, PrefillStarted, WorkerInfo
from .routing import own_worker_id
from .settings import Settings
from .worker import Worker


class PrefillWorker:
    """Ray Serve deployment class; bound in `app.py`."""

    async def __init__(self, settings: Settings) -> None:
        self._worker = Worker(settings, "prefill", own_worker_id())

    async def prefill(self, message: PrefillRequest) -> AsyncIterator[PrefillStarted | ChunkReady]:
        """Who this is, then every chunk as it is done. Closing the iterator drops the request; granted leases live
        on.
        """
        worker = self._worker
        # A retry may come while the first try is still being dropped here.
        request = replace(message.request, request_id=f"{message.request.request_id}~{secrets.token_hex(4)}")
        assert worker.transfer is not None
        yield PrefillStarted(worker.worker_id, worker.transfer.metadata())
        events = worker.loop.subscribe(request.request_id)
        finished = False
        hold = worker.store is not None and message.known_tokens > 0
        try:
            await worker.loop.call(
                lambda e: e.add_request(request, prefill_only=True, hold=hold, have_tokens=message.have_tokens)
            )
            if hold:
                reservation = await events.reservation()
                cached = await worker.fetch_prefix(reservation, message.known_tokens)
                await worker.loop.call(lambda e: e.begin_prefill(request.request_id, cached))
            while not finished:
                chunk = await events.next()
                assert isinstance(chunk, ChunkReady), chunk
                finished = chunk.last
                yield chunk
        finally:
            events.close()
            if not finished:
                worker.spawn(worker.loop.call(lambda e: e.abort(request.request_id)))

    async def release(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease; only what was pulled under a lease that was still held counts."""
        return await self._worker.loop.call(lambda e: [e.leases.release(*lease) for lease in call.leases])

    async def extend(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which from now on lives its whole time again."""
        ttl_s = self._worker.settings.prefill.lease_s
        return await self._worker.loop.call(lambda e: [e.leases.extend(*lease, ttl_s) for lease in call.leases])

    async def info(self) -> WorkerInfo:
        """What does not change while this worker lives."""
        return self._worker.info

    def check_health(self) -> None:
        """Raises when the engine's thread has failed, so that Serve replaces this replica."""
        if self._worker.loop.failure is not None:
            raise WorkerLostError(f"the engine failed: {self._worker.loop.failure}")

    async def __del__(self) -> None:
        await self._worker.close()


prefill_deployment = serve.deployment(PrefillWorker)
