"""The decode worker: owns a request from the router's call to its last token."""

import asyncio
import time
from collections.abc import AsyncIterator

from ray.serve.handle import DeploymentHandle

from lserve.engine.errors import DeadlineExceededError
from lserve.engine.request import Output, Request
from lserve.engine.results import EngineLoad, Reservation

from .handoff import Handoff
from .messages import PrefixHint, WorkerInfo, WorkerLoad
from .metrics import Metrics, ServeInstrument
from .prefill_pool import PrefillPool
from .replica_logging import log_to_stderr
from .routing import own_worker_id
from .serve_prefill_pool import ServePrefillPool
from .settings import Settings
from .tracing import Span, stage, start
from .worker import Worker


class DecodeWorker:
    """Answers requests. prefill: None makes it prefill everything itself."""

    def __init__(self, worker: Worker, prefill: PrefillPool | None) -> None:
        self._worker, self._prefill = worker, prefill

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncIterator[list[Output]]:
        """Answers a request; each item holds the tokens since the last one. Closing the iterator drops the request.

        Raises InvalidRequestError, PromptTooLongError, CapacityError, DeadlineExceededError or WorkerLostError.
        """
        worker, asked = self._worker, time.monotonic()
        events = worker.loop.subscribe(request.request_id)
        left = request.sampling.n
        handoffs: list[Handoff] = []
        prefilling: float | None = None
        has_begun = False
        span: Span | None = None
        try:
            async with asyncio.timeout(_seconds_left(request)):
                with stage("queue", request.traceparent, worker=worker.worker_id):
                    await worker.loop.call(lambda e: e.add_request(request, hold=True))
                    reservation = await events.reservation()
                if reservation is not None:
                    worker.metrics.queue.record(reservation.admitted_at - asked)
                    worker.stats.note_wait(reservation.admitted_at - asked)
                    prefilling = await self._fill(request, hint, reservation, handoffs)
                    if prefilling is not None:
                        span = start("prefill", request.traceparent, worker=worker.worker_id)
            async for outputs in events.outputs():
                if prefilling is not None:
                    worker.metrics.prefill.record(time.monotonic() - prefilling)
                    prefilling = None
                if not has_begun:
                    has_begun = True
                    if span is not None:
                        span.end()
                    span = start("decode", request.traceparent, worker=worker.worker_id)
                    worker.stats.note_first_token(time.monotonic() - asked)
                left -= sum(output.finish_reason is not None for output in outputs)
                yield outputs
                if not left:
                    return
        except TimeoutError:
            message = f"request {request.request_id} passed its deadline before its first token"
            raise DeadlineExceededError(message) from None
        finally:
            events.close()
            if span is not None:
                span.end()
            if left:
                worker.spawn(self._abandon(request.request_id, handoffs))

    async def load(self) -> WorkerLoad:
        """How full this worker is."""
        load = await self._worker.load()
        pages = load.used_pages + load.waiting_pages
        return WorkerLoad(self._worker.worker_id, pages, load.total_pages, load.running, load.waiting)

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

    async def _fill(
        self, request: Request, hint: PrefixHint, reservation: Reservation, handoffs: list[Handoff]
    ) -> float | None:
        """Fills the reserved pages: own pages, Redis, a prefill worker, or this worker itself.

        Returns when prefill began (monotonic seconds) if it happens here, and goes on.
        """
        worker, length = self._worker, len(request.input_token_ids)
        threshold = worker.settings.prefill.local_threshold
        own = cached = reservation.num_cached_tokens
        if self._prefill is None or length - hint.num_tokens <= threshold:
            cached = await worker.fetch_prefix(reservation, hint.num_tokens)
        if self._prefill is not None and length - cached > threshold:
            handoff = Handoff(worker, self._prefill, request, reservation, cached)
            handoffs.append(handoff)
            last = await handoff.run(hint)
            if last is not None:
                reused = max(last.num_cached_tokens, cached)
                await worker.loop.call(lambda e: e.begin_decode(request.request_id, last.first_tokens, reused))
                return None
            cached = await worker.fetch_prefix(reservation, hint.num_tokens)
        worker.count_prefix(length, own, cached)
        await worker.loop.call(lambda e: e.begin_prefill(request.request_id, cached))
        return time.monotonic()

    async def _abandon(self, request_id: str, handoffs: list[Handoff]) -> None:
        """Drops a request once nothing can write its pages any more."""
        for handoff in handoffs:
            await handoff.settle()
        await self._worker.loop.call(lambda e: e.abort(request_id))


class DecodeDeployment(DecodeWorker):
    """The Ray Serve deployment; bound in `app.py`. prefill: handle of the prefill deployment, None when unified."""

    def __init__(self, settings: Settings, prefill: "DeploymentHandle[object] | None" = None) -> None:
        log_to_stderr()
        worker = Worker(settings, "decode", own_worker_id(), Metrics(ServeInstrument))
        super().__init__(worker, None if prefill is None else ServePrefillPool(prefill))

    async def __del__(self) -> None:
        await self.close()


def _seconds_left(request: Request) -> float | None:
    left = request.deadline - time.time()
    return None if left == float("inf") else max(left, 0.0)
