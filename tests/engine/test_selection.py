"""Which pages decode reads: the budget holds, sink and window are always in, and a choice is made when it is due."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_engines import (
    MIXED,
    SPARSE,
    SPARSITY,
    Draws,
    Probe,
    assert_equal,
    assert_idle,
    attended,
    fresh,
    in_reach,
    make_engine,
    request,
    run,
    tokens,
)

from lserve.engine import attention as attention_module
from lserve.engine.config import PAGE_SIZE
from lserve.engine.engine import Engine
from lserve.engine.model import Model
from lserve.engine.request import AttentionOptions

SINK_PAGES, WINDOW_PAGES = SPARSE.sink_size // PAGE_SIZE, SPARSE.local_window // PAGE_SIZE
BUDGET = SPARSE.token_budget
assert BUDGET is not None


def always_kept(position: int) -> set[int]:
    """Sealed pages of the sink, and those that a window of the last tokens touches."""
    window = range((position - SPARSE.local_window + 1) // PAGE_SIZE, position // PAGE_SIZE)
    return {*range(SINK_PAGES), *window}


def choices(engine: Engine, row: int) -> Iterator[tuple[int, int, list[int]]]:
    """(layer, KV head, chosen pages) of a row, for every retrieval head."""
    for layer, heads in enumerate(engine.page_format.streaming):
        for head, streams in enumerate(heads):
            if not streams:
                count = int(engine.cache.selected_counts[layer, row, head])
                yield layer, head, engine.cache.selected[layer, row, head, :count].tolist()


@contextmanager
def counted_selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Positions that chose, for each call of the selector in layer 0."""
    chosen: list[list[int]] = []
    select = attention_module.page_select

    def counted(query: Any, layer: Any, batch: Any, *rest: Any) -> None:
        if layer.first_retrieval_slot == 0:
            due = batch.reselect & (batch.positions // PAGE_SIZE + 1 > batch.budget_pages)
            chosen.append(batch.positions[due].tolist())
        select(query, layer, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "page_select", counted)
        yield chosen


@pytest.mark.parametrize("rule", ["two_stage", "bound", "lserve"])
@pytest.mark.parametrize("kv_dtype", ["float32", "int4"])
def test_budget_sink_and_window_at_every_step(tiny: tuple[Model, Any], rule: str, kv_dtype: str) -> None:
    engine, _ = make_engine(tiny[0], kv_dtype=kv_dtype, streaming=MIXED, sparsity=replace(SPARSE, rule=rule))
    asked = [request(tokens(n, seed=n), 150) for n in (330, 700, 1100)]
    for item in asked:
        engine.add_request(item)
    steps = 0
    while engine.has_work:
        before = {s: s.position for s in engine.scheduler.running}
        engine.step()
        for sequence, position in before.items():
            sealed = position // PAGE_SIZE
            if sequence.row is None or (sealed + 1) * PAGE_SIZE <= BUDGET:
                continue
            steps += 1
            for layer, head, pages in choices(engine, sequence.row):
                read = len(pages) * PAGE_SIZE + position % PAGE_SIZE + 1
                assert read <= BUDGET, (layer, head)
                assert len(pages) == BUDGET // PAGE_SIZE - 1, "a budget that is there is used"
                assert pages == sorted(set(pages)) and pages[-1] < sealed
                assert always_kept(position) <= set(pages)
    assert steps > 300
    assert_idle(engine)


def test_a_choice_is_made_at_first_and_when_due(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first decode step, and whenever the position is a multiple of the interval."""
    engine = fresh(tiny, sparsity=SPARSE)
    with counted_selections(monkeypatch) as chosen:
        run(engine, [request(tokens(701), 40)])
    assert [positions for positions in chosen if positions] == [[701], [704], [720], [736]]
    with counted_selections(monkeypatch) as chosen:
        run(engine, [request(tokens(701), 6), request(tokens(420), 20), request(tokens(50), 20)])
    assert sorted(p for positions in chosen for p in positions) == [420, 432, 701, 704]


def test_a_choice_stays_between_selections(tiny: tuple[Model, Any]) -> None:
    engine = fresh(tiny, sparsity=SPARSE)
    engine.add_request(request(tokens(700), 60))
    seen = {}
    while engine.has_work:
        running = [(s, s.position) for s in engine.scheduler.running]
        engine.step()
        for sequence, position in running:
            if sequence.row is not None:
                seen[position] = list(choices(engine, sequence.row))
    changes = [position for position in seen if position - 1 in seen and seen[position] != seen[position - 1]]
    assert changes and all(position % SPARSE.reselect_interval == 0 for position in changes)


def test_requests_choose_their_own_budget_or_none_in_one_batch(tiny: tuple[Model, Any], draws: Draws) -> None:
    """A budget of its own, the engine's, a large one, and dense; each as if it were alone."""
    sparsity = replace(SPARSE, max_token_budget=1024)
    engine = fresh(tiny, sparsity=sparsity)
    prompt = tokens(900)
    options = [
        AttentionOptions(token_budget=sparsity.min_token_budget),
        AttentionOptions(),
        AttentionOptions(token_budget=1024),
        AttentionOptions(dense=True),
        AttentionOptions(dense=True, token_budget=sparsity.min_token_budget),
    ]
    asked = [request(prompt, 12, attention=option) for option in options]
    for item in asked:
        engine.add_request(item)
    for _ in range(2 * 5 + 4):
        engine.step()
    counts = [int(engine.cache.selected_counts[0, s.row, 0]) for s in engine.scheduler.running[:2]]
    assert counts == [sparsity.min_token_budget // PAGE_SIZE - 1, BUDGET // PAGE_SIZE - 1]
    run(engine)
    everything = request(prompt, 12)
    run(fresh(tiny), [everything])
    for item in asked[2:]:
        assert_equal(draws.of(item), draws.of(everything), atol=1e-3)
    for item in asked[:2]:
        assert (draws.of(item)[905] - draws.of(everything)[905]).abs().max() > 1e-2
        alone = replace(item, request_id="alone", sampling=replace(item.sampling, seed=10**9 + item.sampling.seed))
        run(fresh(tiny, sparsity=sparsity), [alone])
        assert_equal(draws.of(item), draws.of(alone), atol=1e-3)


def check_decode(engine: Engine, probe: Probe, reads: dict[tuple[int, int], list[list[int]]]) -> int:
    """Decode calls against an oracle that reads the own page and the chosen ones only."""
    layout, scale = engine.page_format.layout, engine.model_config.head_dim**-0.5
    written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    checked = 0
    for call in probe.calls:
        key, value = call.key, call.value
        if call.owners[0][1]:
            key, value = (torch.cat((old, new)) for old, new in zip(written[call.layer], (key, value), strict=True))
        written[call.layer] = key, value
        if not call.is_decode:
            continue
        position = call.owners[0][1]
        page = torch.arange(len(key)) // PAGE_SIZE
        seen = []
        for head, streams in enumerate(engine.page_format.streaming[call.layer]):
            if streams:
                seen.append(in_reach(torch.tensor([position]), len(key), SPARSE.sink_size, SPARSE.local_window)[0])
            else:
                chosen = torch.tensor([*reads[call.layer, position][head], position // PAGE_SIZE])
                seen.append(torch.isin(page, chosen))
        mask = torch.stack(seen)[:, None]
        expected = attended(call.query, torch.tensor([position]), key, value, mask, layout, scale)
        torch.testing.assert_close(call.out.double(), expected, atol=2e-5, rtol=0)
        checked += 1
    return checked


@pytest.mark.parametrize("kv_dtype", ["float32", "k8v4", "int4"])
def test_decode_reads_the_chosen_pages_and_no_others(tiny: tuple[Model, Any], kv_dtype: str) -> None:
    engine, probe = make_engine(tiny[0], kv_dtype=kv_dtype, streaming=MIXED, sparsity=SPARSE)
    probe.keeps_calls = True
    engine.add_request(request(tokens(700), 100))
    reads: dict[tuple[int, int], list[list[int]]] = {}
    while engine.has_work:
        running = [(s, s.position, s.row) for s in engine.scheduler.running]
        engine.step()
        for _, position, row in running:
            assert row is not None
            for layer in range(3):
                counts = engine.cache.selected_counts[layer, row].tolist()
                pages = engine.cache.selected[layer, row].tolist()
                reads[layer, position] = [p[:count] for p, count in zip(pages, counts, strict=True)]
    assert check_decode(engine, probe, reads) == 3 * 99


def test_what_one_request_chose_is_nothing_to_the_next_on_its_row(tiny: tuple[Model, Any], draws: Draws) -> None:
    """A row's old choice is never read: a request's first decode step chooses."""
    asked = request(tokens(701, seed=5), 10)
    engine = fresh(tiny, sparsity=SPARSE)
    run(engine, [request(tokens(1000), 10)])
    run(engine, [asked])
    other = replace(asked, request_id="other", sampling=replace(asked.sampling, seed=10**9))
    run(fresh(tiny, sparsity=SPARSE), [other])
    assert_equal(draws.of(asked), draws.of(other))


def test_everything_is_read_where_it_fits(tiny: tuple[Model, Any], draws: Draws) -> None:
    within, beyond = request(tokens(BUDGET - 20), 15), request(tokens(BUDGET - 20), 15)
    run(fresh(tiny, sparsity=SPARSE), [within])
    run(fresh(tiny, sparsity=SPARSITY), [beyond])
    assert_equal(draws.of(within), draws.of(beyond))
