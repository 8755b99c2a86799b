"""Whatever bytes arrive, the answer is a 2xx or a 4xx in OpenAI's shape. LSERVE_FUZZ_EXAMPLES=10000 for a long run."""

import asyncio
import json
import os
from typing import Any

import httpx
from fake_pool import ByteTokenizer, FakePool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lserve.deployments.api import Api
from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings

EXAMPLES = int(os.environ.get("LSERVE_FUZZ_EXAMPLES", "300"))
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
VALID: list[dict[str, Any]] = [
    {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "seed": 7,
        "lserve": {"token_budget": 2048, "dense": False},
    },
    {"model": "demo", "prompt": [[1, 2], "text"], "max_tokens": 3, "n": 2, "logprobs": 1, "stop_token_ids": [3]},
    {"prompt": "text", "add_special_tokens": True},
    {"tokens": [1, 2, 3]},
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "demo", "user", "\x00", "\U0010ffff", "NaN", "text"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid body with a value replaced, a field removed or added, at any depth; then perhaps a few bytes changed."""
    body = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 3))):
        here = body
        while isinstance(here, dict | list) and here:
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            if not (isinstance(here[key], dict | list) and here[key] and draw(st.booleans())):
                action = draw(st.sampled_from(["replace", "remove", "add"]))
                if action == "remove":
                    del here[key]
                elif action == "add" and isinstance(here, dict):
                    here[draw(st.sampled_from(["tools", "echo", "suffix", "best_of", "x"]))] = draw(values)
                else:
                    here[key] = draw(values)
                break
            here = here[key]
    data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(st.binary(max_size=6)) + data[start + draw(st.integers(0, 6)) :]
    return data


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(PATHS), body=mutated() | st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode())
)
def test_no_body_makes_the_server_fail(path: str, body: bytes) -> None:
    async def post() -> None:
        core = RouterCore(load_settings({"model": {"path": "/models/demo"}}), ByteTokenizer(), FakePool())
        transport = httpx.ASGITransport(Api(core).app(), raise_app_exceptions=True)
        async with asyncio.timeout(5), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post(path, content=body)
        assert response.status_code < 500, (body, response.text)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"]
            assert "\n" not in error["message"]
        assert core.admission.running == 0

    asyncio.run(post())
