"""From logits to tokens: bias, penalties, temperature, filters, draw and log-probabilities, for a whole batch at once.

The order is vLLM's: logit_bias, penalties, temperature, min_p, top_k, top_p. Each filter is a lowest kept logit, so the
strictest wins and tokens that tie with the last kept one stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lserve.kernels.sample import GREEDY_BELOW
from lserve.kernels.sample import sample as draw
from lserve.kernels.upload import upload

from .request import SampledToken, SamplingParams, TokenLogprob
from .sampling_limits import validate

__all__ = ["SamplingRow", "TokenHistory", "sample", "uniform", "validate"]

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
            fresh = upload(token_ids[start:], torch.int64, like.device)
            self._seen.index_fill_(0, fresh, True)  # assigning a scalar would wait for the device
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
    the model's own, before bias, penalties and temperature. Waits for the device once, to read the tokens.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} rows"
    if not rows:
        return []
    tokens = _choose(_penalize(_add_bias(logits, rows), rows), rows)
    if all(row.params.logprobs is None for row in rows):
        return [SampledToken(token_id) for token_id in tokens.tolist()]
    return _with_logprobs(logits, rows, tokens)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Tokens, int64 [rows], by each row's temperature and filters."""
    params = [row.params for row in rows]
    if all(p.temperature < GREEDY_BELOW for p in params):
        return logits.argmax(-1)
    columns = (
        [p.temperature for p in params],
        [min(max(p.top_k, 0), logits.shape[1]) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [uniform(row.params.seed, row.choice, row.position) for row in rows],
    )
    temperature, top_k, top_p, min_p, numbers = upload(columns, torch.float64, logits.device).unbind(0)
    filtered = any(p.top_k > 0 or p.top_p < 1 for p in params)
    return draw(logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), numbers, filtered=filtered)


def _has_penalty(params: SamplingParams) -> bool:
    return (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0.0, 0.0, 1.0)


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return upload(values, dtype, like.device).unsqueeze(1)


def _add_bias(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    entries = [(index, token_id, bias) for index, row in enumerate(rows) for token_id, bias in row.params.logit_bias]
    if not entries:
        return logits
    places, token_ids, biases = zip(*entries, strict=True)
    where = tuple(upload(x, torch.int64, logits.device) for x in (places, token_ids))
    return logits.index_put(where, upload(biases, logits.dtype, logits.device), accumulate=True)


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
    places = upload(indices, torch.int64, logits.device)
    selected = logits[places]
    repetition = _column([p.repetition_penalty for p in params], logits)
    repeated = torch.where(selected > 0, selected / repetition, selected * repetition)
    selected = torch.where(seen, repeated, selected)
    selected -= _column([p.frequency_penalty for p in params], logits) * counts
    selected -= _column([p.presence_penalty for p in params], logits) * (counts > 0)
    return logits.index_copy(0, places, selected)


def _with_logprobs(logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: torch.Tensor) -> list[SampledToken]:
    """Tokens and log-probabilities come to the host in one piece, as float64, which holds every id and float32."""
    wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    places = upload(list(wanted), torch.int64, logits.device)
    logprobs = logits[places].log_softmax(-1)
    num_top = min(max(wanted.values()), logits.shape[1])
    top = logprobs.topk(num_top)
    chosen = logprobs.gather(1, tokens[places].unsqueeze(1))
    reports = torch.cat((chosen.double(), top.values.double(), top.indices.double()), 1)
    everything = torch.cat((tokens.double(), reports.flatten())).tolist()
    token_ids, left = [int(token) for token in everything[: len(rows)]], everything[len(rows) :]
    drawn = [SampledToken(token_id) for token_id in token_ids]
    for line, (index, count) in enumerate(wanted.items()):
        logprob, *best = left[line * (2 * num_top + 1) : (line + 1) * (2 * num_top + 1)]
        alternatives = tuple(
            (int(token), value) for value, token in zip(best[:count], best[num_top:][:count], strict=True)
        )
        drawn[index] = SampledToken(token_ids[index], TokenLogprob(token_ids[index], logprob, alternatives))
    return drawn
