"""What is equal to what: swap to the bit, arithmetic within bounds, and nothing sees a later token."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_engines import (
    KV_DTYPES,
    MANY,
    MIXED,
    RETRIEVAL,
    SPARSE,
    Answer,
    Draws,
    again,
    assert_equal,
    assert_idle,
    collect,
    fresh,
    make_engine,
    poison_pools,
    request,
    run,
    tokens,
)
from torch import Tensor

from lserve.engine.config import PAGE_SIZE
from lserve.engine.engine import Engine
from lserve.engine.model import Model
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import FinishReason, Request
from lserve.engine.sequence import Sequence
from lserve.kernels.slot_layout import SlotLayout

QUANTIZED = KV_DTYPES[2:]


def prefilled(engine: Engine, *asked: Request) -> list[dict[int, Tensor]]:
    """Retrieval pages that prefill writes, uint8 [slots, slot_bytes] by page index, for each request."""
    for item in asked:
        engine.add_request(item, prefill_only=True)
    pages: dict[str, dict[int, Tensor]] = defaultdict(dict)
    while engine.has_work:
        for chunk in engine.step().chunks:
            for index, page in chunk.retrieval_pages:
                pages[chunk.request_id][index] = engine.cache.retrieval[page].clone()
    assert_idle(engine)
    return [pages[item.request_id] for item in asked]


def codes(page: Tensor, layout: SlotLayout) -> Tensor:
    """All key and value codes of a page, int16."""
    parts = []
    for begin, end, bits in (
        (0, layout.key_min, layout.key_bits),
        (layout.value_codes, layout.value_min, layout.value_bits),
    ):
        data = page[:, begin:end].flatten().to(torch.int16)
        parts += [data] if bits == 8 else [data & 15, data >> 4]
    return torch.cat(parts)


def assert_same_codes(ours: dict[int, Tensor], theirs: dict[int, Tensor], layout: SlotLayout) -> None:
    """At most 0.1 % of the codes differ, and those by one step."""
    assert ours.keys() == theirs.keys() and ours
    difference = torch.cat([(codes(ours[i], layout) - codes(theirs[i], layout)).abs() for i in ours])
    assert difference.max() <= 1
    assert difference.count_nonzero() <= difference.numel() / 1000


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_chunk_and_batch_sizes_leave_the_codes_alone(tiny: tuple[Model, Any], kv_dtype: str) -> None:
    asked = request(tokens(700))
    others = [request(tokens(n, seed=n)) for n in (3, 200, 64)]
    engine = fresh(tiny, kv_dtype=kv_dtype, chunk_size=128)
    (small,) = prefilled(engine, asked)
    (large,) = prefilled(fresh(tiny, kv_dtype=kv_dtype, chunk_size=1024), asked)
    *_, shared = prefilled(fresh(tiny, kv_dtype=kv_dtype, chunk_size=1024), *others, asked)
    assert sorted(small) == list(range(700 // PAGE_SIZE))
    assert_same_codes(small, large, engine.page_format.layout)
    assert_same_codes(small, shared, engine.page_format.layout)


@pytest.mark.parametrize("streaming", [RETRIEVAL, MIXED], ids=["retrieval", "mixed"])
def test_chunk_sizes_and_batches_leave_logits_within_bounds(
    tiny: tuple[Model, Any], draws: Draws, streaming: tuple[tuple[bool, ...], ...]
) -> None:
    asked = [request(tokens(n, seed=n), 70) for n in (400, 37, 650)]
    run(fresh(tiny, streaming=streaming, chunk_size=1024), asked)
    for chunk_size in (128, 384):
        alone = [again(item) for item in asked]
        for item in alone:
            run(fresh(tiny, streaming=streaming, chunk_size=chunk_size), [item])
        for one, other in zip(asked, alone, strict=True):
            assert_equal(draws.of(one), draws.of(other), atol=1e-3)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_prefix_from_the_pool_index_is_as_good_as_computed(
    tiny: tuple[Model, Any], draws: Draws, kv_dtype: str
) -> None:
    """To the bit where the chunks are the same; the bytes of the pages are the writer's in any case."""
    engine = fresh(tiny, kv_dtype=kv_dtype, streaming=MIXED, prefix_cache=True, chunk_size=512)
    begun, prompt = tokens(580), tokens(580) + tokens(120, seed=1)
    run(engine, [request(begun, 3)])
    assert engine.streaming_pool.num_cached and engine.retrieval_pool.num_cached == 580 // PAGE_SIZE
    asked = request(prompt, 20)
    answer = run(engine, [asked])[asked.request_id, 0]
    assert answer.num_cached_tokens == 512
    for chunk_size, atol in ((512, 0.0), (384, 1e-3)):
        plain = again(asked)
        run(fresh(tiny, kv_dtype=kv_dtype, streaming=MIXED, chunk_size=chunk_size), [plain])
        if kv_dtype == "float32" or atol == 0:
            assert_equal(draws.of(asked), draws.of(plain), atol)
    assert_idle(engine)
    assert engine.index is not None
    engine.index.clear()
    assert engine.retrieval_pool.num_used == engine.streaming_pool.num_used == 0


