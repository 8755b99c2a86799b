"""Prefill on one engine, decode on another: the same answer to the bit, and nothing held afterwards."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_engines import (
    KV_DTYPES,
    MIXED,
    RETRIEVAL,
    SPARSE,
    Answer,
    Draws,
    assert_equal,
    assert_idle,
    fresh,
    request,
    run,
    tokens,
)

from lserve.engine.config import PAGE_SIZE
from lserve.engine.engine import Engine
from lserve.engine.model import Model
from lserve.engine.request import Request
from lserve.engine.results import ChunkReady


def pull(source: Engine, target: Engine, chunk: ChunkReady) -> None:
    """Moves a chunk's pages as a transfer does: bytes from pool to pool, counted only if the lease is still held."""
    sequence = target._lead(chunk.request_id)
    for pool, pairs, homes in (
        ("retrieval", chunk.retrieval_pages, sequence.retrieval_pages),
        ("streaming", chunk.streaming_pages, sequence.streaming_pages),
    ):
        if pairs:
            data = source.cache.export(pool, [page for _, page in pairs])
            target.cache.restore(pool, [homes[index] for index, _ in pairs], data)
    if chunk.tail_row is not None:
        assert sequence.row is not None
        target.cache.restore("tail", [sequence.row], source.cache.export("tail", [chunk.tail_row]))
    assert source.leases.release(chunk.lease_id, chunk.generation) == "held"


def disaggregated(source: Engine, target: Engine, asked: Request) -> dict[tuple[str, int], Answer]:
    """One request, prefilled by one engine and decoded by another."""
    target.add_request(asked, hold=True)
    (reservation,) = target.step().admitted
    source.add_request(asked, prefill_only=True, have_tokens=reservation.num_cached_tokens)
    chunk = None
    while source.has_work:
        result = source.step()
        assert not result.outputs
        for chunk in result.chunks:
            pull(source, target, chunk)
    assert chunk is not None and chunk.last
    cached = max(chunk.num_cached_tokens, reservation.num_cached_tokens)
    target.begin_decode(asked.request_id, chunk.first_tokens, cached)
    answers = run(target)
    assert_idle(source)
    assert_idle(target)
    return answers


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 64, 700, 768])
def test_disaggregated_equals_unified_to_the_bit(
    tiny: tuple[Model, Any], draws: Draws, kv_dtype: str, num_tokens: int
) -> None:
    settings = {"kv_dtype": kv_dtype, "streaming": MIXED, "sparsity": SPARSE}
    asked = request(tokens(num_tokens), 30, n=2, temperature=0.7)
    there = disaggregated(fresh(tiny, **settings), fresh(tiny, **settings), asked)
    logits = [dict(draws.of(asked, choice)) for choice in range(2)]
    here = run(fresh(tiny, **settings), [unified := replace(asked, request_id="unified")])
    for choice in range(2):
        assert there[asked.request_id, choice] == here["unified", choice]
        assert_equal(draws.of(unified, choice), logits[choice])


@pytest.mark.parametrize("streaming", [RETRIEVAL, MIXED, ((True, True),) * 3], ids=["retrieval", "mixed", "streaming"])
def test_a_handoff_moves_only_what_is_missing(
    tiny: tuple[Model, Any], draws: Draws, streaming: tuple[tuple[bool, ...], ...]
) -> None:
    """Either worker may know more of the prompt than the other; afterwards both know all of it."""
    settings = {"streaming": streaming, "prefix_cache": True}
    source, target = fresh(tiny, **settings), fresh(tiny, **settings)
    prompt = tokens(1300)
    plain = request(prompt, 10)
    run(fresh(tiny, streaming=streaming), [plain])
    cached = []
    for known_here, known_there in ((300, 0), (600, 900), (0, 0)):
        if known_here:
            run(target, [request(prompt[:known_here], 2)])
        if known_there:
            disaggregated(source, fresh(tiny, streaming=streaming), request(prompt[:known_there], 2))
        asked = request(prompt, 10)
        answers = disaggregated(source, target, asked)
        assert_equal(draws.of(asked), draws.of(plain), atol=1e-3)
        cached.append(answers[asked.request_id, 0].num_cached_tokens)
    assert cached == [256, 1280, 1280]


def test_a_held_request_can_be_finished_by_its_own_worker(tiny: tuple[Model, Any], draws: Draws) -> None:
    """The prefill worker was lost after some chunks: what was pulled stays, the rest is computed here."""
    settings = {"kv_dtype": "int8", "streaming": MIXED, "chunk_size": 256}
    source, target = fresh(tiny, **settings), fresh(tiny, **settings)
    asked = request(tokens(700), 10)
    target.add_request(asked, hold=True)
    target.step()
    source.add_request(asked, prefill_only=True)
    pulled: list[ChunkReady] = []
    for _ in range(2):
        pulled += source.step().chunks
    window = target.reserve_window(asked.request_id, 512)
    for chunk in pulled:
        missing = {i: p for i, p in source._lead(asked.request_id).streaming_pages.items() if i in window}
        pull(source, target, replace(chunk, streaming_pages=tuple(missing.items())))
    source.abort(asked.request_id)
    target.begin_prefill(asked.request_id, 512)
    run(target)
    logits = dict(draws.of(asked))
    run(fresh(tiny, **settings), [unified := replace(asked, request_id="unified")])
    assert_equal(draws.of(unified), logits)
    assert_idle(source)
    assert_idle(target)


def test_leased_pages_stay_until_their_lease_ends(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, streaming=MIXED)
    asked = request(tokens(300), n=2)
    engine.add_request(asked, prefill_only=True)
    chunks = [chunk for _ in range(2) for chunk in engine.step().chunks]
    assert [chunk.last for chunk in chunks] == [False, True] and not engine.has_work
    assert engine.retrieval_pool.num_held == 300 // PAGE_SIZE and engine.row_pool.num_used == 1
    assert not engine.abort(asked.request_id)
    engine.leases.release(chunks[0].lease_id, chunks[0].generation)
    assert engine.retrieval_pool.num_held == len(chunks[1].retrieval_pages) and engine.row_pool.num_used == 1
    engine.leases.release(chunks[1].lease_id, chunks[1].generation)
    assert engine.leases.release(chunks[1].lease_id, chunks[1].generation) == "gone"
    assert_idle(engine)
