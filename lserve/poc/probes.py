"""Stopwatches: how long reading and writing take alone and in company, and what one answer read."""

import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx

from lserve.deployments.traces import Json, chat_pages, choice_body
from lserve.engine.config import PAGE_SIZE
from lserve.engine.errors import LServeError
from lserve.engine.request import AttentionOptions, PageChoice, Request, SamplingParams
from lserve.quality.engine_asker import EngineAsker

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: seconds to its first token, and between its tokens. cached_tokens: of the prompt, read before."""

    ttft_s: float
    gaps_s: tuple[float, ...]
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Traced:
    """An answer in pieces, about one a token, and its trace as the API writes it."""

    pieces: tuple[str, ...]
    trace: Json

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)


class Probe(Protocol):
    """Times and traces one setting. message: what the user would send."""

    def time(self, message: str, num_tokens: int, batch: int) -> list[Timing]:
        """Answers of exactly num_tokens to `batch` equal messages at once. Raises LServeError."""

    def trace(self, message: str, num_tokens: int) -> Traced:
        """One answer of at most num_tokens, with what it read. Raises LServeError."""

    def close(self) -> None:
        """Gives back what it holds."""


class EngineProbe:
    """Of an engine in this process."""

    def __init__(self, asker: EngineAsker) -> None:
        self._asker = asker

    def time(self, message: str, num_tokens: int, batch: int) -> list[Timing]:
        """See `Probe`."""
        times: list[list[float]] = [[] for _ in range(batch)]
        cached = [0] * batch

        def take(index: int, output: Any, now: float) -> None:
            times[index].append(now)
            cached[index] = output.num_cached_tokens

        self._run(message, num_tokens, batch, self._asker.attention, True, take)
        return [_timing(one, hit) for one, hit in zip(times, cached, strict=True)]

    def trace(self, message: str, num_tokens: int) -> Traced:
        """See `Probe`."""
        pieces: list[str] = []
        choices: list[PageChoice] = []

        def take(index: int, output: Any, now: float) -> None:
            pieces.append(output.text)
            choices.extend(output.trace)

        self._run(message, num_tokens, 1, replace(self._asker.attention, trace=True), False, take)
        trace: Json = {
            "page_size": PAGE_SIZE,
            "num_heads": choices[0].num_heads if choices else 0,
            "choices": json.loads(json.dumps([choice_body(choice) for choice in choices])),
        }
        if self._asker.engine.tokenizer.has_chat_template:
            trace["pages"] = chat_pages([("user", message)], self._asker.engine.tokenizer)
        return Traced(tuple(pieces), trace)

    def close(self) -> None:
        """Nothing: the engine is the asker's."""

    def _run(
        self,
        message: str,
        num_tokens: int,
        batch: int,
        attention: AttentionOptions,
        ignore_eos: bool,
        take: Callable[[int, Any, float], None],
    ) -> None:
        engine, prompt = self._asker.engine, tuple(self._asker.tokens(message))
        self._asker.select()
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=ignore_eos)
        numbers = {f"probe-{next(_numbers)}": index for index in range(batch)}
        started = time.perf_counter()
        try:
            for request_id in numbers:
                engine.add_request(Request(request_id, prompt, params, attention))
            while engine.has_work:
                result = engine.step()
                now = time.perf_counter() - started
                for _, error in result.errors:
                    raise error
                for output in result.outputs:
                    take(numbers[output.request_id], output, now)
        finally:
            for request_id in numbers:
                engine.abort(request_id)


class HttpProbe:
    """Of a running endpoint. lserve: the `lserve` object to send; None sends none."""

    def __init__(self, url: str, model: str, lserve: Json | None, api_key: str | None = None) -> None:
        self._model, self._lserve = model, lserve
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=600.0, trust_env=False)

    def time(self, message: str, num_tokens: int, batch: int) -> list[Timing]:
        """See `Probe`."""

        def one(_: int) -> Timing:
            times: list[float] = []
            body = {**self._body(message, num_tokens), "ignore_eos": True}
            usage = self._stream(body, lambda chunk, now: times.append(now) if _text(chunk) else None)
            details, tokens = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens") or len(times)
            # one message may carry several tokens, so only their mean is known
            mean = (times[-1] - times[0]) / max(tokens - 1, 1) if times else 0.0
            return Timing(times[0] if times else 0.0, (mean,) * (tokens - 1), details.get("cached_tokens") or 0)

        with ThreadPoolExecutor(batch) as threads:
            return list(threads.map(one, range(batch)))

    def trace(self, message: str, num_tokens: int) -> Traced:
        """See `Probe`."""
        pieces: list[str] = []
        traces: list[Json] = []

        def take(chunk: Json, now: float) -> None:
            pieces.append(_text(chunk))
            traces.extend(c["lserve"]["trace"] for c in chunk["choices"] if "lserve" in c)

        body = self._body(message, num_tokens)
        self._stream({**body, "lserve": {**(self._lserve or {}), "trace": True}}, take)
        if not traces:
            raise LServeError("the endpoint sent no trace")
        return Traced(tuple(pieces), traces[0])

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _body(self, message: str, num_tokens: int) -> Json:
        body: Json = {"model": self._model, "messages": [{"role": "user", "content": message}], "temperature": 0}
        body |= {"max_tokens": num_tokens, "stream": True, "stream_options": {"include_usage": True}}
        return body if self._lserve is None else {**body, "lserve": self._lserve}

    def _stream(self, body: Json, take: Callable[[Json, float], object]) -> Json:
        """Sends a request and hands over its chunks; returns the usage."""
        usage: Json = {}
        started = time.perf_counter()
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    reason = answer.read().decode(errors="replace")[:200]
                    raise LServeError(f"the endpoint answered {answer.status_code}: {reason}")
                for line in answer.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise LServeError(f"the endpoint failed: {chunk['error'].get('message')}")
                    take(chunk, time.perf_counter() - started)
                    usage = chunk.get("usage") or usage
        except (httpx.HTTPError, ValueError) as error:
            raise LServeError(f"the endpoint failed: {error or type(error).__name__}") from None
        return usage


def _text(chunk: Json) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _timing(times: Sequence[float], cached_tokens: int) -> Timing:
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Timing(times[0] if times else 0.0, gaps, cached_tokens)
