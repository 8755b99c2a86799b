"""The decode workers behind a Ray Serve handle."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import cast

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lserve.engine.config import PAGE_SIZE
from lserve.engine.errors import WorkerLostError
from lserve.engine.request import Output, Request

from .messages import PrefixHint, WorkerInfo, WorkerLoad
from .serve_errors import SERVE_ERRORS, translated

BUSY_POLL_S, IDLE_POLL_S = 0.25, 2.0
ANSWER_TIMEOUT_S = 2.0
INFO_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class ServePool:
    """The replicas of the decode deployment, behind a Serve handle.

    A request goes to the worker with the fewest reserved pages: as it last said, plus what was sent to it since.
    """

    def __init__(self, handle: "DeploymentHandle[object]") -> None:
        self._handle = handle
        self._stream = handle.options(method_name="generate", stream=True)
        self._info: WorkerInfo | None = None
        self._loads: dict[str, WorkerLoad] = {}
        self._sent_pages: defaultdict[str, int] = defaultdict(int)
        self._polling: asyncio.Task[None] | None = None

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncGenerator[list[Output], None]:
        """Outputs of the request from the least loaded worker, until it is done or the generator is closed."""
        call = self._stream.remote(request, replace(hint, prefer=self._choose(request)))
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
                info: WorkerInfo = await asyncio.wait_for(self._handle.info.remote(), INFO_TIMEOUT_S)
            except TimeoutError:
                raise WorkerLostError("no decode worker answers") from None
            except (RayError, DeploymentUnavailableError) as error:
                raise translated(error) from error
            self._info, self._polling = info, asyncio.create_task(self._poll())
        return self._info

    async def ready(self) -> bool:
        """Whether any worker answers within two seconds: its model is loaded, and its engine's thread takes calls."""
        return any(isinstance(answer, WorkerLoad) for answer in await self._ask("load"))

    def _choose(self, request: Request) -> tuple[str, ...]:
        if len(self._loads) < 2:
            return ()
        pages = {worker: load.reserved_pages + self._sent_pages[worker] for worker, load in self._loads.items()}
        ranked = sorted(pages, key=pages.__getitem__)
        self._sent_pages[ranked[0]] += len(request.input_token_ids) // PAGE_SIZE + request.sampling.n
        return tuple(ranked)

    async def _poll(self) -> None:
        while True:
            is_busy = len(self._loads) > 1 and bool(self._sent_pages)
            self._sent_pages.clear()
            answers = await self._ask("load")
            loads = [answer for answer in answers if isinstance(answer, WorkerLoad)]
            self._loads = {load.worker_id: load for load in loads}
            await asyncio.sleep(BUSY_POLL_S if is_busy else IDLE_POLL_S)

    async def _ask(self, method: str) -> list[object]:
        try:
            broadcast = self._handle.broadcast(method)
            return list(await broadcast.results_async(timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True))
        except Exception as error:
            logger.warning("no decode worker answers to %s: %s", method, error)
            return []
