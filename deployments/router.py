"""The router: from a checked HTTP request to one unbroken stream of tokens.

`RouterCore` needs no Ray: a tokenizer and a `WorkerPool` are enough, which is how its tests run it.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, cast

from lserve.engine.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineExceededError,
    InvalidRequestError,
    LServeError,
    ModelNotFoundError,
    PromptTooLongError,
)
from lserve.engine.request import Output, Request
from lserve.engine.sampling_limits import validate

from . import tracing
from .admission import Admission
from .messages import PrefixHint
from .metrics import Metrics
from .pool import WorkerPool
from .protocol import Generation, Prompt
from .replay import Budget, merged, unbroken
from .responses import Usage
from .settings import Settings, secret
from .tracing import Span

logger = logging.getLogger(__name__)

SHORT_TEXT = 4096
"""Characters that are tokenized on the event loop; longer texts go to a thread, which costs about 0.1 ms."""

FindPrefix = Callable[[str, Sequence[int]], Awaitable[PrefixHint]]
"""(tenant, prompt token ids) -> the longest prefix that is cached somewhere. Bounded in time, never raises."""


class Tokenizer(Protocol):
    """What the router needs of the model's tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, text) messages in the chat template, ready for the answer. Raises InvalidRequestError."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text."""

    def chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text that `encode_chat` encodes."""

    def token_starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """For each of `encode`'s tokens, the index of its first character in the text."""


