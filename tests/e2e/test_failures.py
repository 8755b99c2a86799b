"""What goes wrong between workers costs time, never the answer, and nothing stays held."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from workers import Answer, Cluster, SlowRead, again, cluster, prompt, request

from lserve.deployments import handoff
from lserve.deployments.messages import ChunkReady, PrefixHint
from lserve.deployments.settings import load_settings
from lserve.engine.errors import CapacityError, DeadlineExceededError, WorkerLostError
from lserve.engine.loading import load

ASKED = request(prompt(1200), max_tokens=12)


@pytest.fixture(scope="module")
def right(tiny_model: Path) -> list[int]:
    """The answer's tokens when nothing goes wrong."""

    async def undisturbed() -> Answer:
        async with cluster(tiny_model) as pair:
            return await pair.answer(again(ASKED))

    return asyncio.run(undisturbed()).token_ids


class LostAfter:
    """A worker that is lost when its chunks arrive: the first ones still do. It comes back after `times` losses."""

    def __init__(self, num_chunks: int, times: int) -> None:
        self._num_chunks, self._times, self._seen = num_chunks, times, 0

    def __call__(self, chunk: ChunkReady) -> None:
        """Raises WorkerLostError in place of a chunk."""
        self._seen += 1
        if self._seen > self._num_chunks and self._times:
            self._seen, self._times = 0, self._times - 1
            raise WorkerLostError("the worker was lost")


async def test_a_lost_prefill_worker_is_replaced_by_another(tiny_model: Path, right: list[int]) -> None:
    async with cluster(tiny_model, prefills=2) as pair:
        lost, pulls = LostAfter(2, times=1), pair.decode._worker.metrics.kv_transfer

        async def lost_once_pages_are_here(chunk: ChunkReady) -> None:
            while chunk.start >= 512 and not sum(pulls.count.values()):  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            lost(chunk)

        pair.pool.on_chunk = lost_once_pages_are_here
        assert (await pair.answer(again(ASKED))).token_ids == right
        (first, _), (second, retry) = pair.pool.calls
        assert first != second
        assert retry.have_tokens in (256, 512)  # what was pulled counts
        await pair.idle()


async def test_without_any_prefill_worker_the_decode_worker_prefills(tiny_model: Path, right: list[int]) -> None:
    async with cluster(tiny_model) as pair:
        pair.pool.on_chunk = LostAfter(1, times=100)
        assert (await pair.answer(again(ASKED))).token_ids == right
        assert len(pair.pool.calls) == handoff.ATTEMPTS
        await pair.idle()


async def test_a_prefill_worker_that_does_not_answer_is_given_up(
    tiny_model: Path, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "START_TIMEOUT_S", 0.1)
    async with cluster(tiny_model) as pair:

        async def silence(message: object) -> None:
            await asyncio.Event().wait()
            yield

        monkeypatch.setattr(pair.pool, "prefill", silence)
        assert (await pair.answer(again(ASKED))).token_ids == right
        await pair.idle()


async def test_bytes_pulled_under_a_lease_that_ran_out_are_thrown_away(tiny_model: Path, right: list[int]) -> None:
    async with cluster(tiny_model, "prefill.lease_s=0.3") as pair:
        sender = pair.prefill._worker

        async def lease_runs_out_and_pages_are_overwritten() -> None:
            while (await pair.prefill.counts()).leases:
                await asyncio.sleep(0.05)
            await sender.loop.call(lambda e: e.index.clear() if e.index else None)
            await sender.loop.call(
                lambda e: e.cache.retrieval.fill_(torch.nan if e.cache.retrieval.is_floating_point() else 255)
            )

        pair.pool.extends = False
        slow = SlowRead(pair.decode, lease_runs_out_and_pages_are_overwritten)
        assert (await pair.answer(again(ASKED))).token_ids == right
        assert slow.num_reads > 1 and len(pair.pool.calls) == 2
        assert (await sender.loop.call(lambda e: e.leases.counts)).expired > 0
        await pair.idle()


async def test_a_lease_is_extended_while_its_pages_are_read(tiny_model: Path, right: list[int]) -> None:
    async with cluster(tiny_model, "prefill.lease_s=0.3") as pair:
        SlowRead(pair.decode, lambda: asyncio.sleep(1.0))
        assert (await pair.answer(again(ASKED))).token_ids == right
        assert len(pair.pool.calls) == 1
        await pair.idle()


async def test_a_release_that_is_not_answered_does_not_count(
    tiny_model: Path, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tiny_model, "prefill.lease_s=0.3") as pair:
        release, lost = pair.pool.release, True

        async def lost_once(call: object) -> list[str]:
            nonlocal lost
            if lost:
                lost = False
                await asyncio.Event().wait()
            return await release(call)  # type: ignore[arg-type]

        monkeypatch.setattr(pair.pool, "release", lost_once)
        assert (await pair.answer(again(ASKED))).token_ids == right
        assert len(pair.pool.calls) == 2
        await pair.idle()


