"""Who may go on to the workers, who waits, and who is told to come back later."""

import asyncio
from collections import deque

from lserve.engine.errors import CapacityError, DeadlineExceededError

from .metrics import Metrics


class Admission:
    """At most max_running requests at the workers, first come first served; at most max_queued wait for a place."""

    def __init__(self, max_running: int, max_queued: int, retry_after_s: float, metrics: Metrics) -> None:
        self._max_running, self._max_queued, self._retry_after_s = max_running, max_queued, retry_after_s
        self._metrics = metrics
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    async def enter(self, timeout_s: float) -> None:
        """Takes a place, to be given back by `leave`. Raises CapacityError at once, or DeadlineExceededError."""
        if self.running < self._max_running:
            self.running += 1
        else:
            await self._wait(timeout_s)
        self._report()

    def leave(self) -> None:
        """Gives a place back, to the request that waits longest if there is one."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                break
        else:
            self.running -= 1
        self._report()

    async def _wait(self, timeout_s: float) -> None:
        if len(self._waiting) >= self._max_queued:
            message = f"{self.running} requests are running and {self.waiting} are waiting: the server is full"
            raise CapacityError(message, retry_after_s=self._retry_after_s)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._report()
        try:
            await asyncio.wait_for(asyncio.shield(place), timeout_s)
        except BaseException as error:
            if place.done():
                self.leave()
            else:
                self._waiting.remove(place)
                self._report()
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(f"the request waited {timeout_s:.1f} s for a free place") from None
            raise

    def _report(self) -> None:
        self._metrics.running_requests.record(self.running)
        self._metrics.waiting_requests.record(self.waiting)
