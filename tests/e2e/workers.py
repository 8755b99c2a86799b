"""Prefill and decode workers in one process: real engines, NIXL and Redis; only Ray Serve is left out."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lserve.deployments.decode_worker import DecodeWorker
from lserve.deployments.messages import ChunkReady, LeaseCall, PrefillRequest, PrefillStarted, PrefixHint
from lserve.deployments.prefill_worker import PrefillWorker
from lserve.deployments.settings import Role, Settings, load_settings
from lserve.deployments.worker import Worker
from lserve.engine.errors import WorkerLostError
from lserve.engine.loading import load
from lserve.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob
from lserve.engine.transfer import PageRead, TransferStats

_numbers = itertools.count()


class LocalPool:
    """Prefill workers in this process. Tests set the hooks, which run before or in place of a call.

    calls: what was asked of whom. on_chunk: may wait or raise, before or in place of a chunk. extends: whether calls
    that extend a lease arrive.
    """

    def __init__(self, workers: list[PrefillWorker]) -> None:
        self.workers = workers
        self.calls: list[tuple[str, PrefillRequest]] = []
        self.on_chunk: Callable[[ChunkReady], Any] = lambda chunk: None
        self.extends = True

    async def prefill(self, message: PrefillRequest) -> AsyncGenerator[PrefillStarted | ChunkReady, None]:
        """Of the first preferred worker, else of the next one in turn."""
        worker = self._named(message.prefer) or self.workers[len(self.calls) % len(self.workers)]
        self.calls.append((worker._worker.worker_id, message))
        async with aclosing(worker.prefill(message)) as stream:  # type: ignore[type-var]
            async for item in stream:
                if isinstance(item, ChunkReady):
                    waits = self.on_chunk(item)
                    if waits is not None:
                        await waits
                yield item

    async def release(self, call: LeaseCall) -> list[str]:
        """Answers of the worker that is named."""
        worker = self._named(call.prefer)
        if worker is None:
            raise WorkerLostError("the worker was lost")
        return await worker.release(call)

    async def extend(self, call: LeaseCall) -> list[str]:
        """Answers of the worker that is named."""
        worker = self._named(call.prefer)
        return await worker.extend(call) if worker is not None and self.extends else []

    def _named(self, names: tuple[str, ...]) -> PrefillWorker | None:
        found = [worker for name in names for worker in self.workers if worker._worker.worker_id == name]
        return found[0] if found else None


@dataclass
class Cluster:
    """A decode worker (or several) and its prefill workers."""

    settings: Settings
    prefills: list[PrefillWorker]
    decodes: list[DecodeWorker]
    pool: LocalPool

    @property
    def decode(self) -> DecodeWorker:
        """The first decode worker."""
        return self.decodes[0]

    @property
    def prefill(self) -> PrefillWorker:
        """The first prefill worker."""
        return self.prefills[0]

    async def answer(self, request: Request, hint: PrefixHint | None = None) -> "Answer":
        """What the first decode worker says, to the end."""
        return (await self.answers(request, hint))[0]

    async def answers(self, request: Request, hint: PrefixHint | None = None) -> list["Answer"]:
        """The same, of all choices."""
        answers = [Answer() for _ in range(request.sampling.n)]
        async for outputs in self.decode.generate(request, hint or PrefixHint()):
            for output in outputs:
                answers[output.choice].add(output)
        return answers

    async def idle(self, within_s: float = 1.0) -> None:
        """Waits until no worker holds a page, a tail row or a lease. AssertionError when that takes too long."""
        deadline = time.monotonic() + within_s
        while held := [h for w in (*self.prefills, *self.decodes) if any(h := held_by(await w.counts()))]:
            assert time.monotonic() < deadline, f"still held: {held}"
            await asyncio.sleep(0.01)


def held_by(load: Any) -> tuple[int, ...]:
    """Every count that is zero when a worker is idle."""
    pages = (load.used_pages, load.used_streaming_pages, load.used_rows)
    return (load.running, load.waiting, load.leases, *pages)


@dataclass
class Answer:
    """One choice as a client would collect it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0

    def add(self, output: Output) -> None:
        """The next piece."""
        assert self.finish_reason is None
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.num_cached_tokens = output.num_cached_tokens


@asynccontextmanager
async def cluster(
    model: Path, *overrides: str, prefills: int = 1, decodes: int = 1, redis: str | None = None
) -> AsyncIterator[Cluster]:
    """Workers over a tiny model; int4 pages, both head classes, everything prefilled elsewhere."""
    block = {
        "model": {"path": str(model)},
        "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 8 << 20},
        "sparsity": {"head_profile": str(model / "heads.json"), "token_budget": 1024},
        "prefill": {"replicas": prefills, "local_threshold": 0, "chunk_size": 256},
        "decode": {"replicas": decodes, "max_batch_size": 8},
        "redis": {"url": redis},
    }
    settings = load_settings(block, overrides)
    loaded = load(settings.engine_config())

    def worker(role: Role) -> Worker:
        return Worker(settings, role, f"{role}-{next(_numbers)}", loaded=loaded)

    pool = LocalPool([PrefillWorker(worker("prefill")) for _ in range(prefills)])
    decode = [DecodeWorker(worker("decode"), pool if prefills else None) for _ in range(decodes)]
    made = Cluster(settings, list(pool.workers), decode, pool)
    try:
        yield made
    finally:
        await asyncio.gather(*(w.close() for w in (*made.prefills, *made.decodes)))


def request(prompt: tuple[int, ...], max_tokens: int = 8, **fields: Any) -> Request:
    """A greedy request under a new id; sampling fields by name."""
    ours = {name: fields.pop(name) for name in ("tenant", "emitted", "deadline", "attention") if name in fields}
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | fields)
    return Request(f"request-{next(_numbers)}", prompt, sampling, **ours)


def again(original: Request, **fields: Any) -> Request:
    """The same request under another id."""
    return replace(original, request_id=f"request-{next(_numbers)}", **fields)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids of ordinary tokens."""
    draw = random.Random(seed)
    return tuple(draw.randrange(20, 40_000) for _ in range(length))


class SlowRead:
    """Stands before a decode worker's NIXL reads: the first one waits for `until` before it starts."""

    def __init__(self, decode: DecodeWorker, until: Callable[[], Awaitable[None]]) -> None:
        transfer = decode._worker.transfer
        assert transfer is not None
        self._read, self._until, self.num_reads = transfer.read, until, 0
        transfer.read = self  # type: ignore[method-assign, assignment]

    async def __call__(self, peer: str, reads: Sequence[PageRead], timeout_s: float) -> TransferStats:
        """As `Transfer.read`."""
        self.num_reads += 1
        if self.num_reads == 1:
            await self._until()
        return await self._read(peer, reads, timeout_s)
