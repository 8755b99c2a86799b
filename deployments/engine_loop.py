"""Runs an engine on its own thread, and lets an event loop talk to it. Engine steps never run on a replica's loop."""

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar, cast

from lserve.engine.engine import Engine
from lserve.engine.errors import InvalidRequestError, LServeError, WorkerLostError
from lserve.engine.request import Output
from lserve.engine.results import ChunkReady, Reservation, StepResult

logger = logging.getLogger(__name__)
T = TypeVar("T")
Event = list[Output] | ChunkReady | Reservation | LServeError

_EXPIRY_CHECK_S = 0.5
_RETRY_S = 0.01


class EngineLoop:
    """One engine, one thread. Commands run between steps; what a step brings goes to each request's subscription.

    after_step: called on the engine's thread after each step, before anything that the step wrote can be overwritten.
    """

    def __init__(self, engine: Engine, after_step: Callable[[StepResult], None] | None = None) -> None:
        self._engine = engine
        self._after_step = after_step
        self._loop = asyncio.get_running_loop()
        self._commands: deque[tuple[Callable[[Engine], object], Future[object]]] = deque()
        self._wake = threading.Condition()
        self._subscribers: dict[str, Subscription] = {}
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Runs a command on the engine's thread, between steps, and returns what it returns (or raises what it
        raises).
        """
        future: Future[T] = Future()
        with self._wake:
            if self.failure is not None or self._stopping:
                raise WorkerLostError("the engine of this worker has stopped")
            self._commands.append((command, cast("Future[object]", future)))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def subscribe(self, request_id: str) -> "Subscription":
        """What the engine says about a request from now on; close it when done. Raises InvalidRequestError when
        somebody listens to that request already.
        """
        if request_id in self._subscribers:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        subscription = Subscription(lambda: self._subscribers.pop(request_id, None))
        self._subscribers[request_id] = subscription
        return subscription

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Runs a callback on the event loop; for the engine's thread. Nothing happens once the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            logger.debug("the event loop is closed; nobody listens to the engine any more")

    def stop(self) -> None:
        """Ends the thread after the step in progress; commands that still wait fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        commands: list[tuple[Callable[[Engine], object], Future[object]]] = []
        try:
            while True:
                with self._wake:
                    if not self._commands and not self._engine.has_work and not self._stopping:
                        self._wake.wait(_EXPIRY_CHECK_S)
                    commands = list(self._commands)
                    self._commands.clear()
                    if self._stopping:
                        break
                for command, future in commands:
                    self._execute(command, future)
                if outputs := self._engine.take_outputs():
                    self._dispatch(StepResult(outputs))
                if self._engine.has_work:
                    result = self._engine.step()
                    if self._after_step is not None:
                        self._after_step(result)
                    self._dispatch(result)
                    if not result.computed:
                        self._pause()
                else:
                    self._engine.leases.expire()
        except BaseException as error:
            logger.exception("the engine failed; this worker is lost")
            self.failure = error
        with self._wake:
            commands += list(self._commands)
            self._commands.clear()
        lost = WorkerLostError("the engine of this worker has stopped")
        for _, future in commands:
            if not future.done():
                future.set_exception(lost)
        self.call_soon(lambda: self._deliver({request_id: [lost] for request_id in self._subscribers}))

    def _pause(self) -> None:
        """Nothing could run: waits for a command, or a little for pages that leases and others give back."""
        with self._wake:
            if not self._commands and not self._stopping:
                self._wake.wait(_RETRY_S)

    def _execute(self, command: Callable[[Engine], object], future: "Future[object]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(command(self._engine))
        except Exception as error:
            future.set_exception(error)

    def _dispatch(self, result: StepResult) -> None:
        events: dict[str, list[Event]] = defaultdict(list)
        outputs: dict[str, list[Output]] = defaultdict(list)
        for reservation in result.admitted:
            events[reservation.request_id].append(reservation)
        for chunk in result.chunks:
            events[chunk.request_id].append(chunk)
        for output in result.outputs:
            outputs[output.request_id].append(output)
        for request_id, batch in outputs.items():
            events[request_id].append(batch)
        for request_id, error in result.errors:
            events[request_id].append(error)
        if events:
            self.call_soon(lambda: self._deliver(events))

    def _deliver(self, events: dict[str, list[Event]]) -> None:
        for request_id, batch in events.items():
            subscription = self._subscribers.get(request_id)
            if subscription is not None:
                for event in batch:
                    subscription.put(event)


class Subscription:
    """The events of one request, in order. Outputs that waited are merged: a slow reader gets several tokens at
    once.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()

    def close(self) -> list[Event]:
        """Ends the subscription; returns the events that nobody took."""
        self._close()
        left = list(self._events)
        self._events.clear()
        return left

    def put(self, event: Event) -> None:
        """Adds an event; on the event loop's thread."""
        self._events.append(event)
        self._ready.set()

    async def next(self) -> Event:
        """The next event; raises it when it is an error."""
        while not self._events:
            self._ready.clear()
            await self._ready.wait()
        event = self._events.popleft()
        if isinstance(event, LServeError):
            raise event
        while isinstance(event, list) and self._events and isinstance(self._events[0], list):
            event = event + cast(list[Output], self._events.popleft())
        return event

    async def reservation(self) -> Reservation | None:
        """Waits until the request's pages are reserved; None when it was done before (a replay of a finished answer),
        and then its output waits.
        """
        event = await self.next()
        if isinstance(event, list):
            self._events.appendleft(event)
            return None
        assert isinstance(event, Reservation), event
        return event

    async def outputs(self) -> AsyncIterator[list[Output]]:
        """Output as it comes, without end: the reader knows how many choices must finish."""
        while True:
            event = await self.next()
            assert isinstance(event, list), event
            yield event
