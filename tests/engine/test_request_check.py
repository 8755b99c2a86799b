"""Whatever a request says, the engine serves it or refuses it in one line, and keeps nothing of it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_engines import MIXED, SPARSITY, VOCABULARY, assert_idle, fresh, request, tokens

from lserve.engine.config import SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.errors import CapacityError, InvalidRequestError, PromptTooLongError, SettingsError
from lserve.engine.loading import LoadedModel
from lserve.engine.model import Model
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import AttentionOptions, Request, SamplingParams

HUGE = 10**400
"""No float holds it."""


@pytest.fixture(scope="module")
def engine(tiny: tuple[Model, Any]) -> Iterator[Engine]:
    """A small engine that many requests go through."""
    sizes = PoolSizes(retrieval_pages=16, streaming_pages=64, rows=6)
    yield fresh(tiny, streaming=MIXED, sizes=sizes, max_batch_size=4, poison=False)


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"prompt_token_ids": ()}, "the prompt has no tokens", "prompt"),
        ({"prompt_token_ids": (5, VOCABULARY)}, "token id 512 is outside the vocabulary of 512", "prompt"),
        ({"prompt_token_ids": (-1,)}, "token id -1 is outside", "prompt"),
        ({"emitted": (7, HUGE)}, "is outside the vocabulary", "prompt"),
        ({"emitted": (7,) * 5}, "5 emitted tokens are more than max_tokens 4", "emitted"),
        ({"emitted": (7,), "n": 2}, "n must be 1 where tokens were emitted already, got 2", "n"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"max_tokens": HUGE}, "max_tokens must be", "max_tokens"),
        ({"max_tokens": 10**12}, "are over the limit of 4096 tokens", "max_tokens"),
        ({"n": 0}, "n must be between 1 and 128, got 0", "n"),
        ({"n": 5}, "n must be at most 4, got 5", "n"),
        ({"top_k": -2}, "top_k must be at least -1", "top_k"),
        ({"top_p": math.nan}, "top_p must be between 0 and 1, got nan", "top_p"),
        ({"temperature": math.inf}, "temperature must be at least 0, got inf", "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0", "repetition_penalty"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20", "logprobs"),
        ({"stop": ("",)}, "stop must not have an empty string", "stop"),
        ({"stop_token_ids": (VOCABULARY,)}, "stop_token_ids must have token ids from 0 to 511", "stop_token_ids"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias must be between -100 and 100", "logit_bias"),
        ({"attention": AttentionOptions(token_budget=64)}, "token_budget must be from 320 to 16384", None),
        ({"attention": AttentionOptions(token_budget=HUGE)}, "token_budget must be from 320 to 16384", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_message_names_what_is_wrong(
    engine: Engine, changes: dict[str, Any], message: str, param: str | None
) -> None:
    made = request(tokens(8), 4)
    own = {name: changes[name] for name in ("prompt_token_ids", "emitted", "attention") if name in changes}
    sampling = replace(made.sampling, **{name: value for name, value in changes.items() if name not in own})
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.add_request(replace(made, sampling=sampling, **own))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert caught.value.param == (param or "lserve.token_budget")
    assert_idle(engine)


def test_more_pages_than_there_are_is_too_long(engine: Engine) -> None:
    with pytest.raises(PromptTooLongError, match="the request needs 17 pages, the pool has 16"):
        engine.add_request(request(tokens(1000), 30))
    with pytest.raises(PromptTooLongError, match="the request needs 18 pages, the pool has 16"):
        engine.add_request(request(tokens(500), 64, n=4))
    assert_idle(engine)


def test_budgets_are_measured_against_the_head_profiles_window(tiny: tuple[Model, Any]) -> None:
    """The profile's sink and window take the place of the settings', for what a budget must hold as for all else."""
    made = fresh(tiny, sparsity=SPARSITY)
    profiled = replace(SPARSITY, sink_size=256, local_window=512)
    loaded = LoadedModel(made.runner.model, made.tokenizer, made.page_format, profiled)
    engine = Engine(made.config, loaded, sizes=PoolSizes(16, 64, 4))
    with pytest.raises(InvalidRequestError, match="token_budget must be from 896 to"):
        engine.add_request(request(tokens(8), attention=AttentionOptions(token_budget=320)))


numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 20, 21, 0.5, 1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, 2**31, 2**64, HUGE]),
    st.floats(),
    st.integers(-3, 300),
)
integers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, -(2**63), HUGE]))
ids = st.lists(st.one_of(st.integers(0, VOCABULARY - 1), integers), max_size=4).map(tuple)
good = {
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 3),
    "max_tokens": st.integers(1, 12),
}
bad = {
    "n": integers,
    "temperature": numbers,
    "top_k": integers,
    "top_p": numbers,
    "min_p": numbers,
    "presence_penalty": numbers,
    "frequency_penalty": numbers,
    "repetition_penalty": numbers,
    "seed": integers,
    "max_tokens": integers,
    "stop": st.lists(st.text(max_size=3), max_size=3).map(tuple),
    "stop_token_ids": ids,
    "ignore_eos": st.booleans(),
    "logprobs": st.one_of(st.none(), integers),
    "logit_bias": st.lists(st.tuples(st.integers(-1, VOCABULARY), numbers), max_size=3).map(tuple),
}


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Requests that are sound but for a few fields that may hold anything of their type."""
    wrong = draw(st.lists(st.sampled_from(sorted(bad)), max_size=3, unique=True))
    fields = {name: draw(values) for name, values in good.items()} | {name: draw(bad[name]) for name in wrong}
    prompt = draw(st.one_of(st.integers(1, 300).map(tokens), ids))
    attention = draw(
        st.builds(AttentionOptions, token_budget=st.one_of(st.none(), integers, st.just(512)), dense=st.booleans())
    )
    return Request(
        "fuzzed",
        prompt,
        SamplingParams(**fields),
        attention,
        tenant=draw(st.text(max_size=3)),
        emitted=draw(st.one_of(st.just(()), ids)),
        choice=draw(st.integers(0, 3)),
        deadline=draw(st.sampled_from([math.inf, 0.0, -1.0, math.nan])),
    )


@given(made=requests(), prefill_only=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_is_served_or_refused_and_leaves_nothing(engine: Engine, made: Request, prefill_only: bool) -> None:
    try:
        engine.add_request(made, prefill_only=prefill_only)
    except (InvalidRequestError, CapacityError) as error:
        assert str(error) and "\n" not in str(error)
        assert_idle(engine)
        return
    ended: set[int] = set()
    for _ in range(100):
        if not engine.has_work:
            break
        result = engine.step()
        ended |= {output.choice for output in result.outputs if output.finish_reason is not None}
        ended |= {number for chunk in result.chunks if chunk.last for number in range(made.sampling.n)}
        ended |= {number for _ in result.errors for number in range(made.sampling.n)}
    assert len(ended) == made.sampling.n
    assert_idle(engine)
    assert not torch.isnan(engine.cache.tail).any()


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"token_budget": 448}, {"sink_size": 100}, {"reselect_interval": 3}, {"candidate_factor": 0}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            SparsityConfig(**wrong)
    for wrong in ({"chunk_size": 100}, {"max_batch_size": 0}, {"max_waiting": 0}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            SchedulerConfig(**wrong)
