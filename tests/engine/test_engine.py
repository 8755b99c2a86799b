"""Whole requests through the engine: it computes what transformers computes, and every head reads what it should."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import their_logits
from tiny_engines import (
    KV_DTYPES,
    MIXED,
    RETRIEVAL,
    SPARSITY,
    Draws,
    Probe,
    assert_idle,
    attended,
    in_reach,
    make_engine,
    request,
    run,
    tokens,
)
from torch import Tensor

from lserve.engine.config import BLOCK_SIZE
from lserve.engine.engine import Engine
from lserve.engine.errors import CapacityError, DeadlineExceededError, InvalidRequestError
from lserve.engine.model import Model
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import AttentionOptions, FinishReason, Request, SamplingParams

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 300, 511, 512, 700)
STREAMING = ((True, True),) * 3


def assert_as_transformers(theirs: Any, draws: Draws, asked: Request, answer: list[int], choice: int = 0) -> None:
    """Logits within 1e-3 of a teacher-forced transformers, and its greedy token where that is no near tie."""
    prompt = len(asked.prompt_token_ids)
    expected = their_logits(theirs, torch.tensor([*asked.prompt_token_ids, *answer]))
    ours = draws.of(asked, choice)
    assert list(ours) == list(range(prompt, prompt + len(answer)))
    for position, logits in ours.items():
        torch.testing.assert_close(logits, expected[position - 1], atol=1e-3, rtol=0)
        first, second = expected[position - 1].topk(2).values
        if first - second > 1e-2:
            assert answer[position - prompt] == int(expected[position - 1].argmax())


def test_requests_of_all_lengths_in_one_batch_equal_transformers(tiny: tuple[Model, Any], draws: Draws) -> None:
    engine, probe = make_engine(tiny[0], chunk_size=256)
    asked = [request(tokens(n, seed=n), 70 if n in (1, 64, 200) else 5) for n in LENGTHS]
    answers = run(engine, asked)
    assert max(probe.batch_sizes) >= 4, "requests must have shared decode steps"
    for item in asked:
        answer = answers[item.request_id, 0]
        assert len(answer.token_ids) == item.sampling.max_tokens
        assert answer.finish_reason is FinishReason.LENGTH
        assert answer.text == engine.tokenizer.decode(answer.token_ids)
        assert_as_transformers(tiny[1], draws, item, answer.token_ids)
    assert_idle(engine)


def test_choices_of_one_request_share_the_prompt_and_draw_apart(tiny: tuple[Model, Any], draws: Draws) -> None:
    engine, _ = make_engine(tiny[0])
    asked = request(tokens(150), 80, n=3, temperature=1.0)
    answers = run(engine, [asked, request(tokens(20), 3)])
    texts = [answers[asked.request_id, choice].token_ids for choice in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    prompt = torch.tensor(asked.prompt_token_ids)
    for choice, text in enumerate(texts):
        expected = their_logits(tiny[1], torch.cat((prompt, torch.tensor(text))))
        for position, logits in draws.of(asked, choice).items():
            torch.testing.assert_close(logits, expected[position - 1], atol=1e-3, rtol=0)
    assert_idle(engine)


def check_attention(engine: Engine, probe: Probe) -> int:
    """Every attention call against explicit masks, in float64, from the keys and values that the model gave.

    Selected pages are not looked at: everything must fit the budget. Returns how many queries were checked.
    """
    page_format, scale = engine.page_format, engine.model_config.head_dim**-0.5
    sink_size, local_window = engine.config.sparsity.sink_size, engine.config.sparsity.local_window
    written: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    checked = 0
    for call in probe.calls:
        begin = 0
        while begin < len(call.owners):
            sequence, first = call.owners[begin]
            end = begin + 1
            while end < len(call.owners) and call.owners[end][0] is sequence:
                end += 1
            key, value = call.key[begin:end], call.value[begin:end]
            if first:
                known = written[call.layer, id(sequence)]
                key, value = torch.cat((known[0][:first], key)), torch.cat((known[1][:first], value))
            written[call.layer, id(sequence)] = key, value
            positions = torch.arange(first, first + end - begin)
            streams = torch.tensor(page_format.streaming[call.layer])[:, None, None]
            reach = in_reach(positions, len(key), sink_size, local_window)
            seen = torch.where(streams, reach, torch.arange(len(key)) <= positions[:, None])
            expected = attended(call.query[begin:end], positions, key, value, seen, page_format.layout, scale)
            torch.testing.assert_close(call.out[begin:end].double(), expected, atol=2e-5, rtol=0)
            checked += end - begin
            begin = end
    return checked


@pytest.mark.parametrize("streaming", [RETRIEVAL, MIXED, STREAMING], ids=["retrieval", "mixed", "streaming"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_head_reads_its_tokens_as_its_pages_decode(
    tiny: tuple[Model, Any], kv_dtype: str, streaming: tuple[tuple[bool, ...], ...]
) -> None:
    engine, probe = make_engine(tiny[0], kv_dtype=kv_dtype, streaming=streaming, chunk_size=384)
    probe.keeps_calls = True
    asked = [request(tokens(n, seed=n), 20) for n in (1, 60, 128, 321, 590)]
    run(engine, asked)
    num_tokens = sum(len(r.prompt_token_ids) + 19 for r in asked)
    assert check_attention(engine, probe) == 3 * num_tokens
    assert_idle(engine)


def test_what_decode_seals_is_read_back_as_its_page_decodes(tiny: tuple[Model, Any]) -> None:
    """Pages that decode fills one token at a time, in both head classes."""
    engine, probe = make_engine(tiny[0], kv_dtype="int4", streaming=MIXED)
    probe.keeps_calls = True
    run(engine, [request(tokens(30), 300), request(tokens(63, seed=1), 140)])
    assert check_attention(engine, probe) == 3 * (30 + 299 + 63 + 139)


@pytest.mark.parametrize("estimator", [{"prefill_threshold": 0.9}, {"prefill_budget": 0.25}], ids=str)
def test_dense_requests_and_sparse_prefill_in_turn(
    tiny: tuple[Model, Any], draws: Draws, estimator: dict[str, float]
) -> None:
    """`dense` lifts the prefill estimator for its own request only; chunks of the two kinds never share a step."""
    sparsity = replace(SPARSITY, prefill_sparse_from=256, **estimator)
    engine, _ = make_engine(tiny[0], sparsity=sparsity, chunk_size=256)
    prompt = tokens(700)
    sparse, dense = request(prompt, 2), request(prompt, 2, attention=AttentionOptions(dense=True))
    answers = run(engine, [sparse, dense, request(tokens(3), 2)])
    assert_as_transformers(tiny[1], draws, dense, answers[dense.request_id, 0].token_ids)
    expected = their_logits(tiny[1], torch.tensor(prompt))[-1]
    assert (draws.of(sparse)[700] - expected).abs().max() > 1e-2, "blocks must have been left out"
    assert_idle(engine)


def test_stops_and_limits_end_choices(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0])
    prompt = tokens(40)
    whole = run(engine, [asked := request(prompt, 12)])[asked.request_id, 0]
    stop = engine.tokenizer.decode(whole.token_ids[4:6])
    cases = {
        "stop": request(prompt, 12, stop=(stop,)),
        "stop_token": request(prompt, 12, stop_token_ids=(whole.token_ids[3],)),
        "one": request(prompt, 1),
    }
    answers = {name: run(engine, [item])[item.request_id, 0] for name, item in cases.items()}
    assert whole.text.startswith(answers["stop"].text)
    assert len(answers["stop"].text) == whole.text.index(stop)
    assert answers["stop"].finish_reason is answers["stop_token"].finish_reason is FinishReason.STOP
    assert answers["stop_token"].text == whole.text[: whole.token_ids.index(whole.token_ids[3])]
    assert answers["one"].token_ids == whole.token_ids[:1] and answers["one"].finish_reason is FinishReason.LENGTH
    assert_idle(engine)


def test_penalties_and_bias_reach_the_sampler(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0])
    biased = request(tokens(9), 6, logit_bias=((7, 100.0),))
    varied = request(tokens(9), 30, logit_bias=((7, 60.0), (8, 60.0)), presence_penalty=2.0, frequency_penalty=2.0)
    answers = run(engine, [biased, varied])
    assert answers[biased.request_id, 0].token_ids == [7] * 6
    counts = [answers[varied.request_id, 0].token_ids.count(token) for token in (7, 8)]
    assert min(counts) >= 10, "frequency penalties must make the two favourites take turns"


@pytest.mark.parametrize("when", range(0, 9))
def test_abort_at_any_time_leaves_nothing(tiny: tuple[Model, Any], when: int) -> None:
    sizes = PoolSizes(retrieval_pages=16, streaming_pages=64, rows=12)
    engine, _ = make_engine(tiny[0], streaming=MIXED, sizes=sizes, chunk_size=128, max_batch_size=6)
    asked = [request(tokens(n, seed=n), 200, n=choices) for n, choices in ((300, 1), (180, 3), (5, 1), (100, 2))]
    for item in asked:
        engine.add_request(item)
    for _ in range(when * 15):
        engine.step()
    for item in asked:
        was_there = item.request_id in engine._live
        assert engine.abort(item.request_id) == was_there
        assert not engine.abort(item.request_id)
    assert all(not result for result in (engine.scheduler.has_work, engine.load().running, engine.load().waiting))
    engine.step()
    assert_idle(engine)


def test_a_request_past_its_deadline_fails_and_leaves_nothing(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0])
    late, fine = request(tokens(300), 50, deadline=1.0), request(tokens(10), 2)
    engine.add_request(late)
    engine.add_request(fine)
    ((failed, error),) = engine.step().errors
    assert failed == late.request_id and isinstance(error, DeadlineExceededError) and late.request_id in str(error)
    run(engine)
    assert_idle(engine)


def test_a_full_queue_and_a_used_id_are_refused_and_keep_nothing(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0], max_waiting=2)
    asked = [request(tokens(5), 2) for _ in range(3)]
    engine.add_request(asked[0])
    with pytest.raises(InvalidRequestError, match="is in use"):
        engine.add_request(asked[0])
    engine.add_request(asked[1])
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        engine.add_request(asked[2])
    assert set(run(engine)) == {(r.request_id, 0) for r in asked[:2]}
    assert_idle(engine)


def test_generate_answers_texts_and_token_ids(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0])
    prompt = tokens(20)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    by_ids, by_text = engine.generate([prompt, engine.tokenizer.decode(prompt)], params)
    assert by_ids == by_text and len(by_ids) == 5
    assert_idle(engine)


def test_generate_takes_more_prompts_than_the_queue_and_none_when_one_is_wrong(tiny: tuple[Model, Any]) -> None:
    engine, _ = make_engine(tiny[0], max_waiting=2, max_batch_size=2)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    assert [len(text) for text in engine.generate([tokens(5, seed=i) for i in range(7)], params)] == [2] * 7
    with pytest.raises(InvalidRequestError, match="token id -1"):
        engine.generate([tokens(5), (-1,)], params)
    assert_idle(engine)


def test_whole_blocks_per_chunk_but_for_the_last(tiny: tuple[Model, Any]) -> None:
    engine, probe = make_engine(tiny[0], chunk_size=256)
    probe.keeps_calls = True
    run(engine, [request(tokens(n, seed=n), 1) for n in (70, 700, 130)])
    starts = [position for call in probe.calls if call.layer == 0 for _, position in call.owners[:1]]
    assert all(start % BLOCK_SIZE == 0 for start in starts)
    assert max(len(call.owners) for call in probe.calls) <= 256
