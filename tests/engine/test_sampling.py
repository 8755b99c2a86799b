import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.engine.errors import InvalidRequestError
from lserve.engine.request import SampledToken, SamplingParams
from lserve.engine.sampling import SamplingRow, TokenHistory, sample, uniform, validate

VOCAB = 40
GREEDY = SamplingParams(temperature=0.0)


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def row(
    params: SamplingParams, position: int = 0, choice: int = 0, tokens: tuple[list[int], list[int]] = ([], [])
) -> SamplingRow:
    prompt, output = tokens
    return SamplingRow(params, choice, position, [*prompt, *output], len(prompt))


class Reference:
    """One row, in Python's double precision, as plainly as it can be said."""

    def __init__(self, logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> None:
        self.params = params
        logits = list(logits)
        for token, bias in params.logit_bias:
            logits[token] += bias
        for token in {*prompt, *output}:
            penalty = params.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token, count in Counter(output).items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        self.logits = logits

    def probabilities(self) -> tuple[list[float], bool]:
        """What is drawn from, and whether a filter's edge is too close to call in float32."""
        close = False
        scaled = [logit / self.params.temperature for logit in self.logits]
        weights = [math.exp(value - max(scaled)) for value in scaled]
        order = sorted(range(len(weights)), key=lambda token: -weights[token])
        kept = [token for token in order if weights[token] >= self.params.min_p]
        close |= any(abs(weight - self.params.min_p) < 1e-5 * self.params.min_p for weight in weights)
        if self.params.top_k > 0:
            kept = kept[: self.params.top_k]
        if self.params.top_p < 1:
            total = sum(weights[token] for token in kept)
            nucleus, mass = [], 0.0
            for token in kept:
                nucleus.append(token)
                mass += weights[token] / total
                close |= abs(mass - self.params.top_p) < 1e-5
                if mass >= self.params.top_p:
                    break
            kept = nucleus
        total = sum(weights[token] for token in kept)
        return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))], close

    def draw(self, number: float) -> int | None:
        """The token at `number` on the CDF; None when that is too close to an edge to call in float32."""
        probabilities, close = self.probabilities()
        below = 0.0
        for token, probability in enumerate(probabilities):
            if close or abs(below - number) < 1e-5:
                return None
            if number < below + probability:
                return token if abs(below + probability - number) > 1e-5 else None
            below += probability
        return None


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.lists(st.tuples(st.integers(0, VOCAB - 1), st.floats(-5, 5, width=32)), max_size=3).map(tuple),
    seed=st.integers(0, 2**63 - 1),
)
TOKENS = st.tuples(st.lists(st.integers(0, VOCAB - 1), max_size=8), st.lists(st.integers(0, VOCAB - 1), max_size=8))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PARAMS, TOKENS), min_size=1, max_size=5), st.integers(0, 2**31), st.integers(0, 10**6))
def test_every_filter_and_penalty_agrees_with_the_reference(
    cases: list[tuple[SamplingParams, tuple[list[int], list[int]]]], seed: int, position: int
) -> None:
    logits = random_logits(len(cases), seed=seed)
    before = logits.clone()
    drawn = sample(logits, [row(params, position, 3, tokens) for params, tokens in cases])
    assert torch.equal(logits, before)
    for (params, tokens), values, token in zip(cases, logits.tolist(), drawn, strict=True):
        expected = Reference(values, params, *tokens).draw(uniform(params.seed, 3, position))
        assert expected is None or token == SampledToken(expected)


