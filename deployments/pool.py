"""The decode workers as the router sees them: something that answers requests and says how full it is."""

from collections.abc import AsyncGenerator
from typing import Protocol

from lserve.engine.errors import WorkerLostError
from lserve.engine.request import Output, Request

from .messages import PrefixHint, WorkerInfo


class WorkerGoneError(WorkerLostError):
    """The worker that held a request is gone; another one can go on with it."""


class WorkerPool(Protocol):
    """Where the router sends requests."""

    def generate(self, request: Request, hint: PrefixHint) -> AsyncGenerator[list[Output], None]:
        """Outputs as they come. Closing the generator aborts the request.

        Raises WorkerGoneError when the worker is lost, and whatever LServeError the worker raises.
        """

    async def info(self) -> WorkerInfo:
        """Of any worker: they serve the same model. Raises WorkerLostError when there is none."""

    async def ready(self) -> bool:
        """Whether a worker can produce tokens now."""