def test_a_prefix_is_shared_inside_a_tenant_only(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, prefix_cache=True)
    prompt = tokens(300)
    asked = [request(prompt, 2, tenant=tenant) for tenant in ("a", "b", "a", "")]
    cached = [run(engine, [item])[item.request_id, 0].num_cached_tokens for item in asked]
    assert cached == [0, 0, 256, 0]


def test_what_decode_wrote_is_never_published(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, prefix_cache=True)
    asked = request(tokens(100), 200)
    answer = run(engine, [asked])[asked.request_id, 0]
    turn = request((*asked.prompt_token_ids, *answer.token_ids), 2)
    assert run(engine, [turn])[turn.request_id, 0].num_cached_tokens == 0
    assert engine.retrieval_pool.num_cached == 300 // PAGE_SIZE


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_swapping_out_and_in_changes_no_bit(tiny: tuple[Model, Any], draws: Draws, kv_dtype: str) -> None:
    """Pages, tail and page choice come back exactly, into other pages and rows."""
    settings = {"kv_dtype": kv_dtype, "streaming": MIXED, "sparsity": SPARSE}
    asked = request(tokens(700), 60)
    engine = fresh(tiny, **settings)
    engine.add_request(asked)
    answers: dict[tuple[str, int], Answer] = defaultdict(Answer)
    for step in range(1000):
        if step % 5 == 4 and engine.scheduler.running:
            (sequence,) = engine.scheduler.running
            held = (sequence.row, list(sequence.retrieval_pages))
            engine.scheduler.preempt(sequence)
            assert engine._swap.used_bytes > 0
            poison_pools(engine)
            blockers = engine.row_pool.allocate(1), engine.retrieval_pool.allocate(2)
            collect(engine.step(), answers)
            engine.row_pool.release(blockers[0]), engine.retrieval_pool.release(blockers[1])
            assert (sequence.row, sequence.retrieval_pages) != held
        elif engine.has_work:
            collect(engine.step(), answers)
    plain = again(asked)
    expected = run(fresh(tiny, **settings), [plain])[plain.request_id, 0]
    assert answers[asked.request_id, 0].token_ids == expected.token_ids
    assert_equal(draws.of(asked), draws.of(plain))
    assert_idle(engine)


@pytest.mark.parametrize("host_swap_bytes", [0, 200_000, 1 << 30])
def test_answers_survive_a_pool_that_is_too_small(
    tiny: tuple[Model, Any], draws: Draws, monkeypatch: pytest.MonkeyPatch, host_swap_bytes: int
) -> None:
    """By swap, by recompute, or by both, with several choices of one request among them."""
    sizes = PoolSizes(retrieval_pages=12, streaming_pages=64, rows=12)
    engine = fresh(tiny, streaming=MIXED, sizes=sizes, host_swap_bytes=host_swap_bytes, prefix_cache=True)
    asked = [request(tokens(250), 150), request(tokens(130, seed=1), 140, n=2), request(tokens(60, seed=2), 200)]
    preempted: list[Sequence] = []
    preempt = engine.scheduler.preempt

    def counted(sequence: Sequence) -> None:
        preempted.append(sequence)
        preempt(sequence)
        assert engine._swap.used_bytes <= host_swap_bytes

    monkeypatch.setattr(engine.scheduler, "preempt", counted)
    answers = run(engine, asked)
    assert preempted
    assert_idle(engine)
    plain = [again(item) for item in asked]
    expected = run(fresh(tiny, streaming=MIXED), plain)
    for one, other in zip(asked, plain, strict=True):
        for choice in range(one.sampling.n):
            assert answers[one.request_id, choice].finish_reason is FinishReason.LENGTH
            assert answers[one.request_id, choice].token_ids == expected[other.request_id, choice].token_ids
            assert_equal(draws.of(one, choice), draws.of(other, choice), atol=1e-3)


def test_host_memory_for_swapping_is_kept_to_the_byte(tiny: tuple[Model, Any]) -> None:
    def used_when_preempted(limit: int) -> int:
        engine = fresh(tiny, streaming=MIXED, host_swap_bytes=limit)
        engine.add_request(asked := request(tokens(300), 20))
        for _ in range(4):
            engine.step()
        engine.scheduler.preempt(engine.scheduler.running[0])
        used = engine._swap.used_bytes
        for saved in engine._swap._saved.values():
            assert sum(t.nbytes for t in (saved.retrieval, saved.streaming, saved.tail, *saved.selection)) == used
        assert engine.abort(asked.request_id)
        assert_idle(engine)
        return used

    needed = used_when_preempted(1 << 30)
    assert needed > 0
    assert [used_when_preempted(limit) for limit in (needed, needed - 1)] == [needed, 0]