class RouterCore:
    """Authenticates, tokenizes, admits, and answers from the pool, replaying where a worker was lost."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        pool: WorkerPool,
        metrics: Metrics | None = None,
        find_prefix: FindPrefix | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.pool = settings, tokenizer, pool
        self.metrics = metrics or Metrics()
        self._find_prefix = find_prefix
        limits = settings.router
        self.admission = Admission(
            limits.max_running_requests, limits.max_queued_requests, limits.retry_after_s, self.metrics
        )
        given = [key.strip() for key in (secret(limits.api_keys_env) or "").split(",")]
        hashes = {hashlib.sha256(key.encode()).hexdigest() for key in given if key}
        self._key_hashes = tuple(hashes | set(limits.api_key_sha256))

    def authenticate(self, authorization: str | None) -> str:
        """The caller's tenant, from an `Authorization` header. Raises AuthenticationError."""
        if not self._key_hashes:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        offered = hashlib.sha256(key.strip().encode(errors="surrogateescape")).hexdigest()
        # Every hash is compared, in constant time each, so that timing tells nothing about any key.
        matches = [hmac.compare_digest(offered, known) for known in self._key_hashes]
        if scheme.lower() != "bearer" or not any(matches):
            raise AuthenticationError("missing or wrong API key: send it as `Authorization: Bearer KEY`")
        return offered

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless this model is served here. None means whichever is."""
        if name is not None and name != self.settings.served_name:
            raise ModelNotFoundError(
                f"model {name!r} is not served here, {self.settings.served_name!r} is", param="model"
            )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long ones are encoded on a thread."""
        if len(text) <= SHORT_TEXT:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat in the model's template; long ones are encoded on a thread."""
        if sum(len(text) for _, text in messages) <= SHORT_TEXT:
            return self.tokenizer.encode_chat(messages)
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Raises InvalidRequestError for one outside the vocabulary."""
        self._check_vocabulary("tokens", token_ids)
        return self.tokenizer.decode(token_ids)

    async def start(self, generation: Generation, tenant: str, name: str = "", traceparent: str = "") -> "Answer":
        """Admits a request and prepares its answer; iterate `Answer.stream` to its end, or close it.

        name: goes before the request's id in logs; traceparent: the caller's span.
        Raises InvalidRequestError, PromptTooLongError, ModelNotFoundError, CapacityError, DeadlineExceededError or
        WorkerLostError; all but CapacityError and DeadlineExceededError before the request waits for anything.
        """
        arrived, span = time.monotonic(), tracing.start("request", traceparent, request_id=name)
        try:
            with tracing.stage("queue", span.traceparent):
                prompts, limit = await self._check(generation)
                await self.admission.enter(self.settings.router.request_timeout_s)
        except BaseException as error:
            span.end(error)
            if isinstance(error, LServeError):
                self.metrics.requests.record(1, outcome=outcome_of(error))
            raise
        self.metrics.queue.record(time.monotonic() - arrived)
        try:
            request_id = f"{name}-{secrets.token_hex(4)}" if name else secrets.token_hex(16)
            requests = [
                self._request(generation, tenant, tokens, limit, f"{request_id}.p{number}" if number else request_id)
                for number, tokens in enumerate(prompts)
            ]
            requests = [replace(request, traceparent=span.traceparent) for request in requests]
            with tracing.stage("prefix_lookup", span.traceparent):
                hints = [await self._hint(request) for request in requests]
        except BaseException as error:
            span.end(error)
            self.admission.leave()
            raise
        return Answer(self, requests, hints, arrived, span)

    async def _check(self, generation: Generation) -> tuple[list[tuple[int, ...]], int]:
        """The prompts' token ids and the model's length limit."""
        router = self.settings.router
        self.check_model(generation.model)
        if generation.sampling.n > router.max_choices:
            raise InvalidRequestError(f"n must be at most {router.max_choices}, got {generation.sampling.n}", param="n")
        if generation.prompts is not None and len(generation.prompts) > router.max_prompts:
            message = f"prompt must hold at most {router.max_prompts} prompts, got {len(generation.prompts)}"
            raise InvalidRequestError(message, param="prompt")
        validate(generation.sampling, self.tokenizer.vocab_size)
        limit = (await self.pool.info()).max_model_len
        if generation.prompts is None:
            prompts = [tuple(await self.encode_chat(generation.messages))]
        else:
            prompts = [await self._tokens(prompt) for prompt in generation.prompts]
        name = "messages" if generation.prompts is None else "prompt"
        for tokens in prompts:
            self._check_length(name, tokens, generation.max_tokens, limit)
        return prompts, limit

    async def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(await self.encode(prompt))
        self._check_vocabulary("prompt", prompt)
        return prompt

    def _check_vocabulary(self, name: str, token_ids: Sequence[int]) -> None:
        top, size = max(token_ids, default=0), self.tokenizer.vocab_size
        if top >= size:
            raise InvalidRequestError(f"{name}: token id {top} is outside the vocabulary of {size}", param=name)

    def _check_length(self, name: str, tokens: Sequence[int], max_tokens: int | None, limit: int) -> None:
        if not tokens:
            raise InvalidRequestError(f"{name} has no tokens", param=name)
        if len(tokens) >= limit:
            message = f"{name} has {len(tokens)} tokens; with room for an answer at most {limit - 1} fit"
            raise PromptTooLongError(message, param=name)
        if max_tokens is not None and len(tokens) + max_tokens > limit:
            message = f"{name} has {len(tokens)} tokens and max_tokens is {max_tokens}; together at most {limit} fit"
            raise PromptTooLongError(message, param="max_tokens")

    def _request(
        self, generation: Generation, tenant: str, tokens: tuple[int, ...], limit: int, request_id: str
    ) -> Request:
        sampling = generation.sampling
        # Without a limit of its own the answer may fill the context, which the choices share.
        room = max(1, (limit - len(tokens)) // sampling.n)
        return Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            sampling=replace(
                sampling,
                seed=secrets.randbits(63) if generation.seed is None else generation.seed,
                max_tokens=room if generation.max_tokens is None else generation.max_tokens,
            ),
            attention=generation.attention,
            tenant=tenant,
            deadline=time.time() + self.settings.router.request_timeout_s,
        )

    async def _hint(self, request: Request) -> PrefixHint:
        if self._find_prefix is None:
            return PrefixHint()
        return await self._find_prefix(request.tenant, request.prompt_token_ids)


@dataclass(slots=True)
class _Pace:
    """When a choice's tokens came, in seconds of the monotonic clock."""

    first: float
    last: float
    num_tokens: int = 0


