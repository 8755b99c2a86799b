"""Asks a running OpenAI-compatible endpoint."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from lserve.engine.errors import LServeError

from .asker import Reply
from .cases import Case, Document

CHARACTERS_PER_TOKEN = 3.5
"""Of English, roughly: for endpoints that cannot be asked to tokenize."""


def streamed(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The server-sent events of a streamed completion, to its end. Raises httpx.HTTPError, or ValueError on no JSON."""
    for line in answer.iter_lines():
        event = line.removeprefix("data: ")
        if event != line and event != "[DONE]":
            yield json.loads(event)


class HttpAsker:
    """Asks one endpoint. A reply that fails has an error; an endpoint that cannot be reached raises LServeError.

    url: with or without /v1. lserve: the `lserve` object to send beside OpenAI's fields; None sends none. model: None
    takes the first that the endpoint lists. concurrency: questions at once.
    """

    def __init__(
        self,
        name: str,
        url: str,
        lserve: dict[str, Any] | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
    ) -> None:
        self.name, self.url = name, url.rstrip("/").removesuffix("/v1")
        self._lserve = lserve
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)
        self._threads = ThreadPoolExecutor(concurrency)
        models = self._get_models()
        self.model = model or models[0]["id"]
        self.is_lserve = models[0].get("owned_by") == "lserve"
        """Whether the endpoint says that it is LServe, so that it understands the `lserve` object."""

    def count(self, text: str) -> int:
        """The text's length in tokens; a guess where the endpoint cannot tokenize."""
        ids = self._tokens(text)
        return int(len(text) / CHARACTERS_PER_TOKEN) if ids is None else len(ids)

    def cut(self, text: str, num_tokens: int) -> str:
        """The text's first so many tokens, as text."""
        ids = self._tokens(text)
        if ids is None:
            return text[: int(num_tokens * CHARACTERS_PER_TOKEN)]
        answer = self._client.post("/detokenize", json={"model": self.model, "tokens": ids[:num_tokens]})
        answer.raise_for_status()
        return str(answer.json()["prompt"])

    def overhang(self, text: str) -> int:
        """Unknown: 0."""
        return 0

    def prime(self, document: Document) -> Reply:
        """Reads the document alone, so that its questions find it in the prefix cache."""
        return self._ask(document.text, 1)

    def ask(self, document: Document, cases: Sequence[Case]) -> list[Reply]:
        """Asks the questions, `concurrency` at once."""
        messages = [document.prompt(case.question) for case in cases]
        return list(self._threads.map(self._ask, messages, [case.max_tokens for case in cases]))

    def close(self) -> None:
        """Closes the connections."""
        self._threads.shutdown()
        self._client.close()

    def _get_models(self) -> list[dict[str, Any]]:
        try:
            answer = self._client.get("/v1/models", timeout=10.0)
            models = answer.json()["data"] if answer.status_code == 200 else None
        except httpx.HTTPError as error:
            raise LServeError(f"no answer from {self.url}: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise LServeError(f"{self.url}/v1/models does not answer as an OpenAI-compatible endpoint") from None
        if not models:
            raise LServeError(f"{self.url}/v1/models answered {answer.status_code} and lists no model")
        return list(models)

    def _tokens(self, text: str) -> list[int] | None:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            answer = self._client.post("/tokenize", json=body)
            return list(answer.json()["tokens"]) if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    def _ask(self, message: str, max_tokens: int) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._lserve is not None:
            body["lserve"] = self._lserve
        text, times, started = "", [], time.perf_counter()
        usage: dict[str, Any] = {}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    return Reply("", error=_reason(answer))
                for chunk in streamed(answer):
                    if "error" in chunk:
                        return Reply(text, error=str(chunk["error"].get("message")))
                    piece = "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
                    if piece:
                        times.append(time.perf_counter() - started)
                        text += piece
                    usage = chunk.get("usage") or usage
        except httpx.ConnectError as error:
            raise LServeError(f"no answer from {self.url}: {error}") from None
        except (httpx.HTTPError, ValueError) as error:
            return Reply(text, error=str(error) or type(error).__name__)
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or 0
        return Reply(
            text, usage.get("prompt_tokens", 0), cached, tuple(times), usage.get("completion_tokens", len(times))
        )


def _reason(answer: httpx.Response) -> str:
    body = answer.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}: {body[:200]}"
