"""The official client, unmodified, against the router over real HTTP."""

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import openai
import pytest
from fake_pool import ByteTokenizer, FakePool
from served_router import served_router

from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings
from lserve.engine.errors import WorkerLostError

TEXT = FakePool.text
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@dataclass
class Served:
    """A router that listens."""

    url: str
    pool: FakePool
    core: RouterCore


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("LSERVE_API_KEYS", "key")
    pool = FakePool()
    overrides = ["router.max_running_requests=1", "router.max_queued_requests=0"]
    core = RouterCore(load_settings({"model": {"path": "/models/demo"}}, overrides), ByteTokenizer(), pool)
    with served_router(core) as url:
        yield Served(f"{url}/v1", pool, core)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="key", max_retries=0) as client:
        yield client


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=1, extra_body={"lserve": {"dense": True}}
    )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    # the answer goes back as it came, for the next turn
    again = [*MESSAGES, answer.choices[0].message, *MESSAGES]
    stream = client.chat.completions.create(
        model="demo", messages=again, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT)


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["a", "b"], max_tokens=3, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["The", "The"]
    stream = client.completions.create(model="demo", prompt="a", max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_models_and_errors(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=5)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    served.pool.error, served.pool.error_after = WorkerLostError("gone"), 2
    with pytest.raises(openai.APIError, match="gone"):
        list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True))


async def test_the_async_client(async_client: openai.AsyncOpenAI) -> None:
    answer = await async_client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    stream = await async_client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


def test_leaving_a_stream_frees_the_place_within_a_second(client: openai.OpenAI, served: Served) -> None:
    served.pool.interval_s = 0.05
    stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="demo", messages=MESSAGES)
    stream.close()
    deadline = time.monotonic() + 1.0
    while served.pool.running or served.core.admission.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert served.pool.aborted == 1
