"""Pages from prefill worker to decode worker: exact, and as if one worker had done it all."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from workers import again, cluster, prompt, request

from lserve.engine.engine import Engine
from lserve.engine.request import SampledToken
from lserve.engine.transfer import PageRead, TransferStats

KV_DTYPES = ("float32", "bf16", "int8", "k8v4", "int4")


@pytest.mark.parametrize("length", [1, 64, 300, 1500])
async def test_disaggregated_equals_unified_to_the_bit(tiny_model: Path, length: int) -> None:
    asked = request(prompt(length), max_tokens=70, logprobs=3)
    async with cluster(tiny_model) as pair:
        apart = await pair.answer(asked)
        assert [message.request.request_id for _, message in pair.pool.calls] == [asked.request_id]
        await pair.idle()
    async with cluster(tiny_model, prefills=0) as unified:
        together = await unified.answer(again(asked))
        await unified.idle()
    assert apart.token_ids == together.token_ids and len(apart.token_ids) == 70
    assert apart.logprobs == together.logprobs
    assert apart.text == together.text


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
async def test_transport_is_exact(tiny_model: Path, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When decoding begins, every page and the tail row hold the bytes that the prefill worker has."""
    length = 1000
    async with cluster(tiny_model, f"cache.kv_dtype={kv_dtype}") as pair:
        sender, receiver = pair.prefill._worker, pair.decode._worker
        assert receiver.transfer is not None
        read, begin_decode = receiver.transfer.read, receiver.engine.begin_decode
        all_reads: list[PageRead] = []
        equal: list[bool] = []

        async def noted_read(peer: str, reads: Sequence[PageRead], timeout_s: float) -> TransferStats:
            all_reads.extend(reads)
            return await read(peer, reads, timeout_s)

        def compared_begin_decode(request_id: str, first: Sequence[SampledToken], num_cached: int) -> None:
            for page in all_reads:
                theirs = sender.engine.cache.export(page.pool, [page.remote_page])
                ours = receiver.engine.cache.export(page.pool, [page.local_page])
                equal.append(torch.equal(theirs, ours))
            begin_decode(request_id, first, num_cached)

        monkeypatch.setattr(receiver.transfer, "read", noted_read)
        monkeypatch.setattr(receiver.engine, "begin_decode", compared_begin_decode)
        await pair.answer(request(prompt(length), max_tokens=1))
        assert all(equal)
        retrieval, streaming, tail = ([p for p in all_reads if p.pool == n] for n in ("retrieval", "streaming", "tail"))
        assert len(retrieval) == length // 64 and len(tail) == 1
        assert 0 < len(streaming) < len(retrieval)
        moved = sum(sender.engine.cache.pools[page.pool].shape[1] for page in all_reads)
        assert sum(receiver.metrics.kv_transfer_bytes.sum.values()) == moved  # type: ignore[attr-defined]
        await pair.idle()


async def test_chunks_are_pulled_while_later_ones_are_computed(tiny_model: Path) -> None:
    computed_when_first_arrived: list[int] = []
    async with cluster(tiny_model) as pair:
        engine: Engine = pair.prefill._worker.engine

        def note(chunk: object) -> None:
            computed_when_first_arrived.append(max((s.num_computed for s in engine.scheduler.prefilling), default=1500))

        pair.pool.on_chunk = note
        await pair.answer(request(prompt(1500)))
    assert computed_when_first_arrived[0] < 1500


async def test_what_the_decode_worker_has_is_not_sent_again(tiny_model: Path) -> None:
    start, more = prompt(1100), prompt(500, seed=1)
    async with cluster(tiny_model, "prefill.local_threshold=0") as pair:
        first = await pair.answer(request(start, max_tokens=2))
        assert first.num_cached_tokens == 0
        second = await pair.answer(request(start + more))
        assert second.num_cached_tokens == 1024
        _, message = pair.pool.calls[-1]
        assert message.have_tokens == 1024
        await pair.idle()
    async with cluster(tiny_model, prefills=0) as unified:
        await unified.answer(request(start, max_tokens=2))
        assert (await unified.answer(request(start + more))).token_ids == second.token_ids


async def test_choices_share_the_prompt(tiny_model: Path) -> None:
    asked = request(prompt(333), max_tokens=40, n=3, temperature=1.0, seed=7)
    async with cluster(tiny_model) as pair:
        answers = await pair.answers(asked)
        assert len({tuple(answer.token_ids) for answer in answers}) == 3
        assert [a.token_ids for a in await pair.answers(again(asked))] == [a.token_ids for a in answers]
        await pair.idle()
