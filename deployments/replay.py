"""One unbroken stream per request, although the worker behind it may change.

The router remembers the tokens that it passed on. When a worker is lost, every unfinished choice is asked again of
another worker, with those tokens as `Request.emitted`: they count as output there, and only what follows is reported.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from lserve.engine.errors import WorkerLostError
from lserve.engine.request import FinishReason, Output, Request

from .messages import PrefixHint
from .pool import WorkerGoneError, WorkerPool

BACKOFF_S = 0.05


@dataclass(slots=True)
class Budget:
    """How often a request may still be replayed, all its choices together; `spent` numbers the attempts."""

    retries: int
    spent: int = 0

    def spend(self) -> None:
        """Takes one retry. Raises WorkerLostError when none is left."""
        if self.spent >= self.retries:
            raise WorkerLostError(f"the request lost its worker {self.spent + 1} times; retries are used up")
        self.spent += 1


@dataclass(slots=True)
class Journal:
    """What was passed on of one request."""

    request: Request
    emitted: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    def record(self, outputs: Sequence[Output]) -> list[Output]:
        """Notes outputs and returns those to pass on: not what says that the worker gave the request up."""
        passed = [output for output in outputs if output.finish_reason is not FinishReason.ABORT]
        for output in passed:
            self.emitted.setdefault(output.choice, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished.add(output.choice)
        return passed

    def open_requests(self, attempt: int) -> list[Request]:
        """What is left to ask: the request itself when nothing came of it, else one request per unfinished choice."""
        name = f"{self.request.request_id}.{attempt}"
        if not self.emitted:
            return [replace(self.request, request_id=name)]
        first, n = self.request.choice, self.request.sampling.n
        return [
            replace(
                self.request,
                request_id=f"{name}.{choice}",
                choice=choice,
                sampling=replace(self.request.sampling, n=1),
                emitted=self.request.emitted + tuple(self.emitted.get(choice, ())),
            )
            for choice in range(first, first + n)
            if choice not in self.finished
        ]


async def unbroken(
    pool: WorkerPool, request: Request, hint: PrefixHint, budget: Budget
) -> AsyncGenerator[list[Output], None]:
    """Outputs of every choice to its end. Raises WorkerLostError when the budget is used up."""
    journal = Journal(request)
    try:
        async with aclosing(pool.generate(request, hint)) as stream:
            async for outputs in stream:
                passed = journal.record(outputs)
                if passed:
                    yield passed
                if len(passed) < len(outputs):
                    break
    except WorkerGoneError:
        pass
    if len(journal.finished) == request.sampling.n:
        return
    budget.spend()
    await asyncio.sleep(BACKOFF_S * budget.spent)
    remaining = [unbroken(pool, one, hint, budget) for one in journal.open_requests(budget.spent)]
    async with aclosing(remaining[0] if len(remaining) == 1 else merged(remaining)) as stream:
        async for outputs in stream:
            yield outputs


async def merged(
    streams: Sequence[AsyncGenerator[list[Output], None]], timeout_s: float | None = None
) -> AsyncGenerator[list[Output], None]:
    """Outputs of all streams as they come; everything that came since the last take is one item.

    So a slow reader gets few large items. The first error ends all streams, and so does TimeoutError when one of them
    takes longer than timeout_s; closing this closes them.
    """
    ready: list[Output] = []
    news = asyncio.Event()

    async def pump(stream: AsyncGenerator[list[Output], None]) -> None:
        try:
            async with asyncio.timeout(timeout_s), aclosing(stream):
                async for outputs in stream:
                    ready.extend(outputs)
                    news.set()
        finally:
            news.set()

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        while True:
            await news.wait()
            news.clear()
            if ready:
                taken, ready[:] = list(ready), []
                yield taken
            for task in tasks:
                if task.done():
                    task.result()
            if not ready and all(task.done() for task in tasks):
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