@settings(max_examples=30, deadline=None)
@given(PARAMS, TOKENS, st.integers(0, 2**31))
def test_greedy_takes_the_largest_penalized_logit(
    params: SamplingParams, tokens: tuple[list[int], list[int]], seed: int
) -> None:
    logits = random_logits(1, seed=seed)
    expected = Reference(logits[0].tolist(), params, *tokens).logits
    (drawn,) = sample(logits, [row(replace(params, temperature=0.0), 0, 0, tokens)])
    assert expected[drawn.token_id] == pytest.approx(max(expected), abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5, top_p=0.9),
        SamplingParams(temperature=1.5, top_k=7, min_p=0.02),
        SamplingParams(frequency_penalty=0.7, repetition_penalty=1.2),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(1, seed=4, scale=1.5)
    tokens = ([1, 2, 3], [4, 4, 5])
    expected, _ = Reference(logits[0].tolist(), params, *tokens).probabilities()
    num_draws = 20_000
    drawn = sample(logits.expand(num_draws, VOCAB), [row(params, position, 0, tokens) for position in range(num_draws)])
    counts = Counter(token.token_id for token in drawn)
    assert all(expected[token] > 0 for token in counts)
    statistic = sum(
        (counts[token] - num_draws * share) ** 2 / (num_draws * share) for token, share in enumerate(expected) if share
    )
    freedom = sum(share > 0 for share in expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in (
        (0.49, {0}),
        (0.51, {0, 1}),
        (0.79, {0, 1}),
        (0.81, {0, 1, 2}),
        (0.96, {0, 1, 2, 3}),
        (0.0, {0}),
    ):
        rows = [row(SamplingParams(top_p=top_p), position) for position in range(400)]
        assert {token.token_id for token in sample(logits.expand(400, 4), rows)} == kept


def test_tokens_that_tie_with_the_last_kept_one_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    rows = [row(SamplingParams(top_k=2), position) for position in range(400)]
    assert {token.token_id for token in sample(logits.expand(400, 4), rows)} == {0, 1, 2}


def test_a_nucleus_wider_than_the_first_look_is_cut_right() -> None:
    vocab_size, num_draws = 3000, 500
    flat, narrow = random_logits(1, vocab_size, scale=0.1), torch.full((1, vocab_size), -20.0)
    narrow[0, 17] = 20.0
    params = SamplingParams(top_p=0.5)
    probabilities, close = Reference(flat[0].tolist(), params, [], []).probabilities()
    nucleus = {token for token, probability in enumerate(probabilities) if probability > 0}
    assert not close and len(nucleus) > 1000
    rows = [row(params, position) for position in range(num_draws)]
    drawn = [token.token_id for token in sample(torch.cat([flat, narrow]).repeat(num_draws // 2, 1), rows)]
    assert set(drawn[1::2]) == {17}
    assert set(drawn[::2]) <= nucleus
    first_look = set(flat[0].topk(256).indices.tolist())
    assert len(set(drawn[::2]) - first_look) > 100


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = random_logits(6, 1000)
    kinds = [
        SamplingParams(seed=5),
        GREEDY,
        SamplingParams(seed=6, top_p=0.8),
        SamplingParams(seed=7, top_k=3, presence_penalty=1.0),
        SamplingParams(seed=8, min_p=0.05, logprobs=2),
        SamplingParams(seed=9, temperature=3.0, logit_bias=((3, 10.0),)),
    ]
    rows = [row(params, 10 + i, i, ([1, 2], [3])) for i, params in enumerate(kinds)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    assert [token.token_id for token in together] == [token.token_id for token in alone]
    backwards = sample(logits.flip(0), rows[::-1])
    assert [token.token_id for token in backwards] == [token.token_id for token in together[::-1]]


def test_the_deciding_number_depends_on_seed_choice_and_position_alone_and_spreads_evenly() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    numbers = {uniform(seed, choice, position) for seed in range(20) for choice in range(20) for position in range(20)}
    assert len(numbers) == 8000
    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(abs(tenths[tenth] - 800) < 130 for tenth in range(10))
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


def test_history_gives_the_penalties_of_counting_anew() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.2)
    history = TokenHistory()
    tokens = [3, 7, 7, 9]
    for step in range(30):
        logits = random_logits(1, seed=step, scale=1.0)
        fresh = SamplingRow(params, 0, len(tokens), list(tokens), 4)
        kept = replace(fresh, history=history)
        assert sample(logits, [kept]) == sample(logits, [fresh])
        tokens.append(sample(logits, [fresh])[0].token_id)


def test_history_that_starts_amid_the_output_knows_prompt_from_output() -> None:
    history = TokenHistory()
    seen, counts = history.catch_up([1, 2, 2, 5, 5], 3, torch.zeros(8))
    assert seen.nonzero().flatten().tolist() == [1, 2, 5]
    assert counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    _, counts = history.catch_up([1, 2, 2, 5, 5, 2], 3, torch.zeros(8))
    assert counts.tolist() == [0, 0, 1, 0, 0, 2, 0, 0]


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(3)
    params = SamplingParams(
        temperature=0.3, top_k=1, logit_bias=((5, 50.0),), repetition_penalty=2.0, frequency_penalty=1.0, logprobs=4
    )
    rows = [row(params, tokens=([1], [2])), row(replace(params, logprobs=0)), row(replace(params, logprobs=None))]
    expected = logits.double().log_softmax(-1)
    four, none_beside, nothing = sample(logits, rows)
    assert four.token_id == none_beside.token_id == nothing.token_id == 5
    assert nothing.logprob is None
    assert none_beside.logprob is not None and none_beside.logprob.top == ()
    assert four.logprob is not None and four.logprob.token_id == 5
    assert four.logprob.logprob == pytest.approx(expected[0, 5].item(), abs=1e-5)
    best = expected[0].sort(descending=True)
    assert [token for token, _ in four.logprob.top] == best.indices[:4].tolist()
    assert [value for _, value in four.logprob.top] == pytest.approx(best.values[:4].tolist(), abs=1e-5)


def test_a_tiny_temperature_is_greedy_and_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0], [-math.inf, 2.0, 1.0]])
    for temperature in (1e-30, 1e-4, 100.0):
        drawn = sample(logits, [row(SamplingParams(temperature=temperature))] * 2)
        assert drawn[0].token_id == 0
        assert drawn[1].token_id in (1, 2)
    assert sample(logits, [row(SamplingParams(temperature=1e-30))] * 2)[1].token_id == 1


def test_logits_that_are_no_numbers_still_give_a_token_of_the_vocabulary() -> None:
    (drawn,) = sample(torch.full((1, 9), math.nan), [row(SamplingParams(top_p=0.9))])
    assert 0 <= drawn.token_id < 9


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize(
    ("params", "name", "message"),
    [
        (SamplingParams(n=0), "n", "n must be between 1 and 128, got 0"),
        (SamplingParams(temperature=-0.1), "temperature", "temperature must be at least 0, got -0.1"),
        (SamplingParams(temperature=math.nan), "temperature", "temperature must be at least 0, got nan"),
        (SamplingParams(temperature=math.inf), "temperature", "temperature must be at least 0, got inf"),
        (SamplingParams(top_k=-2), "top_k", "top_k must be at least -1, got -2"),
        (SamplingParams(top_p=1.1), "top_p", "top_p must be between 0 and 1, got 1.1"),
        (SamplingParams(min_p=-1.0), "min_p", "min_p must be between 0 and 1, got -1.0"),
        (
            SamplingParams(presence_penalty=2.5),
            "presence_penalty",
            "presence_penalty must be between -2 and 2, got 2.5",
        ),
        (SamplingParams(frequency_penalty=-3.0), "frequency_penalty", "must be between -2 and 2, got -3.0"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty", "must be a number above 0, got 0.0"),
        (SamplingParams(max_tokens=0), "max_tokens", "max_tokens must be at least 1, got 0"),
        (SamplingParams(logprobs=21), "logprobs", "logprobs must be between 0 and 20, got 21"),
        (SamplingParams(stop=("a", "")), "stop", "stop must not have an empty string"),
        (SamplingParams(stop=("x",) * 65), "stop", "stop must have at most 64 strings, got 65"),
        (SamplingParams(stop_token_ids=(1, 40)), "stop_token_ids", "token ids from 0 to 39, got 40"),
        (SamplingParams(logit_bias=((-1, 1.0),)), "logit_bias", "token ids from 0 to 39, got -1"),
        (SamplingParams(logit_bias=((1, math.nan),)), "logit_bias", "between -100 and 100, got nan for token 1"),
    ],
)
def test_a_value_out_of_range_is_named(params: SamplingParams, name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        validate(params, VOCAB)
    assert error.value.param == name


@given(PARAMS)
def test_values_in_range_pass(params: SamplingParams) -> None:
    validate(params, VOCAB)
