"""A decode worker without an engine: letters at a given pace, for router tests and the benchmark of its overhead."""

import asyncio
import os
from collections.abc import AsyncIterator

from lserve.deployments.messages import PrefixHint, WorkerInfo, WorkerLoad
from lserve.deployments.routing import own_worker_id
from lserve.engine.errors import CapacityError, PromptTooLongError
from lserve.engine.request import FinishReason, Output, Request

MAX_MODEL_LEN = 32_768
ERRORS = {429: CapacityError("full"), 413: PromptTooLongError("long"), 500: RuntimeError("ours")}
"""What the worker raises for these seeds."""


class StubWorker:
    """One token per choice every `interval_s`; all requests of the worker step together, as in an engine."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._running = 0

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncIterator[list[Output]]:
        """max_tokens tokens of each choice; tokens that came while the caller was busy go together."""
        if request.sampling.seed in ERRORS:
            raise ERRORS[request.sampling.seed]
        self._running += 1
        try:
            sampling, start = request.sampling, asyncio.get_running_loop().time()
            sent = len(request.emitted)
            while sent < sampling.max_tokens:
                now = asyncio.get_running_loop().time()
                due = sampling.max_tokens
                if self._interval_s:
                    due = min(due, len(request.emitted) + 1 + int((now - start) / self._interval_s))
                if due > sent:
                    yield [_output(request, choice, sent, due) for choice in range(sampling.n)]
                    sent = due
                await asyncio.sleep(max(0.0, start + (sent - len(request.emitted)) * self._interval_s - now))
        finally:
            self._running -= 1

    async def info(self) -> WorkerInfo:
        """As of an engine."""
        return WorkerInfo(own_worker_id(), "stub", MAX_MODEL_LEN)

    async def load(self) -> WorkerLoad:
        """One page per request."""
        return WorkerLoad(own_worker_id(), self._running, 1 << 20, self._running, 0)

    async def process_id(self) -> tuple[int, int]:
        """(running requests, process id), for tests that kill it."""
        return self._running, os.getpid()


def _output(request: Request, choice: int, start: int, end: int) -> Output:
    done = end == request.sampling.max_tokens
    tokens = tuple(ord("a") + position % 26 for position in range(start, end))
    return Output(
        request.request_id,
        request.choice + choice,
        tokens,
        bytes(tokens).decode(),
        finish_reason=FinishReason.LENGTH if done else None,
    )
