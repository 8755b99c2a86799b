"""The decode worker's side of a handoff: one request's pages, from prefill workers into the pages reserved for them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE, RESUME_INTERVAL
from lserve.engine.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LeaseLostError,
    LServeError,
    TransferError,
    WorkerLostError,
)
from lserve.engine.request import Request
from lserve.engine.results import ChunkReady, Reservation
from lserve.engine.transfer import PageRead

from . import tracing
from .messages import LeaseCall, PrefillRequest, PrefillStarted, PrefixHint
from .prefill_pool import PrefillPool
from .worker import Worker

logger = logging.getLogger(__name__)

ATTEMPTS = 3
START_TIMEOUT_S = 5.0
"""How long a prefill worker may take to say who it is: nothing is computed by then."""


class Handoff:
    """Pulls each chunk while the next one is computed; a lost lease or worker costs what it had not delivered yet.

    have_tokens: leading tokens whose pages are here already. Whatever happens, `settle` before the pages are released.
    """

    def __init__(
        self, worker: Worker, pool: PrefillPool, request: Request, reservation: Reservation, have_tokens: int
    ) -> None:
        self._worker, self._pool = worker, pool
        self._request, self._reservation = request, reservation
        self._start = have_tokens
        self._spans: list[tuple[int, int]] = []
        self._reads: list[PageRead] = []
        self._leases: set[LeaseCall] = set()

    @property
    def have_tokens(self) -> int:
        """Leading tokens whose pages are here for good, a multiple of 128."""
        reached = self._start
        for start, end in sorted(self._spans):
            if start <= reached:
                reached = max(reached, end)
        return reached // BLOCK_SIZE * BLOCK_SIZE

    @property
    def _prompt_start(self) -> bytes:
        chain, pages = self._reservation.chain, RESUME_INTERVAL // PAGE_SIZE
        return chain[pages - 1] if len(chain) >= pages else b""

    async def run(self, hint: PrefixHint) -> ChunkReady | None:
        """The last chunk once all pages and the tail are here; None when no prefill worker can do it.

        Raises InvalidRequestError or DeadlineExceededError.
        """
        for attempt in range(ATTEMPTS):
            prefer = () if attempt else hint.worker_ids
            message = PrefillRequest(self._request, self.have_tokens, hint.num_tokens, prefer, self._prompt_start)
            try:
                return await self._attempt(message)
            except (InvalidRequestError, DeadlineExceededError):
                raise
            except LServeError as error:
                name, have = self._request.request_id, self.have_tokens
                self._worker.metrics.kv_transfer_failures.record(1, reason=_reason(error))
                logger.warning("request %s: prefill ended with %d tokens here: %s", name, have, error)
            await self.settle()
        return None

    async def settle(self) -> None:
        """Returns once no read can write this request's pages any more; gives back what is still on lease."""
        if self._reads and self._worker.transfer is not None:
            await self._worker.transfer.settled(self._reads)
        leases, self._leases = self._leases, set()
        await asyncio.gather(*(self._release(lease) for lease in leases), return_exceptions=True)

    async def _attempt(self, message: PrefillRequest) -> ChunkReady | None:
        """One prefill call, to its end; None when there is nobody to call."""
        assert self._worker.transfer is not None
        timeout_s = self._worker.settings.prefill.timeout_s
        pulls: list[asyncio.Task[None]] = []
        agent_name: str | None = None
        try:
            async with aclosing(self._pool.prefill(message)) as stream:
                try:
                    peer = await _next(stream, START_TIMEOUT_S)
                except TimeoutError:
                    return None
                assert isinstance(peer, PrefillStarted), peer
                agent_name = self._worker.transfer.add_peer(peer.peer)
                while True:
                    try:
                        chunk = await _next(stream, timeout_s)
                    except TimeoutError:
                        raise WorkerLostError(f"the prefill worker said nothing for {timeout_s:g} s") from None
                    assert isinstance(chunk, ChunkReady), chunk
                    lease = LeaseCall(((chunk.lease_id, chunk.generation),), (peer.worker_id,))
                    self._leases.add(lease)
                    pulls.append(asyncio.ensure_future(self._pull(chunk, peer, lease)))
                    for pull in [p for p in pulls if p.done()]:
                        pull.result()
                    if chunk.last:  # the call stays open until its leases have ended: a worker drains calls
                        await asyncio.gather(*pulls)
                        return chunk
        except WorkerLostError:
            if agent_name is not None:  # it comes back, if at all, under another name
                self._worker.transfer.remove_peer(agent_name)
            raise
        finally:
            for pull in pulls:
                pull.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)

    async def _pull(self, chunk: ChunkReady, peer: PrefillStarted, lease: LeaseCall) -> None:
        """Reads one chunk's pages; they count only if the lease is still held when the read is done."""
        worker, own = self._worker, self._reservation
        assert worker.transfer is not None
        reads = [PageRead("retrieval", page, own.retrieval_pages[i]) for i, page in chunk.retrieval_pages]
        reads += [PageRead("streaming", page, own.streaming_pages[i]) for i, page in chunk.streaming_pages]
        if chunk.tail_row is not None:
            reads.append(PageRead("tail", chunk.tail_row, own.row))
        self._reads += reads
        async with self._extending(lease):
            with tracing.stage("transfer", self._request.traceparent, num_pages=len(reads), source=peer.worker_id):
                stats = await worker.transfer.read(peer.peer.agent_name, reads, worker.settings.prefill.timeout_s)
        try:
            state = await self._release(lease)
        except WorkerLostError:
            self._leases.discard(lease)  # it runs out by itself: `settle` does not wait for the same answer again
            raise
        self._leases.discard(lease)
        if state != "held":
            raise LeaseLostError(f"the lease on tokens {chunk.start} to {chunk.end} was gone after the pull")
        self._spans.append((chunk.start, chunk.end // PAGE_SIZE * PAGE_SIZE))
        worker.metrics.kv_transfer.record(stats.seconds)
        worker.metrics.kv_transfer_bytes.record(stats.num_bytes)

    async def _release(self, lease: LeaseCall) -> str:
        """`held` or `gone`; raises WorkerLostError when there is no answer within a lease's time, which is `gone`."""
        try:
            async with asyncio.timeout(self._worker.settings.prefill.lease_s):
                (state,) = await self._pool.release(lease)
        except TimeoutError:
            raise WorkerLostError("the prefill worker does not answer") from None
        return state

    @asynccontextmanager
    async def _extending(self, lease: LeaseCall) -> AsyncIterator[None]:
        """Keeps a lease alive meanwhile."""

        async def extend() -> None:
            while True:
                await asyncio.sleep(self._worker.settings.prefill.lease_s / 3)
                await self._pool.extend(lease)

        task = asyncio.ensure_future(extend())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # whether it was held, release says


def _reason(error: LServeError) -> str:
    """The `reason` label of a failed prefill."""
    if isinstance(error, LeaseLostError):
        return "lease_lost"
    if isinstance(error, WorkerLostError):
        return "worker_lost"
    return "transfer" if isinstance(error, TransferError) else "other"


async def _next(
    stream: AsyncGenerator[PrefillStarted | ChunkReady, None], timeout_s: float
) -> PrefillStarted | ChunkReady:
    """The stream's next item. Raises TimeoutError, or WorkerLostError at its end."""
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(stream)
    except StopAsyncIteration:
        raise WorkerLostError("the prefill worker stopped before its last chunk") from None
