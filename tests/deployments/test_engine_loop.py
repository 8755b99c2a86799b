"""The engine's thread and the event loop that talks to it, over a stub of an engine."""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lserve.deployments.engine_loop import EngineLoop
from lserve.engine.engine import Engine
from lserve.engine.errors import CapacityError, InvalidRequestError, WorkerLostError
from lserve.engine.request import Output
from lserve.engine.results import Reservation, StepResult


class StubEngine:
    """Gives the results that a test puts in, one per step; steps while `busy` is set or results are left.

    ready: output that is there without a step. stepped: what a step waits for.
    """

    def __init__(self) -> None:
        self.results: list[StepResult | Exception] = []
        self.ready: list[Output] = []
        self.stepped = threading.Event()
        self.stepped.set()
        self.busy = False
        self.num_steps = 0
        self.threads: set[str] = set()
        self.leases = SimpleNamespace(expire=self._expire)
        self.num_expiries = 0

    @property
    def has_work(self) -> bool:
        """Whether to step."""
        return self.busy or bool(self.results)

    def take_outputs(self) -> list[Output]:
        """What is ready."""
        ready, self.ready = self.ready, []
        return ready

    def step(self) -> StepResult:
        """The next result."""
        self.stepped.wait()
        self.num_steps += 1
        self.threads.add(threading.current_thread().name)
        result = self.results.pop(0) if self.results else StepResult()
        if isinstance(result, Exception):
            raise result
        return result

    def _expire(self) -> None:
        self.num_expiries += 1


@pytest.fixture
async def stub() -> AsyncIterator[tuple[StubEngine, EngineLoop]]:
    """A stub engine and its loop, stopped afterwards."""
    engine = StubEngine()
    loop = EngineLoop(cast(Engine, engine))
    yield engine, loop
    await asyncio.to_thread(loop.stop)


def token(request_id: str, *token_ids: int) -> Output:
    return Output(request_id, 0, token_ids)


def step_with(*outputs: Output, **fields: Any) -> StepResult:
    return StepResult(outputs=list(outputs), computed=True, **fields)


async def give(loop: EngineLoop, engine: StubEngine, *results: StepResult | Exception) -> None:
    """Lets the engine bring these results."""
    await loop.call(lambda _: engine.results.extend(results))


async def test_commands_run_on_the_engines_thread(stub: tuple[StubEngine, EngineLoop]) -> None:
    _, loop = stub
    name = await loop.call(lambda _: threading.current_thread().name)
    assert name == "engine" != threading.current_thread().name


async def test_output_of_a_command_does_not_wait_for_a_step(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    subscription = loop.subscribe("a")
    engine.stepped.clear()

    def begin(_: Engine) -> None:
        engine.ready.append(token("a", 1))
        engine.results.append(step_with(token("a", 2)))

    await loop.call(begin)
    assert await asyncio.wait_for(subscription.next(), 5) == [token("a", 1)]
    engine.stepped.set()
    assert await asyncio.wait_for(subscription.next(), 5) == [token("a", 2)]


async def test_a_commands_error_is_the_callers(stub: tuple[StubEngine, EngineLoop]) -> None:
    _, loop = stub

    def refuse(engine: Engine) -> None:
        raise CapacityError("full")

    with pytest.raises(CapacityError, match="full"):
        await loop.call(refuse)
    assert await loop.call(lambda _: 1) == 1


async def test_each_request_gets_its_own_events_in_order(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    first, second = loop.subscribe("a"), loop.subscribe("b")
    reservation = Reservation("a", (), {}, 0, 0, (), 0.0)
    await give(loop, engine, step_with(token("b", 1), admitted=[reservation]), step_with(token("a", 2), token("b", 3)))
    assert await first.reservation() is reservation
    assert await first.next() == [token("a", 2)]
    received: list[Output] = []
    while len(received) < 2:
        received += cast("list[Output]", await second.next())
    assert received == [token("b", 1), token("b", 3)]


async def test_a_slow_reader_gets_what_waited_at_once(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    events = loop.subscribe("a")
    await give(loop, engine, *(step_with(token("a", number)) for number in range(5)))
    while engine.results:
        await asyncio.sleep(0)
    await loop.call(lambda _: None)
    assert await events.next() == [token("a", number) for number in range(5)]


async def test_a_request_that_fails_raises_its_error(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    events = loop.subscribe("a")
    await give(loop, engine, step_with(token("a", 1)), step_with(errors=[("a", CapacityError("no more pages"))]))
    assert await events.next() == [token("a", 1)]
    with pytest.raises(CapacityError, match="no more pages"):
        await events.next()


async def test_output_before_any_reservation_is_kept(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    events = loop.subscribe("a")
    await give(loop, engine, step_with(token("a", 1)))
    assert await events.reservation() is None
    assert await events.next() == [token("a", 1)]


async def test_a_closed_subscription_gives_back_what_nobody_took(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    events = loop.subscribe("a")
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        loop.subscribe("a")
    await give(loop, engine, step_with(token("a", 1)))
    while engine.results:
        await asyncio.sleep(0)
    await loop.call(lambda _: None)
    assert events.close() == [[token("a", 1)]]
    loop.subscribe("a").close()


async def test_an_engine_that_fails_fails_every_caller() -> None:
    engine = StubEngine()
    loop = EngineLoop(cast(Engine, engine))
    events = loop.subscribe("a")
    await give(loop, engine, RuntimeError("a bug"))
    with pytest.raises(WorkerLostError, match="has stopped"):
        await events.next()
    assert isinstance(loop.failure, RuntimeError)
    with pytest.raises(WorkerLostError):
        await loop.call(lambda _: None)
    loop.stop()


async def test_commands_that_wait_when_it_stops_fail() -> None:
    engine = StubEngine()
    loop = EngineLoop(cast(Engine, engine))
    begun, go_on = asyncio.Event(), threading.Event()
    event_loop = asyncio.get_running_loop()

    def long(_: Engine) -> str:
        event_loop.call_soon_threadsafe(begun.set)
        go_on.wait(5)
        return "done"

    running = asyncio.create_task(loop.call(long))
    await begun.wait()
    waiting = asyncio.create_task(loop.call(lambda _: None))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(asyncio.to_thread(loop.stop))
    await asyncio.sleep(0.01)
    go_on.set()
    assert await running == "done"
    with pytest.raises(WorkerLostError):
        await waiting
    await stopping


async def test_a_call_that_is_cancelled_in_time_never_runs(stub: tuple[StubEngine, EngineLoop]) -> None:
    _, loop = stub
    go_on, ran = threading.Event(), []
    first = asyncio.create_task(loop.call(lambda _: go_on.wait(5)))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(loop.call(lambda _: ran.append(1)))
    await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await first
    await loop.call(lambda _: None)
    assert not ran


async def test_waiting_for_pages_takes_no_core(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, loop = stub
    await loop.call(lambda _: setattr(engine, "busy", True))
    await asyncio.sleep(0.2)
    assert 1 <= engine.num_steps < 40  # every 10 ms, since nothing is computed


async def test_leases_run_out_while_nothing_is_asked(stub: tuple[StubEngine, EngineLoop]) -> None:
    engine, _ = stub
    async with asyncio.timeout(3):
        while not engine.num_expiries:
            await asyncio.sleep(0.02)
    assert not engine.num_steps
