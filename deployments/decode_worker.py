"""The decode worker: owns a request from the router's call to its last token."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE
from lserve.engine.errors import (
    CapacityError,
    DeadlineExceededError,
    LeaseLostError,
    TransferError,
    WorkerLostError,
)
from lserve.engine.request import Output, Request
from lserve.engine.results import ChunkReady, Reservation
from lserve.engine.transfer import PageRead

from .messages import LeaseCall, PrefillRequest, PrefillStarted, PrefixHint, WorkerInfo, WorkerLoad
from .routing import own_worker_id
from .settings import Settings
from .worker import Worker

logger = logging.getLogger(__name__)

PREFILL_ATTEMPTS = 3


class DecodeWorker:
    """Ray Serve deployment class; bound in `app.py`. prefill: handle of the prefill deployment, None when unified."""

    async def __init__(self, settings: Settings, prefill: DeploymentHandle | None = None) -> None:
        self._worker = Worker(settings, "decode", own_worker_id())
        self._prefill = prefill

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncIterator[list[Output]]:
        """Answers a request; each item holds the tokens since the last one. Closing the iterator drops the request.

        Raises InvalidRequestError, PromptTooLongError, CapacityError, DeadlineExceededError or WorkerLostError.
        """
        worker = self._worker
        events = worker.loop.subscribe(request.request_id)
        left = request.sampling.n
        pulls = _Pulls()
        try:
            await worker.loop.call(lambda e: e.add_request(request, hold=True))
            async with asyncio.timeout(_seconds_left(request)):
                reservation = await events.reservation()
                await self._fill(request, hint, reservation, pulls)
            async for outputs in events.outputs():
                left -= sum(output.finish_reason is not None for output in outputs)
                yield outputs
                if not left:
                    return
        except TimeoutError:
            raise DeadlineExceededError(
                f"request {request.request_id} passed its deadline before its first token"
            ) from None
        finally:
            events.close()
            if left:
                worker.spawn(self._abandon(request.request_id, pulls))

    async def load(self) -> WorkerLoad:
        """How full this worker is."""
        load = await self._worker.loop.call(lambda e: e.load())
        return WorkerLoad(self._worker.worker_id, load.used_pages, load.total_pages, load.running, load.waiting)

    async def info(self) -> WorkerInfo:
        """What does not change while this worker lives."""
        return self._worker.info

    async def cancel(self, request_id: str) -> bool:
        """Drops a request; False when it is not here (any more)."""
        return await self._worker.loop.call(lambda e: e.abort(request_id))

    def check_health(self) -> None:
        """Raises when the engine's thread has failed, so that Serve replaces this replica."""
        if self._worker.loop.failure is not None:
            raise WorkerLostError(f"the engine failed: {self._worker.loop.failure}")

    async def __del__(self) -> None:
        await self._worker.close()

    async def _fill(self, request: Request, hint: PrefixHint, reservation: Reservation, pulls: "_Pulls") -> None:
        """Fills the reserved pages: own pages, Redis, a prefill worker, or this worker itself."""
        worker, length = self._worker, len(request.input_token_ids)
        threshold = worker.settings.prefill.local_threshold
        cached = reservation.num_cached_tokens
        if self._prefill is not None and length - max(cached, hint.num_tokens) > threshold:
            if await self._prefill_elsewhere(request, hint, reservation, pulls):
                return
            cached = reservation.num_cached_tokens
        cached = await worker.fetch_prefix(reservation, hint.num_tokens)
        await worker.loop.call(lambda e: e.begin_prefill(request.request_id, cached))

    async def _prefill_elsewhere(
        self, request: Request, hint: PrefixHint, reservation: Reservation, pulls: "_Pulls"
    ) -> bool:
        """Asks prefill workers, at most three times; False when none could do it."""
        have = pulls.start = reservation.num_cached_tokens
        for attempt in range(PREFILL_ATTEMPTS):
            prefer = hint.worker_ids if attempt == 0 else ()
            message = PrefillRequest(request, have, hint.num_tokens, prefer)
            try:
                await self._pull_all(message, reservation, pulls)
                return True
            except (RayError, LeaseLostError, TransferError, WorkerLostError, CapacityError) as error:
                have = pulls.complete_tokens
                logger.warning(
                    "request %s: prefill attempt %d ended after %d tokens: %s",
                    request.request_id,
                    attempt + 1,
                    have,
                    error,
                )
                await pulls.settle(self._worker)
        return False

    async def _pull_all(self, message: PrefillRequest, reservation: Reservation, pulls: "_Pulls") -> None:
        """One prefill call: pulls each chunk while the next is computed, then starts decoding."""
        worker, request_id = self._worker, message.request.request_id
        assert self._prefill is not None and worker.transfer is not None
        stream = self._prefill.options(stream=True).prefill.remote(message)
        tasks: list[asyncio.Task[None]] = []
        try:
            peer, last = None, None
            async for item in stream:
                if isinstance(item, PrefillStarted):
                    worker.transfer.add_peer(item.peer)
                    peer = item
                    continue
                assert peer is not None
                for done in [t for t in tasks if t.done()]:
                    done.result()
                tasks.append(asyncio.ensure_future(self._pull(item, peer, reservation, pulls)))
                last = item
            await asyncio.gather(*tasks)
            if last is None or not last.last:
                raise WorkerLostError("the prefill worker stopped before its last chunk")
            tokens, cached = last.first_tokens, max(last.num_cached_tokens, reservation.num_cached_tokens)
            await worker.loop.call(lambda e: e.begin_decode(request_id, tokens, cached))
        except BaseException:
            stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _pull(self, chunk: ChunkReady, peer: PrefillStarted, reservation: Reservation, pulls: "_Pulls") -> None:
        """Reads one chunk's pages; they count only if the lease is still held when the read is done."""
        worker = self._worker
        assert self._prefill is not None and worker.transfer is not None
        reads = [PageRead("retrieval", page, reservation.retrieval_pages[i]) for i, page in chunk.retrieval_pages]
        reads += [PageRead("streaming", page, reservation.streaming_pages[i]) for i, page in chunk.streaming_pages]
        if chunk.tail_row is not None:
            reads.append(PageRead("tail", chunk.tail_row, reservation.row))
        pulls.reads += reads
        call = LeaseCall(((chunk.lease_id, chunk.generation),), (peer.worker_id,))
        extending = asyncio.ensure_future(self._extend(call))
        try:
            stats = await worker.transfer.read(peer.peer.agent_name, reads, worker.settings.prefill.timeout_s)
        finally:
            extending.cancel()
        (state,) = await self._prefill.release.remote(call)
        if state != "held":
            raise LeaseLostError(f"the lease on tokens {chunk.start} to {chunk.end} was gone after the pull")
        pulls.chunks.append((chunk.start, chunk.end // PAGE_SIZE * PAGE_SIZE))
        pulls.num_bytes += stats.num_bytes

    async def _extend(self, call: LeaseCall) -> None:
        """Keeps a lease alive while its pages are being read."""
        assert self._prefill is not None
        while True:
            await asyncio.sleep(self._worker.settings.prefill.lease_s / 3)
            await self._prefill.extend.remote(call)

    async def _abandon(self, request_id: str, pulls: "_Pulls") -> None:
        """Drops a request once nothing can write its pages any more."""
        await pulls.settle(self._worker)
        await self._worker.loop.call(lambda e: e.abort(request_id))


class _Pulls:
    """What was read for one request so far: all reads, and the spans of tokens whose leases were held.

    start: leading tokens that were here before the first pull.
    """

    def __init__(self) -> None:
        self.start = 0
        self.reads: list[PageRead] = []
        self.chunks: list[tuple[int, int]] = []
        self.num_bytes = 0

    @property
    def complete_tokens(self) -> int:
        """Leading tokens whose pages are here for good, a multiple of 128."""
        reached = self.start
        for start, end in sorted(self.chunks):
            if start <= reached:
                reached = max(reached, end)
        return reached // BLOCK_SIZE * BLOCK_SIZE

    async def settle(self, worker: Worker) -> None:
        """Waits until no read can write its pages any more."""
        if self.reads and worker.transfer is not None:
            await worker.transfer.settled(self.reads)


def _seconds_left(request: Request) -> float | None:
    left = request.deadline - time.time()
    return None if left == float("inf") else max(left, 0.0)


decode_deployment = serve.deployment(DecodeWorker)
