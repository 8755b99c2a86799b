"""A WorkerPool in process that keeps the contract of real decode workers: streams, replays, aborts, fails."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from lserve.deployments.messages import PrefixHint, WorkerInfo
from lserve.deployments.pool import WorkerGoneError
from lserve.engine.request import FinishReason, Output, PageChoice, Request, TokenLogprob

MAX_MODEL_LEN = 4096


@dataclass
class FakePool:
    """Writes `text` (one token per byte), choice k starting k letters in, and stops at its end or at max_tokens.

    interval_s: time of a step. lose_after: for each call in turn, the steps after which its worker is lost (None:
    never). error: raised by every call instead of answering. held: calls wait here until it is set.
    """

    text: str = "The quick brown fox jumps over the lazy dog."
    interval_s: float = 0.0
    lose_after: Sequence[int | None] = ()
    error: Exception | None = None
    error_after: int = 0
    is_ready: bool = True
    held: asyncio.Event | None = None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    aborted: int = 0

    async def generate(self, request: Request, hint: PrefixHint) -> AsyncGenerator[list[Output], None]:
        """Outputs of every choice, step by step."""
        call = len(self.requests)
        self.requests.append(request)
        lose_after = self.lose_after[call] if call < len(self.lose_after) else None
        self.running += 1
        finished = False
        try:
            if self.held is not None:
                await self.held.wait()
            done: set[int] = set()
            choices = range(request.choice, request.choice + request.sampling.n)
            step = 0
            while len(done) < len(choices):
                if lose_after is not None and step == lose_after:
                    raise WorkerGoneError("the decode worker was lost")
                if self.error is not None and step == self.error_after:
                    raise self.error
                await asyncio.sleep(self.interval_s)
                outputs = [self.output(request, k, len(request.emitted) + step) for k in choices if k not in done]
                done |= {output.choice for output in outputs if output.finish_reason is not None}
                yield outputs
                step += 1
            finished = True
        finally:
            self.running -= 1
            self.aborted += not finished

    def output(self, request: Request, choice: int, position: int) -> Output:
        """One token of a choice: the byte at this position of its text."""
        data = self.text.encode()[choice:]
        token = data[position]
        last_byte, last_token = position == len(data) - 1, position == request.sampling.max_tokens - 1
        output = Output(request.request_id, choice, (token,), chr(token), num_cached_tokens=3)
        if request.sampling.logprobs is not None:
            top = tuple((token + i, -0.5 - i) for i in range(request.sampling.logprobs))
            output = replace(output, logprobs=(TokenLogprob(token, -0.5, top),))
        if request.attention.trace and position and position % 4 == 0:
            output = replace(output, trace=(page_choice(position),))
        if last_byte:
            return replace(output, finish_reason=FinishReason.STOP)
        return replace(output, finish_reason=FinishReason.LENGTH if last_token else None)

    async def info(self) -> WorkerInfo:
        """One model."""
        return WorkerInfo("fake", "format", MAX_MODEL_LEN)

    async def ready(self) -> bool:
        """As set."""
        return self.is_ready


def page_choice(token: int) -> PageChoice:
    """What a traced answer's token is said to have read."""
    return PageChoice(token, 2, 6, read=((1, 6), (0, 4)), mass_kept=0.98765, num_sampled=2, attended=((1, 0.5),))


class ByteTokenizer:
    """One token per UTF-8 byte."""

    vocab_size = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Of `chat_text`."""
        return self.encode(self.chat_text(messages))

    def chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        """Roles and texts, a line each; texts are stripped, as many templates do."""
        return "".join(f"{role}: {text.strip()}\n" for role, text in messages)

    def token_starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The character of each byte."""
        return [index for index, character in enumerate(text) for _ in character.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the bytes."""
        return bytes(token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte."""
        return bytes([token_id])
