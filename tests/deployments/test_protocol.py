"""Request bodies: what is understood, what is ignored, what is refused and how it is named."""

import json
from typing import Any

import pytest

from lserve.deployments.protocol import ChatBody, parse_chat, parse_completion
from lserve.engine.errors import InvalidRequestError

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": USER, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hi", **fields}).encode()


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_chat(body) if b"messages" in body else parse_completion(body)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value


def test_messages_are_strings_or_text_parts() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        # as the client's own objects come back, with null fields for what was not used
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None, "annotations": []},
    ]
    assert parse_chat(chat(messages=messages)).messages == (("system", "be brief"), ("user", "ab"), ("assistant", "c"))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_many(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parse_completion(completion(prompt=prompt)).prompts == prompts


@pytest.mark.parametrize("prompt", [[], None, 1, [1, "a"], [True], [-1], [[1, 2.5]], {"a": 1}, [1 << 40]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refused(completion(prompt=prompt)).param == "prompt"


def test_limits_and_counts() -> None:
    assert parse_chat(chat()).max_tokens is None
    assert parse_chat(chat(max_tokens=5)).max_tokens == 5
    assert parse_chat(chat(max_tokens=5, max_completion_tokens=6)).max_tokens == 6
    assert parse_completion(completion()).max_tokens == 16
    assert parse_chat(chat(logprobs=True)).sampling.logprobs == 0
    assert parse_chat(chat(logprobs=True, top_logprobs=4)).sampling.logprobs == 4
    assert parse_chat(chat(logprobs=False)).sampling.logprobs is None
    assert parse_completion(completion(logprobs=3)).sampling.logprobs == 3
    assert parse_completion(completion(best_of=2, n=2)).num_choices == 2


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys({*ChatBody.model_fields, "tools", "response_format", "user"} - {"model", "messages"})
    assert parse_chat(chat(**nulls)) == parse_chat(chat())


def test_what_changes_nothing_is_ignored() -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
    }
    assert parse_chat(chat(**neutral)) == parse_chat(chat())
    assert parse_completion(completion(suffix="", echo=False)) == parse_completion(completion())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"best_of": 2}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"max_token": 5}, "max_token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stream": "yes"}, "stream"),
        ({"lserve": {"token_budget": 0}}, "lserve.token_budget"),
        ({"lserve": {"budget": 1}}, "lserve.budget"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(chat(**fields)).param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"model": "\xff", "messages": []}',
        b'{"model": "m", "messages": [], "temperature": NaN}',
        b'{"model": "m", "messages": [], "temperature": 1e999}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": ' + b"[" * 100_000,
        b'{"model": "m", "messages": [], "n": 1' + b"0" * 100_000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "' + b"k" * 100_000 + b'": 1}',
    ],
)
def test_what_is_no_json_object_of_finite_numbers_and_whole_characters_is_refused(body: bytes) -> None:
    refused(body)
