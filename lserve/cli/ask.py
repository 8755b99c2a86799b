"""Asks a running server one question over HTTP, as any client would, and measures the answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from lserve.engine.errors import LServeError
from lserve.quality.http_asker import streamed

ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """ttft_s: from sending the request to the first text. tokens_per_s: after the first token; 0 for a single one."""

    text: str
    num_tokens: int
    ttft_s: float
    tokens_per_s: float


def wait_until_ready(url: str, timeout_s: float) -> None:
    """Waits for /health to answer 200. Raises LServeError when it does not in time."""
    deadline = time.monotonic() + timeout_s
    state = "no answer"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/health", timeout=5.0, trust_env=False)
            if response.status_code == 200:
                return
            state = f"status {response.status_code}"
        except httpx.TransportError as error:
            state = type(error).__name__
        time.sleep(0.05)
    raise LServeError(f"{url}/health is not ready after {timeout_s:.0f} s: {state}")


def ask(
    url: str, model: str, question: str, show: Callable[[str], None], max_tokens: int = 96, api_key: str | None = None
) -> Answer:
    """Streams a chat completion; `show` gets each piece of text as it comes. Raises LServeError when it fails."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    text, num_tokens, started, first = "", 0, time.perf_counter(), 0.0
    try:
        with (
            httpx.Client(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise LServeError(
                    f"{url} answered {response.status_code}: {response.read().decode(errors='replace')[:300]}"
                )
            for chunk in streamed(response):
                if "error" in chunk:
                    raise LServeError(f"{url} broke off: {chunk['error'].get('message')}")
                piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if piece and not first:
                    first = time.perf_counter()
                text += piece
                show(piece)
                num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
    except httpx.TransportError as error:
        raise LServeError(f"{url} broke off: {error or type(error).__name__}") from None
    ended = time.perf_counter()
    rate = (num_tokens - 1) / (ended - first) if first and num_tokens > 1 else 0.0
    return Answer(text, num_tokens, (first or ended) - started, rate)