@pytest.mark.parametrize("stage", ["prefill", "pull", "decode"])
async def test_a_client_that_leaves_takes_everything_along(tiny_model: Path, stage: str) -> None:
    async with cluster(tiny_model) as pair:
        reached = asyncio.Event()
        if stage == "prefill":
            pair.pool.on_chunk = lambda chunk: reached.set()
        if stage == "pull":

            async def forever() -> None:
                reached.set()
                await asyncio.Event().wait()

            SlowRead(pair.decode, forever)

        async def client() -> None:
            async with aclosing(pair.decode.generate(request(prompt(3000), 5000), PrefixHint())) as stream:  # type: ignore[type-var]
                async for _ in stream:
                    reached.set()

        task = asyncio.create_task(client())
        await reached.wait()
        task.cancel()
        await asyncio.wait({task})
        await pair.idle(within_s=1.0)
        assert (await pair.answer(again(ASKED))).finish_reason is not None


async def test_a_passed_deadline_is_a_typed_error_in_time(tiny_model: Path) -> None:
    async with cluster(tiny_model) as pair:
        SlowRead(pair.decode, lambda: asyncio.sleep(60))
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="deadline"):
            await pair.answer(again(ASKED, deadline=time.time() + 0.5))
        with pytest.raises(DeadlineExceededError, match="deadline"):
            await pair.answer(request(prompt(100), 8000, deadline=time.time() + 0.5))
        assert time.monotonic() - started < 3
        await pair.idle()


async def test_a_full_worker_says_so(tiny_model: Path) -> None:
    async with cluster(tiny_model, "decode.max_batch_size=1", "decode.max_waiting=1") as pair:
        tasks = [asyncio.create_task(pair.answer(request(prompt(200, seed=i), 300))) for i in range(4)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        rejected = [a for a in answers if isinstance(a, CapacityError)]
        assert rejected and len([a for a in answers if isinstance(a, Answer)]) == 4 - len(rejected) >= 1
        await pair.idle()


async def test_a_worker_that_is_closed_waits_for_its_leases(tiny_model: Path, right: list[int]) -> None:
    async with cluster(tiny_model, "prefill.lease_s=5.0") as pair:
        reading, go_on = asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            reading.set()
            await go_on.wait()

        SlowRead(pair.decode, pause)
        answer = asyncio.create_task(pair.answer(again(ASKED)))
        await reading.wait()
        closing = asyncio.create_task(pair.prefill.close())
        done, _ = await asyncio.wait({closing}, timeout=0.3)
        assert not done
        go_on.set()
        assert (await answer).token_ids == right and len(pair.pool.calls) == 1
        await closing
        with pytest.raises(WorkerLostError):
            await pair.prefill.counts()
        pair.prefills.clear()


@pytest.mark.parametrize("host_swap_bytes", [0, 1 << 30])
async def test_requests_that_do_not_fit_together_take_turns(tiny_model: Path, host_swap_bytes: int) -> None:
    """Pages run out while they decode: some are swapped out or computed again, and all come to their end."""
    settings = load_settings({"model": {"path": str(tiny_model)}}, [f"sparsity.head_profile={tiny_model}/heads.json"])
    pool_bytes = 20 * load(settings.engine_config()).page_format.retrieval_page_bytes
    small = ("decode.max_model_len=1024", f"cache.retrieval_pool_bytes={pool_bytes}", "cache.prefix_cache=false")
    async with cluster(tiny_model, *small, f"cache.host_swap_bytes={host_swap_bytes}") as pair:
        asked = [request(prompt(200, seed=number), 300) for number in range(5)]
        answers = await asyncio.gather(*(pair.answer(one) for one in asked))
        assert [len(answer.token_ids) for answer in answers] == [300] * 5
        await pair.idle()


async def test_many_requests_that_come_and_go_leave_nothing(tiny_model: Path) -> None:
    async with cluster(tiny_model, "prefill.lease_s=1.0", prefills=2) as pair:
        pair.pool.on_chunk = LostAfter(5, times=3)

        async def one(number: int, cluster: Cluster) -> None:
            leaves_after = number % 4
            stream = cluster.decode.generate(request(prompt(100 + 97 * number, seed=number), 20), PrefixHint())
            async with aclosing(stream) as outputs:  # type: ignore[type-var]
                async for _ in outputs:
                    leaves_after -= 1
                    if leaves_after == 0:
                        return

        await asyncio.gather(*(one(number, pair) for number in range(16)))
        await pair.idle(within_s=2.0)