def test_a_request_of_several_choices_can_be_aborted_after_one_was_recomputed(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, host_swap_bytes=0)
    asked = request(tokens(100), 50, n=3)
    engine.add_request(asked)
    for _ in range(3):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.running) == 3
    assert engine.abort(asked.request_id)
    assert_idle(engine)


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_recomputed_pages_are_the_pages_that_decode_filled(tiny: tuple[Model, Any], kv_dtype: str) -> None:
    engine = fresh(tiny, kv_dtype=kv_dtype)
    asked = request(tokens(30), 300)
    engine.add_request(asked)
    for _ in range(280):
        engine.step()
    (sequence,) = engine.scheduler.running
    decoded = {i: engine.cache.retrieval[sequence.retrieval_pages[i]].clone() for i in range(4)}
    replayed = request(sequence.token_ids)
    engine.abort(asked.request_id)
    (computed,) = prefilled(fresh(tiny, kv_dtype=kv_dtype), replayed)
    assert_same_codes(decoded, computed, engine.page_format.layout)


@pytest.mark.parametrize("cut", [1, 20, 63, 64, 65, 99])
def test_replay_goes_on_where_the_other_worker_stopped(tiny: tuple[Model, Any], draws: Draws, cut: int) -> None:
    """Same draws, penalties and count; only what is new is reported."""
    asked = request(tokens(70), 100, temperature=0.8, top_p=0.9, frequency_penalty=0.5, repetition_penalty=1.1)
    whole = run(fresh(tiny), [asked])[asked.request_id, 0]
    expected = {position: logits for position, logits in draws.of(asked).items() if position >= 70 + cut}
    replayed = replace(asked, request_id="again", emitted=tuple(whole.token_ids[:cut]))
    answer = run(fresh(tiny), [replayed])["again", 0]
    assert answer.token_ids == whole.token_ids[cut:] and answer.text == whole.text[cut:]
    assert answer.finish_reason is FinishReason.LENGTH
    ours = {position: logits for position, logits in draws.of(replayed).items() if position >= 70 + cut}
    assert_equal(ours, expected, atol=1e-3)


def test_replay_of_one_choice_draws_as_that_choice(tiny: tuple[Model, Any]) -> None:
    asked = request(tokens(70), 30, n=3, temperature=1.0)
    whole = run(fresh(tiny), [asked])[asked.request_id, 2]
    sampling = replace(asked.sampling, n=1)
    replayed = replace(asked, request_id="again", sampling=sampling, emitted=tuple(whole.token_ids[:9]), choice=2)
    assert run(fresh(tiny), [replayed])["again", 2].token_ids == whole.token_ids[9:]


def test_replay_of_a_complete_answer_ends_at_once(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny)
    asked = request(tokens(20), 5, emitted=(1, 2, 3, 4, 5))
    answer = run(engine, [asked])[asked.request_id, 0]
    assert answer.token_ids == [] and answer.finish_reason is FinishReason.LENGTH
    assert_idle(engine)


@pytest.mark.parametrize("streaming", [RETRIEVAL, MIXED], ids=["retrieval", "mixed"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_later_token_moves_nothing_before_it(
    tiny: tuple[Model, Any], kv_dtype: str, streaming: tuple[tuple[bool, ...], ...]
) -> None:
    """Causal to the bit: every hidden state up to t, when token t + 1 and all after it change."""
    prompt, others = tokens(450), tokens(450, seed=1)

    def hidden(token_ids: tuple[int, ...]) -> Tensor:
        engine, probe = make_engine(tiny[0], kv_dtype=kv_dtype, streaming=streaming, chunk_size=256)
        run(engine, [asked := request(token_ids, 1)])
        return torch.stack([probe.hidden[asked.request_id, 0, i] for i in range(len(token_ids))])

    expected = hidden(prompt)
    for t in (0, 40, 63, 64, 191, 255, 256, 448):
        changed = hidden(prompt[: t + 1] + others[t + 1 :])
        assert torch.equal(changed[: t + 1], expected[: t + 1]), t
        assert not torch.equal(changed[t + 1], expected[t + 1])


def test_a_class_without_heads_takes_no_pages(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, streaming=((True, True),) * 3)
    run(engine, [request(tokens(500), 3, n=2)])
    assert engine.retrieval_pool.num_free == MANY.retrieval_pages
    assert set(engine.cache.pools) == {"streaming", "tail"}
