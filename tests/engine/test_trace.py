"""The trace: which pages were read and how much attention they hold, against what attention really computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_engines import MIXED, SPARSE, fresh, make_engine, request, run, tokens

from lserve.engine.config import PAGE_SIZE
from lserve.engine.engine import Engine
from lserve.engine.model import Model
from lserve.engine.request import AttentionOptions, PageChoice, Request
from lserve.engine.trace import HeadChoices

TRACED = AttentionOptions(trace=True)
NUM_RETRIEVAL = sum(not streams for layer in MIXED for streams in layer)


def traced(engine: Engine, asked: list[Request]) -> tuple[dict[str, list[PageChoice]], list[HeadChoices]]:
    """Page choices by request, and what the listener was told."""
    heard: list[HeadChoices] = []
    engine.trace.listener = heard.append
    for item in asked:
        engine.add_request(item)
    choices: dict[str, list[PageChoice]] = {item.request_id: [] for item in asked}
    while engine.has_work:
        for output in engine.step().outputs:
            choices[output.request_id] += output.trace
    return choices, heard


def test_nothing_is_recorded_unless_asked_for(tiny: tuple[Model, Any]) -> None:
    choices, heard = traced(fresh(tiny, sparsity=SPARSE), [request(tokens(700), 20)])
    assert list(choices.values()) == [[]] and heard == []


def test_a_choice_is_recorded_when_it_is_made(tiny: tuple[Model, Any]) -> None:
    """The first token comes of the prefill; the others of choices at the second token and at multiples of 16."""
    asked, other = request(tokens(701), 40, attention=TRACED), request(tokens(650), 30)
    choices, heard = traced(fresh(tiny, streaming=MIXED, sparsity=SPARSE), [asked, other])
    assert [choice.token for choice in choices[asked.request_id]] == [1, 4, 20, 36]
    assert choices[other.request_id] == []
    assert [h.position for h in heard] == [701, 704, 720, 736]
    assert SPARSE.token_budget is not None
    for choice, full in zip(choices[asked.request_id], heard, strict=True):
        assert choice.num_pages == full.position // PAGE_SIZE and choice.num_heads == NUM_RETRIEVAL
        assert not choice.everything and choice.num_left_out == 0
        retrieves = ~torch.tensor(MIXED)
        assert full.read[~retrieves].sum() == 0
        assert (full.read[retrieves].sum(-1) == SPARSE.token_budget // PAGE_SIZE - 1).all()
        assert dict(choice.read) == {i: n for i, n in enumerate(full.read.sum((0, 1)).tolist()) if n}
        counts = [count for _, count in choice.read]
        assert counts == sorted(counts, reverse=True) and counts[0] == NUM_RETRIEVAL


@pytest.mark.parametrize("kv_dtype", ["float32", "int4"])
def test_the_mass_is_that_of_dense_attention(tiny: tuple[Model, Any], kv_dtype: str) -> None:
    """Three layers, so each is sampled at every third choice; its mass is recomputed from the keys as written."""
    engine, probe = make_engine(tiny[0], kv_dtype=kv_dtype, sparsity=replace(SPARSE, reselect_interval=1))
    probe.keeps_calls = True
    asked = request(tokens(650), 8, attention=TRACED)
    choices, heard = traced(engine, [asked])
    seen_layers = set()
    for choice, full in zip(choices[asked.request_id], heard, strict=True):
        sampled = ~full.mass[..., 0].isnan()
        layer = int(sampled.any(1).nonzero())
        seen_layers.add(layer)
        assert choice.num_sampled == 2 and bool(sampled[layer].all()) and int(sampled.sum()) == 2
        calls = [call for call in probe.calls if call.layer == layer]
        keys = torch.cat([call.key for call in calls])[: full.position + 1]
        query = next(c.query[0] for c in calls if c.is_decode and c.owners[0][1] == full.position)
        logits = (query.view(2, 3, -1) * query.shape[-1] ** -0.5) @ keys.transpose(0, 1).mT
        share = torch.nn.functional.pad(logits.softmax(-1), (0, -len(keys) % PAGE_SIZE)).unflatten(2, (-1, PAGE_SIZE))
        expected = share.sum(-1).mean(1)
        torch.testing.assert_close(full.mass[layer], expected, atol=1e-5 if kv_dtype == "float32" else 0.02, rtol=0)
        kept = (full.mass[layer][:, :-1] * full.read[layer]).sum(-1) + full.mass[layer][:, -1]
        assert choice.mass_kept == pytest.approx(float(kept.mean()), abs=1e-6)
        assert 0 < choice.mass_kept < 1
        best = full.mass[layer].mean(0)[:-1].topk(3)
        assert [page for page, _ in choice.attended[:3]] == best.indices.tolist()
    assert seen_layers == {0, 1, 2}


def test_a_request_that_fits_reads_everything(tiny: tuple[Model, Any]) -> None:
    dense = AttentionOptions(dense=True, trace=True)
    short, whole = request(tokens(100), 6, attention=TRACED), request(tokens(800), 6, attention=dense)
    choices, _ = traced(fresh(tiny, sparsity=replace(SPARSE, reselect_interval=4)), [short, whole])
    for item in (short, whole):
        made = choices[item.request_id]
        assert made and all(c.everything and c.read == () for c in made)
        assert all(c.mass_kept == pytest.approx(1.0) for c in made)


def test_a_trace_changes_no_token(tiny: tuple[Model, Any]) -> None:
    plain, asked = request(tokens(700), 40), request(tokens(700), 40, attention=TRACED)
    answers = [run(fresh(tiny, sparsity=SPARSE), [item]) for item in (plain, asked)]
    assert answers[0][plain.request_id, 0].token_ids == answers[1][asked.request_id, 0].token_ids


def test_a_long_list_of_pages_is_cut(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lserve.engine.trace.MAX_READ", 3)
    asked = request(tokens(700), 3, attention=TRACED)
    choices, heard = traced(fresh(tiny, sparsity=SPARSE), [asked])
    first = choices[asked.request_id][0]
    assert len(first.read) == 3
    assert first.num_left_out == int((heard[0].read.sum((0, 1)) > 0).sum()) - 3


def test_a_model_that_only_streams_has_nothing_to_trace(tiny: tuple[Model, Any]) -> None:
    asked = request(tokens(400), 4, attention=TRACED)
    choices, heard = traced(fresh(tiny, streaming=((True, True),) * 3, sparsity=SPARSE), [asked])
    assert choices == {asked.request_id: []} and heard == []


def test_the_next_request_does_not_inherit_a_trace(tiny: tuple[Model, Any]) -> None:
    """A step that only prefills comes after the traced request's last one, whose row is given back by then."""
    engine = fresh(tiny, sparsity=SPARSE)
    asked, other = request(tokens(700), 2, attention=TRACED), request(tokens(650), 4)
    choices, _ = traced(engine, [asked])
    assert len(choices[asked.request_id]) == 1
    later, heard = traced(engine, [other])
    assert later == {other.request_id: []} and heard == []
