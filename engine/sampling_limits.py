"""The ranges of sampling parameters. No torch, so that a router can refuse a request before any engine sees it."""

import sys

from .errors import InvalidRequestError
from .request import SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
LARGEST = sys.float_info.max


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequestError, with the field's name as `param`, for the first value that is out of range."""
    _check_range("n", params.n, 1, MAX_CHOICES)
    _check_range("temperature", params.temperature, 0.0)
    _check_range("top_k", params.top_k, -1)
    _check_range("top_p", params.top_p, 0.0, 1.0)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if not 0.0 < params.repetition_penalty <= LARGEST:
        raise _error("repetition_penalty", f"must be a number above 0, got {params.repetition_penalty}")
    _check_range("max_tokens", params.max_tokens, 1)
    if params.logprobs is not None:
        _check_range("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if len(params.stop) > MAX_STOPS:
        raise _error("stop", f"must have at most {MAX_STOPS} strings, got {len(params.stop)}")
    if "" in params.stop:
        raise _error("stop", "must not have an empty string")
    for token_id in params.stop_token_ids:
        _check_token("stop_token_ids", token_id, vocab_size)
    for token_id, bias in params.logit_bias:
        _check_token("logit_bias", token_id, vocab_size)
        if not -100.0 <= bias <= 100.0:
            raise _error("logit_bias", f"must be between -100 and 100, got {bias} for token {token_id}")


def _error(name: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {message}", param=name)


def _check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    if low <= value <= (LARGEST if high is None else high):
        return
    wanted = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    raise _error(name, f"must be {wanted}, got {value}")


def _check_token(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise _error(name, f"must have token ids from 0 to {vocab_size - 1}, got {token_id}")
