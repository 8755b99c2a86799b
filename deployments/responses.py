"""HTTP bodies out: what OpenAI's clients expect, built from the engine's outputs."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic_core import to_json

from lserve.engine.errors import (
    AuthenticationError,
    CapacityError,
    LServeError,
    ModelNotFoundError,
    PromptTooLongError,
)
from lserve.engine.request import Output, TokenLogprob

from .traces import Traces

Json = dict[str, Any]

_CODES: dict[type[LServeError], str] = {
    AuthenticationError: "invalid_api_key",
    CapacityError: "rate_limit_exceeded",
    ModelNotFoundError: "model_not_found",
    PromptTooLongError: "context_length_exceeded",
}


class TokenBytes(Protocol):
    """The part of the tokenizer that log-probabilities need."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; some tokens are only a part of a character."""


@dataclass(frozen=True, slots=True)
class Head:
    """What all bodies of one answer share. created: UNIX seconds."""

    answer_id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer, all its prompts and choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> Json:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Shape(Protocol):
    """How one kind of answer looks, whole and in pieces. One object per answer: it may count what it wrote."""

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Json:
        """The body of an answer that is not streamed; outputs are one per choice, joined."""

    def opening(self, num_choices: int) -> Iterable[Json]:
        """Events before the first token."""

    def piece(self, output: Output) -> Json:
        """The event for new output of one choice."""

    def closing(self, usage: Usage) -> Json:
        """The event with the token counts."""


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self, head: Head, tokenizer: TokenBytes, logprobs: bool, include_usage: bool, traces: Traces | None = None
    ) -> None:
        self._head, self._tokenizer, self._logprobs, self._traces = head, tokenizer, logprobs, traces
        self._usage_field: Json = {"usage": None} if include_usage else {}

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Json:
        """The whole answer."""
        choices = [
            {
                "index": output.choice,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._logprobs_of(output),
                "finish_reason": output.finish_reason,
                **_extras(output, self._traces),
            }
            for output in outputs
        ]
        return {**_head(self._head, "chat.completion"), "choices": choices, "usage": usage.body()}

    def opening(self, num_choices: int) -> Iterable[Json]:
        """The role, for each choice."""
        for index in range(num_choices):
            yield self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, output: Output) -> Json:
        """New text of one choice."""
        delta = {"content": output.text} if output.text or output.finish_reason is None else {}
        choice = {"index": output.choice, "delta": delta, "finish_reason": output.finish_reason}
        choice |= _extras(output, self._traces)
        if self._logprobs:
            choice["logprobs"] = self._logprobs_of(output)
        return self._chunk(choice)

    def closing(self, usage: Usage) -> Json:
        """The token counts."""
        return {**_head(self._head, "chat.completion.chunk"), "choices": [], "usage": usage.body()}

    def _chunk(self, choice: Json) -> Json:
        return {**_head(self._head, "chat.completion.chunk"), "choices": [choice], **self._usage_field}

    def _logprobs_of(self, output: Output) -> Json | None:
        if not self._logprobs:
            return None
        return {"content": [self._token(entry) for entry in output.logprobs], "refusal": None}

    def _token(self, entry: TokenLogprob) -> Json:
        top = [self._pair(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._pair(entry.token_id, entry.logprob), "top_logprobs": top}

    def _pair(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionShape:
    """text_completion, whole and in pieces."""

    def __init__(
        self, head: Head, tokenizer: TokenBytes, logprobs: bool, include_usage: bool, traces: Traces | None = None
    ) -> None:
        self._head, self._tokenizer, self._logprobs, self._traces = head, tokenizer, logprobs, traces
        self._usage_field: Json = {"usage": None} if include_usage else {}
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Json:
        """The whole answer."""
        choices = [self._choice(output) for output in outputs]
        return {**_head(self._head, "text_completion"), "choices": choices, "usage": usage.body()}

    def opening(self, num_choices: int) -> Iterable[Json]:
        """Nothing: the first event has text."""
        return ()

    def piece(self, output: Output) -> Json:
        """New text of one choice."""
        return {**_head(self._head, "text_completion"), "choices": [self._choice(output)], **self._usage_field}

    def closing(self, usage: Usage) -> Json:
        """The token counts."""
        return {**_head(self._head, "text_completion"), "choices": [], "usage": usage.body()}

    def _choice(self, output: Output) -> Json:
        return {
            "index": output.choice,
            "text": output.text,
            "logprobs": self._logprobs_of(output) if self._logprobs else None,
            "finish_reason": output.finish_reason,
            **_extras(output, self._traces),
        }

    def _logprobs_of(self, output: Output) -> Json:
        tokens, offsets = [], []
        for entry in output.logprobs:
            offsets.append(self._offsets[output.choice])
            tokens.append(self._text(entry.token_id))
            self._offsets[output.choice] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in output.logprobs],
            "top_logprobs": [{self._text(i): _finite(p) for i, p in entry.top} for entry in output.logprobs],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def joined(outputs: Iterable[Output]) -> list[Output]:
    """One output per choice, in order of their first appearance, with everything that came for it."""
    groups: dict[int, list[Output]] = {}
    for output in outputs:
        groups.setdefault(output.choice, []).append(output)
    return [group[0] if len(group) == 1 else _join(group) for group in groups.values()]


def _join(group: Sequence[Output]) -> Output:
    return replace(
        group[-1],
        token_ids=tuple(token for output in group for token in output.token_ids),
        text="".join(output.text for output in group),
        logprobs=tuple(entry for output in group for entry in output.logprobs),
        num_cached_tokens=max(output.num_cached_tokens for output in group),
        trace=tuple(choice for output in group for choice in output.trace),
    )


def error_body(error: LServeError) -> Json:
    """As OpenAI writes errors."""
    code = _CODES.get(type(error))
    return {"error": {"message": error.message, "type": error.error_type, "param": error.param, "code": code}}


def event(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _head(head: Head, kind: str) -> Json:
    return {"id": head.answer_id, "object": kind, "created": head.created, "model": head.model}


def _extras(output: Output, traces: Traces | None) -> Json:
    """What a choice has beside OpenAI's fields."""
    reason: Json = {} if output.stop_reason is None else {"stop_reason": output.stop_reason}
    return reason if traces is None else {**reason, **traces.field(output)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be drawn."""
    return max(logprob, -9999.0)
