"""From logits to tokens: bias, penalties, temperature, filters, draw and log-probabilities, for a whole batch at once.

The order is vLLM's: logit_bias, penalties, temperature, min_p, top_k, top_p. Each filter is a lowest kept logit, so the
strictest wins and tokens that tie with the last kept one stay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .request import SampledToken, SamplingParams, TokenLogprob
from .sampling_limits import validate

__all__ = ["SamplingRow", "TokenHistory", "sample", "uniform", "validate"]

_GREEDY_BELOW = 1e-5
_SORTED_AT_FIRST = 256
_MASK = 2**64 - 1


class TokenHistory:
    """Which tokens a choice has seen and written, kept on the logits' device between steps for the penalties."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def catch_up(
        self, token_ids: Sequence[int], num_prompt_tokens: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the tokens that came since the last call.

        token_ids: prompt, then output; only ever grows. like: one row of logits, [vocab], for size and device.
        Returns bool [vocab]: in prompt or output; int32 [vocab]: how often in the output.
        """
        if self._seen is None or self._counts is None or self._seen.device != like.device:
            self._num_tokens = 0
            self._seen = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
            self._counts = torch.zeros(like.shape, dtype=torch.int32, device=like.device)
        start, self._num_tokens = self._num_tokens, len(token_ids)
        assert start <= self._num_tokens, f"{start} tokens were counted, {self._num_tokens} are left"
        if start < self._num_tokens:
            fresh = torch.tensor(token_ids[start:], dtype=torch.int64, device=like.device)
            self._seen[fresh] = True
            output = fresh[max(num_prompt_tokens - start, 0) :]
            self._counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return self._seen, self._counts


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What is needed to draw one token.

    position: index in prompt and output of the token that is drawn. token_ids: prompt, then output, so far, read only
    for penalties; the first num_prompt_tokens are the prompt's. history: spares the penalties from counting all
    token_ids anew in every step; one object a choice.
    """

    params: SamplingParams
    choice: int
    position: int
    token_ids: Sequence[int] = ()
    num_prompt_tokens: int = 0
    history: TokenHistory | None = None


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) that decides a draw: 53 bits of SplitMix64 (Steele et al., OOPSLA 2014) over all three."""
    return (_mix(_mix(_mix(seed & _MASK) ^ choice) ^ position) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Draw one token per row; logits float32 [len(rows), vocab], not changed.

    A draw depends on the row's logits and (seed, choice, position) only, never on the batch. Log-probabilities are
    the model's own, before bias, penalties and temperature.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} rows"
    if not rows:
        return []
    adjusted = _penalize(_add_bias(logits, rows), rows)
    tokens = adjusted.argmax(-1)
    drawn = [index for index, row in enumerate(rows) if not _is_greedy(row.params)]
    if len(drawn) == len(rows):
        tokens = _draw(adjusted, rows)
    elif drawn:
        tokens[drawn] = _draw(adjusted[drawn], [rows[index] for index in drawn])
    token_ids: list[int] = tokens.tolist()
    if all(row.params.logprobs is None for row in rows):
        return [SampledToken(token_id) for token_id in token_ids]
    return _with_logprobs(logits, rows, token_ids)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def _has_penalty(params: SamplingParams) -> bool:
    return (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0.0, 0.0, 1.0)


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)


def _add_bias(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    entries = [(index, token_id, bias) for index, row in enumerate(rows) for token_id, bias in row.params.logit_bias]
    if not entries:
        return logits
    places, token_ids, biases = zip(*entries, strict=True)
    where = (torch.tensor(places, device=logits.device), torch.tensor(token_ids, device=logits.device))
    return logits.index_put(where, torch.tensor(biases, dtype=logits.dtype, device=logits.device), accumulate=True)


def _penalize(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Repetition (on prompt and output), then frequency and presence penalty (on output)."""
    indices = [index for index, row in enumerate(rows) if _has_penalty(row.params)]
    if not indices:
        return logits
    params = [rows[index].params for index in indices]
    histories = [
        (row.history or TokenHistory()).catch_up(row.token_ids, row.num_prompt_tokens, logits[0])
        for row in (rows[index] for index in indices)
    ]
    seen = torch.stack([seen for seen, _ in histories])
    counts = torch.stack([counts for _, counts in histories])
    selected = logits[indices]
    repetition = _column([p.repetition_penalty for p in params], logits)
    repeated = torch.where(selected > 0, selected / repetition, selected * repetition)
    selected = torch.where(seen, repeated, selected)
    selected -= _column([p.frequency_penalty for p in params], logits) * counts
    selected -= _column([p.presence_penalty for p in params], logits) * (counts > 0)
    penalized = logits.clone()
    penalized[indices] = selected
    return penalized


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Tokens [rows] by inverse CDF over the kept ones.

    The CDF runs in vocabulary order: in order of probability, two tokens that rounding swaps would swap their shares of
    [0, 1), and a replay on another worker could go astray far more often.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)) / _column([row.params.temperature for row in rows], logits)
    weights = torch.where(scaled >= _lowest_kept(scaled, rows), scaled.exp(), 0.0)
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    numbers = [uniform(row.params.seed, row.choice, row.position) for row in rows]
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(_column(numbers, logits, torch.float64) * total, below)
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _lowest_kept(scaled: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The lowest kept value of each row, [rows, 1]; scaled has a maximum of 0 in every row."""
    floor = _column([math.log(row.params.min_p) if row.params.min_p > 0 else -math.inf for row in rows], scaled)
    filtered = [index for index, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1]
    if filtered:
        params = [rows[index].params for index in filtered]
        width = max(_SORTED_AT_FIRST, *(p.top_k for p in params))
        floor[filtered] = _cut(scaled[filtered], floor[filtered], params, min(width, scaled.shape[1]))
    return floor


def _cut(scaled: torch.Tensor, floor: torch.Tensor, params: Sequence[SamplingParams], width: int) -> torch.Tensor:
    """Raise the floor by top_k, then top_p; looks at the `width` best tokens, and at all where these do not decide."""
    before = floor
    best = scaled.topk(width).values
    vocab = scaled.shape[1]
    top_k = _column([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], scaled, torch.int64)
    kth = best.gather(1, top_k.clamp(max=width) - 1)
    floor = torch.where(top_k <= width, torch.maximum(floor, kth), floor)
    top_p = _column([p.top_p for p in params], scaled, torch.float64)
    total = torch.where(scaled >= floor, scaled.exp(), 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.where(best >= floor, best.exp(), 0.0).cumsum(-1, dtype=torch.float64)
    crossing = (mass < top_p * total).sum(-1, keepdim=True)
    nucleus = torch.maximum(floor, best.gather(1, crossing.clamp(max=width - 1)))
    floor = torch.where(top_p < 1, nucleus, floor)
    if width < scaled.shape[1]:
        short = ((crossing == width) & (top_p < 1)).flatten().nonzero().flatten().tolist()
        if short:
            floor[short] = _cut(scaled[short], before[short], [params[index] for index in short], scaled.shape[1])
    return floor


def _with_logprobs(logits: torch.Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> list[SampledToken]:
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = logits[wanted].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([[token_ids[index]] for index in wanted], device=logits.device))
    num_top = max(rows[index].params.logprobs or 0 for index in wanted)
    top = logprobs.topk(min(num_top, logits.shape[1]))
    reports = {}
    for index, logprob, values, ids in zip(
        wanted, chosen.flatten().tolist(), top.values.tolist(), top.indices.tolist(), strict=True
    ):
        alternatives = tuple(zip(ids, values, strict=True))[: rows[index].params.logprobs]
        reports[index] = TokenLogprob(token_ids[index], logprob, alternatives)
    return [SampledToken(token_id, reports.get(index)) for index, token_id in enumerate(token_ids)]
