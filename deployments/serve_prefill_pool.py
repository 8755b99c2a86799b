"""The prefill workers behind a Ray Serve handle."""

from collections.abc import AsyncGenerator
from typing import cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from .messages import ChunkReady, LeaseCall, PrefillRequest, PrefillStarted
from .serve_errors import SERVE_ERRORS, translated


class ServePrefillPool:
    """The replicas of the prefill deployment; `AddressedRouter` takes each call to the worker that it names."""

    def __init__(self, handle: "DeploymentHandle[object]") -> None:
        self._handle = handle
        self._stream = handle.options(method_name="prefill", stream=True)

    async def prefill(self, message: PrefillRequest) -> AsyncGenerator[PrefillStarted | ChunkReady, None]:
        """Who does it, then every chunk. Closing the generator drops the request."""
        call = self._stream.remote(message)
        response = cast("DeploymentResponseGenerator[PrefillStarted | ChunkReady]", call)
        finished = False
        try:
            async for item in response:
                yield item
            finished = True
        except SERVE_ERRORS as error:
            finished = True
            raise translated(error) from error
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
            return cast("list[str]", await getattr(self._handle, method).remote(call))
        except SERVE_ERRORS as error:
            raise translated(error) from error
