"""The prefill workers behind a Ray Serve handle."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lserve.engine.errors import WorkerLostError

from .choices import PrefillChoice
from .load_poll import LoadPoll
from .messages import ChunkReady, LeaseCall, PrefillLoad, PrefillRequest, PrefillStarted
from .routing import call_apart
from .serve_errors import SERVE_ERRORS, translated


class ServePrefillPool:
    """The replicas of the prefill deployment; `AddressedRouter` takes each call to the worker that it names.

    A prompt goes to the worker that will be done with it first; `PrefillRequest.prefer` says who holds its prefix.
    """

    def __init__(self, handle: "DeploymentHandle[object]") -> None:
        self._handle = handle
        self._stream = handle.options(method_name="prefill", stream=True)
        self._choice = PrefillChoice()
        self._poll = LoadPoll(handle, PrefillLoad, self._choice)

    async def prefill(self, message: PrefillRequest) -> AsyncGenerator[PrefillStarted | ChunkReady, None]:
        """Who does it, then every chunk. Closing the generator drops the request."""
        self._poll.start()
        length, have = len(message.request.input_token_ids), message.have_tokens
        cached = max(message.known_tokens - have, 0) if message.prefer else 0
        ranked = self._choice.rank(length - have, cached, message.prefer, message.start)
        call = call_apart(self._stream.remote, replace(message, prefer=ranked))
        response = cast("DeploymentResponseGenerator[PrefillStarted | ChunkReady]", call)
        finished = False
        try:
            async for item in response:
                yield item
            finished = True
        except SERVE_ERRORS as error:
            finished = True
            lost = translated(error)
            if ranked and isinstance(lost, WorkerLostError):
                self._choice.lost(ranked[0])
            raise lost from error
        finally:
            if not finished:
                response.cancel()  # type: ignore[no-untyped-call]

    async def release(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which ends."""
        return await self._ask("release", call)

    async def extend(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which lives its whole time again."""
        return await self._ask("extend", call)

    async def _ask(self, method: str, call: LeaseCall) -> list[str]:
        try:
            return cast("list[str]", await call_apart(getattr(self._handle, method).remote, call))
        except SERVE_ERRORS as error:
            raise translated(error) from error
