"""The decode workers behind a Ray Serve handle."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import cast

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lserve.engine.config import PAGE_SIZE
from lserve.engine.errors import WorkerLostError
from lserve.engine.request import Output, Request

from .choices import DecodeChoice
from .load_poll import LoadPoll
from .messages import PrefixHint, WorkerInfo, WorkerLoad
from .routing import call_apart
from .serve_errors import SERVE_ERRORS, translated

INFO_TIMEOUT_S = 10.0


class ServePool:
    """The replicas of the decode deployment, behind a Serve handle.

    A request goes to the worker with the fewest reserved pages: as it last said, plus what was sent to it since.
    """

    def __init__(self, handle: "DeploymentHandle[object]") -> None:
        self._handle = handle
        self._stream = handle.options(method_name="generate", stream=True)
        self._info: WorkerInfo | None = None
        self._choice = DecodeChoice()
        self._poll = LoadPoll(handle, WorkerLoad, self._choice)

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncGenerator[list[Output], None]:
        """Outputs of the request from the least loaded worker, until it is done or the generator is closed."""
        num_pages = len(request.input_token_ids) // PAGE_SIZE + request.sampling.n
        call = call_apart(self._stream.remote, request, replace(hint, prefer=self._choice.rank(num_pages)))
        response = cast("DeploymentResponseGenerator[list[Output]]", call)
        finished = False
        try:
            async for outputs in response:
                yield outputs
            finished = True
        except SERVE_ERRORS as error:
            finished = True
            raise translated(error) from error
        finally:
            if not finished:
                response.cancel()  # type: ignore[no-untyped-call]

    async def info(self) -> WorkerInfo:
        """Of any worker, asked once."""
        if self._info is None:
            try:
                info: WorkerInfo = await asyncio.wait_for(call_apart(self._handle.info.remote), INFO_TIMEOUT_S)
            except TimeoutError:
                raise WorkerLostError("no decode worker answers") from None
            except (RayError, DeploymentUnavailableError) as error:
                raise translated(error) from error
            self._info = info
            self._poll.start()
        return self._info

    async def ready(self) -> bool:
        """Whether any worker answers within two seconds: its model is loaded, and its engine's thread takes calls."""
        return bool(await self._poll.ask())