@dataclass(slots=True)
class Answer:
    """A request that was admitted: its stream, and what is counted on the way.

    Choices are numbered through: those of the second prompt follow those of the first.
    """

    core: RouterCore
    requests: Sequence[Request]
    hints: Sequence[PrefixHint]
    arrived: float
    span: Span
    _completion_tokens: int = 0
    _cached_tokens: dict[int, int] = field(default_factory=dict)
    _paces: dict[int, _Pace] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return sum(request.sampling.n for request in self.requests)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        prompt_tokens = sum(len(request.prompt_token_ids) for request in self.requests)
        return Usage(prompt_tokens, self._completion_tokens, sum(self._cached_tokens.values()))

    async def stream(self) -> AsyncGenerator[list[Output], None]:
        """New outputs as they come, to the end of every choice. Closing it aborts the request at the workers.

        Raises DeadlineExceededError, WorkerLostError, or what the worker raised.
        """
        outcome, failure = "cancelled", cast("LServeError | None", None)
        router = self.core.settings.router
        budget = Budget(router.retries)
        n = self.requests[0].sampling.n
        streams = [
            _renumbered(unbroken(self.core.pool, request, hint, budget), index * n)
            for index, (request, hint) in enumerate(zip(self.requests, self.hints, strict=True))
        ]
        left = self.arrived + router.request_timeout_s - time.monotonic()
        try:
            async with aclosing(merged(streams, left)) as batches:
                async for outputs in batches:
                    self._count(outputs)
                    yield outputs
            outcome = "ok"
            self.core.metrics.e2e_request_latency.record(time.monotonic() - self.arrived)
        except TimeoutError:
            outcome = "timeout"
            failure = DeadlineExceededError(f"the request took longer than {router.request_timeout_s:g} s")
            raise failure from None
        except LServeError as error:
            outcome, failure = outcome_of(error), error
            raise
        finally:
            self.core.admission.leave()
            self._report(outcome, budget.spent, failure)

    def _report(self, outcome: str, replays: int, failure: LServeError | None) -> None:
        """Counts the request, ends its span, and writes one line about it."""
        usage, metrics, seconds = self.usage, self.core.metrics, time.monotonic() - self.arrived
        metrics.requests.record(1, outcome=outcome)
        metrics.tokens.record(usage.prompt_tokens, kind="prompt")
        metrics.tokens.record(usage.completion_tokens, kind="completion")
        if replays:
            metrics.replays.record(replays)
        self.span.end(failure, outcome=outcome, **asdict(usage))
        logger.info(
            "request %s: %s, %d prompt tokens (%d cached), %d completion tokens, %.3f s%s",
            self.requests[0].request_id,
            outcome,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            seconds,
            f": {failure}" if failure is not None else "",
        )

    def _count(self, outputs: Sequence[Output]) -> None:
        now, metrics = time.monotonic(), self.core.metrics
        n = self.requests[0].sampling.n
        for output in outputs:
            prompt = output.choice // n
            self._cached_tokens[prompt] = max(self._cached_tokens.get(prompt, 0), output.num_cached_tokens)
            count = len(output.token_ids)
            self._completion_tokens += count
            pace = self._paces.get(output.choice)
            if pace is None and count:
                if not self._paces:
                    metrics.time_to_first_token.record(now - self.arrived)
                pace = self._paces[output.choice] = _Pace(now, now, count)
            elif pace is not None and count:
                metrics.inter_token_latency.record((now - pace.last) / count)
                pace.last, pace.num_tokens = now, pace.num_tokens + count
            if output.finish_reason is not None and pace is not None and pace.num_tokens > 1:
                metrics.time_per_output_token.record((pace.last - pace.first) / (pace.num_tokens - 1))


def outcome_of(error: LServeError) -> str:
    """The `outcome` label of a request that failed."""
    if isinstance(error, CapacityError):
        return "rejected"
    if isinstance(error, DeadlineExceededError):
        return "timeout"
    return "invalid" if error.status_code < 500 else "error"


async def _renumbered(stream: AsyncGenerator[list[Output], None], offset: int) -> AsyncGenerator[list[Output], None]:
    """The stream with its choices counted from offset."""
    async with aclosing(stream):
        async for outputs in stream:
            yield outputs if not offset else [replace(o, choice=o.choice + offset) for o in outputs]
