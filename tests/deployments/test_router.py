"""The HTTP API over a pool in process: answers, streams, errors, limits, replay, and clients that leave."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_pool import MAX_MODEL_LEN, ByteTokenizer, FakePool

from lserve.deployments.api import Api
from lserve.deployments.messages import PrefixHint
from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings
from lserve.engine.errors import CapacityError, DeadlineExceededError, PromptTooLongError, WorkerLostError

TEXT = FakePool.text
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "demo", "prompt": "hi", "max_tokens": 100}


def make_core(pool: FakePool, *overrides: str) -> RouterCore:
    settings = load_settings({"model": {"path": "/models/demo"}}, list(overrides))
    return RouterCore(settings, ByteTokenizer(), pool)


def client_of(core: RouterCore) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Api(core).app()), base_url="http://test")


def client(pool: FakePool | None = None, *overrides: str) -> httpx.AsyncClient:
    return client_of(make_core(pool or FakePool(), *overrides))


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; the stream must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def eventually(condition: Callable[[], bool], within_s: float = 1.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_chat_answer() -> None:
    async with client() as http:
        reply = (await http.post("/v1/chat/completions", json=CHAT)).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "demo"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt_tokens = len("user: hi\n")
    assert reply["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(TEXT),
        "total_tokens": prompt_tokens + len(TEXT),
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_streamed_chat_says_the_same_as_a_whole_one() -> None:
    body = {**CHAT, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    async with client() as http:
        response = await http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT[index:]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * len(TEXT) - 1


async def test_a_completion_of_several_prompts_numbers_its_choices() -> None:
    pool = FakePool()
    async with client(pool) as http:
        body = {**COMPLETION, "prompt": ["a", [1, 2, 3]], "n": 2, "max_tokens": 4}
        reply = (await http.post("/v1/completions", json=body)).json()
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [(0, "The "), (1, "he q"), (2, "The "), (3, "he q")]
    assert {c["finish_reason"] for c in reply["choices"]} == {"length"}
    assert reply["usage"]["prompt_tokens"] == 4
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    assert [r.prompt_token_ids for r in pool.requests] == [(97,), (1, 2, 3)]


async def test_logprobs_of_a_chat() -> None:
    async with client() as http:
        body = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
        content = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["T", "h"]
    assert content[0]["bytes"] == [84]
    assert [(top["token"], top["logprob"]) for top in content[0]["top_logprobs"]] == [("T", -0.5), ("U", -1.5)]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_of_a_completion(stream: bool) -> None:
    body = {**COMPLETION, "logprobs": 1, "max_tokens": 3, "stream": stream}
    async with client() as http:
        response = await http.post("/v1/completions", json=body)
    replies = events(response.text) if stream else [response.json()]
    parts = [reply["choices"][0]["logprobs"] for reply in replies]
    assert sum((part["tokens"] for part in parts), []) == ["T", "h", "e"]
    assert sum((part["text_offset"] for part in parts), []) == [0, 1, 2]
    assert parts[0]["top_logprobs"][0] == {"T": -0.5}


async def test_what_a_request_asks_for_reaches_the_worker() -> None:
    pool = FakePool()
    body = {
        **CHAT,
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": -1,
        "stop": "x",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "logit_bias": {"7": -100},
        "lserve": {"token_budget": 2048, "dense": True},
        "user": "someone",
        "tools": [],
    }
    async with client(pool) as http:
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    request = pool.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.0, 0.5, 0)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1.0, -1.0)
    assert (sampling.repetition_penalty, sampling.seed, sampling.stop) == (1.5, (1 << 63) - 1, ("x",))
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logit_bias) == ((5,), True, ((7, -100.0),))
    assert (request.attention.token_budget, request.attention.dense) == (2048, True)


async def test_the_router_fixes_a_seed_and_leaves_room_when_none_is_given() -> None:
    pool = FakePool()
    async with client(pool) as http:
        for _ in range(2):
            await http.post("/v1/chat/completions", json={**CHAT, "n": 2})
    first, second = (request.sampling for request in pool.requests)
    assert first.seed != second.seed
    assert first.max_tokens == (MAX_MODEL_LEN - len("user: hi\n")) // 2


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "other"}, 404, "model"),
        ("/v1/chat/completions", {**CHAT, "temperature": 9}, 400, "temperature"),
        ("/v1/chat/completions", {**CHAT, "n": 17}, 400, "n"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT, "logit_bias": {"999": 1}}, 400, "logit_bias"),
        ("/v1/completions", {**COMPLETION, "prompt": [256]}, 400, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ""}, 400, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": ["a"] * 65}, 400, "prompt"),
        ("/v1/completions", {**COMPLETION, "prompt": "a" * MAX_MODEL_LEN}, 413, "prompt"),
        ("/v1/completions", {**COMPLETION, "max_tokens": MAX_MODEL_LEN}, 413, "max_tokens"),
        ("/detokenize", {"tokens": [256]}, 400, "tokens"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
    ],
)
async def test_a_wrong_request_is_answered_with_its_status_and_names_the_field(
    path: str, body: dict[str, Any], status: int, param: str
) -> None:
    pool = FakePool()
    async with client(pool) as http:
        response = await http.post(path, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert not pool.requests


async def test_paths_and_methods_that_do_not_exist() -> None:
    async with client() as http:
        missing, wrong = await http.get("/v1/nothing"), await http.get("/v1/completions")
    assert missing.status_code == 404
    assert wrong.status_code == 405
    assert "error" in missing.json()
    assert "error" in wrong.json()


async def test_a_body_over_the_limit_is_413_with_and_without_a_declared_length() -> None:
    async def parts() -> Any:
        for _ in range(20):
            yield b" " * 1000

    async with client(None, "router.max_body_bytes=10000") as http:
        declared = await http.post("/v1/completions", content=b" " * 20_000)
        chunked = await http.post("/v1/completions", content=parts())
    assert declared.status_code == chunked.status_code == 413


async def test_models_tokenize_detokenize_and_health() -> None:
    pool = FakePool(is_ready=False)
    async with client(pool) as http:
        assert [m["id"] for m in (await http.get("/v1/models")).json()["data"]] == ["demo"]
        assert (await http.get("/v1/models/demo")).json()["max_model_len"] == MAX_MODEL_LEN
        assert (await http.get("/v1/models/other")).status_code == 404
        assert (await http.post("/tokenize", json={"prompt": "hé"})).json()["tokens"] == [104, 195, 169]
        chat = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        assert chat["count"] == len("user: hi\n")
        assert (await http.post("/detokenize", json={"tokens": [104, 195, 169]})).json() == {"prompt": "hé"}
        assert (await http.get("/health")).status_code == 503
        pool.is_ready = True
        assert (await http.get("/health")).status_code == 200


async def test_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSERVE_API_KEYS", "first, second")
    third = hashlib.sha256(b"third").hexdigest()
    pool = FakePool()
    async with client(pool, f"router.api_key_sha256=['{third}']") as http:
        for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic first"}):
            response = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("first", "second", "third"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        assert (await http.get("/health")).status_code == 200
    assert len({request.tenant for request in pool.requests}) == 3


async def test_a_request_id_is_kept_or_made() -> None:
    async with client() as http:
        kept = await http.get("/health", headers={"X-Request-ID": "abc-1"})
        made = await http.get("/health", headers={"X-Request-ID": "not a sane one"})
    assert kept.headers["x-request-id"] == "abc-1"
    assert len(made.headers["x-request-id"]) == 32


async def test_a_full_router_answers_429_and_a_free_place_goes_to_who_waits() -> None:
    pool = FakePool(held=asyncio.Event())
    core = make_core(pool, "router.max_running_requests=1", "router.max_queued_requests=1", "router.retry_after_s=7")
    async with client_of(core) as http:
        first = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: pool.running == 1)
        second = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
        await eventually(lambda: core.admission.waiting == 1)
        refused = await http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "7"
        assert pool.held is not None
        pool.held.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]
    assert core.admission.running == 0
    assert core.metrics.requests.sum == {("ok",): 2, ("rejected",): 1}


async def test_a_request_that_waits_too_long_is_504_and_gives_its_place_up() -> None:
    pool = FakePool(held=asyncio.Event())
    core = make_core(pool, "router.max_running_requests=1", "router.request_timeout_s=0.1")
    async with client_of(core) as http:
        replies = await asyncio.gather(*(http.post("/v1/chat/completions", json=CHAT) for _ in range(3)))
    assert [reply.status_code for reply in replies] == [504, 504, 504]
    assert core.admission.running == core.admission.waiting == pool.running == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PromptTooLongError("too long"), 413),
        (CapacityError("full"), 429),
        (DeadlineExceededError("late"), 504),
        (WorkerLostError("gone"), 503),
        (RuntimeError("a secret of ours"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(error: Exception, status: int, stream: bool) -> None:
    async with client(FakePool(error=error)) as http:
        response = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert ("secret" in response.text) is False
    assert ("retry-after" in response.headers) is (status == 429)


async def test_an_error_in_mid_stream_is_an_event_and_no_done() -> None:
    async with client(FakePool(error=DeadlineExceededError("late"), error_after=3)) as http:
        response = await http.post("/v1/completions", json={**COMPLETION, "stream": True})
    assert response.status_code == 200
    *chunks, error = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The"
    assert error["error"]["message"] == "late"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_worker_is_replaced_and_the_client_sees_one_answer(stream: bool) -> None:
    pool = FakePool(lose_after=[5, 0, 7])
    async with client(pool) as http:
        response = await http.post("/v1/completions", json={**COMPLETION, "stream": stream, "seed": 3})
    replies = events(response.text) if stream else [response.json()]
    assert "".join(reply["choices"][0]["text"] for reply in replies) == TEXT
    assert [bytes(request.emitted).decode() for request in pool.requests] == ["", TEXT[:5], TEXT[:5], TEXT[:12]]
    assert len({request.request_id for request in pool.requests}) == 4
    assert {request.sampling for request in pool.requests} == {pool.requests[0].sampling}


async def test_every_open_choice_is_replayed_alone() -> None:
    pool = FakePool(text="abcdef", lose_after=[5])
    async with client(pool) as http:
        reply = (await http.post("/v1/completions", json={**COMPLETION, "n": 3})).json()
    assert [choice["text"] for choice in reply["choices"]] == ["abcdef", "bcdef", "cdef"]
    assert reply["usage"]["completion_tokens"] == 15
    replayed = [(r.choice, r.sampling.n, bytes(r.emitted).decode()) for r in pool.requests[1:]]
    assert replayed == [(0, 1, "abcde")]


async def test_retries_are_used_up() -> None:
    pool = FakePool(lose_after=[0] * 9)
    async with client(pool, "router.retries=2") as http:
        response = await http.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 503
    assert len(pool.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_first", [0, 2])
async def test_a_client_that_leaves_ends_the_work_within_a_second(stream: bool, tokens_first: int) -> None:
    pool = FakePool(interval_s=0.05, held=None if tokens_first else asyncio.Event())
    core = make_core(pool)
    body = json.dumps({**CHAT, "stream": stream}).encode()
    leave = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    serving = asyncio.create_task(Api(core).app()(scope, receive, send))
    await eventually(lambda: pool.running == 1)
    await asyncio.sleep(0.05 * tokens_first)
    leave.set()
    async with asyncio.timeout(1.0):
        await serving
    assert pool.running == 0
    assert pool.aborted == 1
    assert core.admission.running == 0
    assert core.metrics.requests.sum == {("cancelled",): 1}


async def test_a_prefix_hint_reaches_the_pool() -> None:
    hints = []

    class Pool(FakePool):
        def generate(self, request: Any, hint: PrefixHint) -> Any:
            hints.append(hint)
            return super().generate(request, hint)

    async def find(tenant: str, tokens: Any) -> PrefixHint:
        return PrefixHint(len(tokens), (tenant,))

    settings = load_settings({"model": {"path": "/models/demo"}})
    async with client_of(RouterCore(settings, ByteTokenizer(), Pool(), find_prefix=find)) as http:
        await http.post("/v1/chat/completions", json=CHAT)
    assert hints == [PrefixHint(len("user: hi\n"), ("",))]


async def test_latencies_are_recorded() -> None:
    core = make_core(FakePool(text="abc"))
    async with client_of(core) as http:
        await http.post("/v1/completions", json={**COMPLETION, "stream": True})
    metrics: Any = core.metrics
    assert metrics.time_to_first_token.count[()] == 1
    assert metrics.time_per_output_token.count[()] == 1
    assert metrics.e2e_request_latency.count[()] == 1
    assert metrics.running_requests.last[()] == 0
