"""Traces over HTTP: which pages were read, and where in the client's own text these pages lie."""

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from fake_pool import ByteTokenizer, FakePool
from hypothesis import given
from hypothesis import strategies as st

from lserve.cli.demo_model import demo_model
from lserve.deployments import traces
from lserve.deployments.api import Api
from lserve.deployments.protocol import parse_chat, parse_completion
from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings
from lserve.deployments.traces import Traces, page_spans
from lserve.engine.request import FinishReason, Output
from lserve.engine.tokenizer import Tokenizer

TRACE = {"lserve": {"trace": True}}
READ = {
    "num_pages": 2,
    "everything": False,
    "read": [[1, 6], [0, 4]],
    "num_pages_left_out": 0,
    "mass": {"kept": 0.9877, "num_heads_sampled": 2, "attended": [[1, 0.5]]},
}


async def post(path: str, body: dict[str, Any], pool: FakePool | None = None) -> httpx.Response:
    settings = load_settings({"model": {"path": "/models/demo"}})
    app = Api(RouterCore(settings, ByteTokenizer(), pool or FakePool())).app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, json={"model": "demo", "max_tokens": 10, **body})


def chunks(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


async def test_no_trace_unless_asked_for() -> None:
    reply = (await post("/v1/completions", {"prompt": "x" * 200})).json()
    assert "lserve" not in reply["choices"][0]


async def test_a_completion_says_what_its_tokens_read() -> None:
    reply = (await post("/v1/completions", {"prompt": "x" * 200, **TRACE})).json()
    assert reply["choices"][0]["lserve"]["trace"] == {
        "page_size": 64,
        "num_heads": 6,
        "pages": [[[0, 0, 64]], [[0, 64, 128]], [[0, 128, 192]], [[0, 192, 200]]],
        "choices": [{"token": 4, **READ}, {"token": 8, **READ}],
        "num_choices_left_out": 0,
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_carries_the_trace_in_each_choices_last_chunk(path: str) -> None:
    asked: dict[str, Any] = {"prompt": "y" * 100} if path == "/v1/completions" else {}
    asked = asked or {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "z" * 100}]}
    body = {**asked, **TRACE, "n": 2}
    whole = (await post(path, body)).json()
    streamed = chunks((await post(path, {**body, "stream": True})).text)
    for index in (0, 1):
        mine = [c["choices"][0] for c in streamed if c["choices"] and c["choices"][0]["index"] == index]
        assert [c["finish_reason"] for c in mine if "lserve" in c] == ["length"]
        assert mine[-1]["lserve"] == whole["choices"][index]["lserve"]


async def test_pages_of_a_chat_lie_in_its_messages() -> None:
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "z" * 100}]
    reply = (await post("/v1/chat/completions", {"messages": messages, **TRACE})).json()
    pages = reply["choices"][0]["lserve"]["trace"]["pages"]
    before = len("system: Be kind.\nuser: ")
    assert pages == [[[0, 1, 9], [1, 0, 64 - before]], [[1, 64 - before, 100]]]


async def test_every_prompt_has_its_own_pages_and_token_ids_have_none() -> None:
    body = {"prompt": ["a" * 70, [1, 2, 3]], "n": 2, **TRACE}
    choices = (await post("/v1/completions", body)).json()["choices"]
    traced = [choice["lserve"]["trace"] for choice in choices]
    assert traced[0]["pages"] == traced[1]["pages"] == [[[0, 0, 64]], [[0, 64, 70]]]
    assert "pages" not in traced[2] and "pages" not in traced[3] and traced[3]["choices"]


async def test_a_trace_survives_the_loss_of_a_worker() -> None:
    reply = (await post("/v1/completions", {"prompt": "x" * 200, **TRACE}, FakePool(lose_after=[6]))).json()
    assert [c["token"] for c in reply["choices"][0]["lserve"]["trace"]["choices"]] == [4, 8]


async def test_a_long_trace_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_CHOICES", 3)
    reply = (await post("/v1/completions", {"prompt": "x", "max_tokens": 30, **TRACE})).json()
    trace = reply["choices"][0]["lserve"]["trace"]
    assert len(trace["choices"]) == 3 and trace["num_choices_left_out"] == 4


async def test_a_trace_must_be_true_or_false() -> None:
    reply = await post("/v1/completions", {"prompt": "x", "lserve": {"trace": "yes"}})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "lserve.trace"


async def test_pages_in_the_tokens_of_a_real_model() -> None:
    """The text of each page's spans is the text of its tokens, but for what the template adds."""
    tokenizer = Tokenizer.from_pretrained(str(demo_model()))
    document = "Déjà vu: 自然言語 is read — by tokens… 🙂 " * 40
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": document}]
    generation = parse_chat(json.dumps({"model": "demo", "messages": messages, **TRACE}).encode())
    tokens = tokenizer.encode_chat(generation.messages)
    located = Traces()
    await located.locate(generation, tokenizer)
    field = located.field(Output("r", 0, finish_reason=FinishReason.STOP))
    pages = field["lserve"]["trace"]["pages"]
    assert len(pages) == -(-len(tokens) // 64)
    for index, spans in enumerate(pages[1:-1], start=1):
        ((message, start, end),) = spans
        assert message == 1
        text = tokenizer.decode(tokens[index * 64 : index * 64 + 64]).strip("�")
        assert text in document[start : end + 1]
        assert abs(end - start - len(text)) <= 2  # a character may be cut between two pages
    covered = [(s, e) for spans in pages for m, s, e in spans if m == 1]
    assert covered[0][0] == 0 and covered[-1][1] == len(document)
    assert all(a[1] == b[0] for a, b in pairwise(covered))


async def test_a_plain_prompt_is_covered_whole() -> None:
    tokenizer = Tokenizer.from_pretrained(str(demo_model()))
    prompt = "Some words, and more of them. " * 30
    generation = parse_completion(json.dumps({"model": "demo", "prompt": prompt, **TRACE}).encode())
    located = Traces()
    await located.locate(generation, tokenizer)
    pages = located.field(Output("r", 0, finish_reason=FinishReason.STOP))["lserve"]["trace"]["pages"]
    assert "".join(prompt[start:end] for ((_, start, end),) in pages) == prompt


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.integers(1, 7))
def test_spans_partition_every_message(contents: list[str], width: int) -> None:
    """Whatever the tokens, each message's characters belong to exactly one page."""
    text, parts = "", []
    for index, content in enumerate(contents):
        text += "<glue>"
        parts.append((index, len(text), len(text) + len(content), 0))
        text += content
    pages = page_spans(list(range(0, len(text), width)), len(text), parts)
    for index, content in enumerate(contents):
        assert "".join(content[s:e] for page in pages for i, s, e in page if i == index) == content
