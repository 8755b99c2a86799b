"""Asks all replicas of a deployment again and again how much they have to do."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from ray.serve.handle import DeploymentHandle

BUSY_POLL_S, IDLE_POLL_S = 0.25, 2.0
ANSWER_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)
Load = TypeVar("Load")
Told = TypeVar("Told", contravariant=True)


class Choice(Protocol[Told]):
    """What goes by the answers."""

    @property
    def is_busy(self) -> bool:
        """Whether they should be fresh."""

    def told(self, loads: Sequence[Told]) -> None:
        """Takes them."""


class LoadPoll(Generic[Load]):
    """Tells a choice what the replicas' `load` answers, from `start` on. kind: of the answers."""

    def __init__(self, handle: "DeploymentHandle[object]", kind: type[Load], choice: Choice[Load]) -> None:
        self._handle, self._kind, self._choice = handle, kind, choice
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Call it in the event loop; again is fine."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def ask(self) -> list[Load]:
        """What those answer that do within two seconds."""
        try:
            broadcast = self._handle.broadcast("load")
            answers = await broadcast.results_async(timeout_s=ANSWER_TIMEOUT_S, return_exceptions=True)
        except Exception as error:
            logger.warning("no worker says how much it has to do: %s", error)
            return []
        return [answer for answer in answers if isinstance(answer, self._kind)]

    async def _run(self) -> None:
        while True:
            is_busy = self._choice.is_busy
            self._choice.told(await self.ask())
            await asyncio.sleep(BUSY_POLL_S if is_busy else IDLE_POLL_S)
