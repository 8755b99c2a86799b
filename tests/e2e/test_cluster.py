"""The whole path with the demo model: HTTP, router, prefill worker, NIXL, decode worker, Redis, real Ray Serve."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI, RateLimitError
from running_cluster import RunningCluster, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def chat_about(text: str) -> list[Any]:
    return [{"role": "user", "content": f"{text}\n\nWhat kind of text is this?"}]


@pytest.fixture(scope="module")
def client(running: RunningCluster) -> OpenAI:
    return OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def ask(client: OpenAI, running: RunningCluster, messages: list[Any], **fields: Any) -> Any:
    options = {"temperature": 0.0, "max_tokens": 16} | fields
    return client.chat.completions.create(model=running.model, messages=messages, **options)


def test_a_question_is_answered(client: OpenAI, running: RunningCluster) -> None:
    reply = ask(client, running, QUESTION)
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.completion_tokens == len(
        httpx.post(f"{running.url}/tokenize", json={"prompt": reply.choices[0].message.content}).json()["tokens"]
    ) + (reply.choices[0].finish_reason == "stop")
    running.wait_until_idle()


def test_streams_and_answers_are_the_same_sync_and_async(client: OpenAI, running: RunningCluster) -> None:
    async def streamed_async() -> tuple[str, int]:
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as other:
            stream = await other.chat.completions.create(
                model=running.model,
                messages=QUESTION,
                temperature=0,
                max_tokens=16,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage.total_tokens

    whole = ask(client, running, QUESTION)
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, running, QUESTION, stream=True))
    assert streamed == whole.choices[0].message.content
    assert asyncio.run(streamed_async()) == (streamed, whole.usage.total_tokens)
    running.wait_until_idle()


def test_choices_depend_on_the_seed_alone(client: OpenAI, running: RunningCluster) -> None:
    def texts(seed: int) -> list[str]:
        reply = ask(client, running, QUESTION, n=2, seed=seed, temperature=1.5, max_tokens=12)
        return [choice.message.content for choice in reply.choices]

    first, again, other = texts(1), texts(1), texts(2)
    assert first == again != other
    assert first[0] != first[1]
    running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_leads_to_the_text_that_was_read(client: OpenAI, running: RunningCluster, stream: bool) -> None:
    """A fact in the middle of 2,300 tokens, of which each head reads 1,024: its page is among them for many heads."""
    fact = "The phone number of Mr. Lighthouse is 48213. Remember it. 48213 is the phone number of Mr. Lighthouse."
    licence = f"This is a licence.\n\n{LICENSE[:5000]}\n\n{fact}\n\n{LICENSE[5000:]}"
    text = f"{licence}\n\nWhat is the phone number of Mr. Lighthouse?"
    fields = {"extra_body": {"lserve": {"trace": True}}, "stream": stream}
    reply = ask(client, running, [{"role": "user", "content": text}], **fields)
    choice = [chunk for chunk in reply if chunk.choices][-1].choices[0] if stream else reply.choices[0]
    trace = choice.model_extra["lserve"]["trace"]
    where = text.index(fact)
    holding = {i for i, spans in enumerate(trace["pages"]) for _, s, e in spans if s < where + len(fact) and e > where}
    assert 1 <= len(holding) <= 3
    made = trace["choices"][0]
    assert made["token"] == 1 and not made["everything"] and 30 < made["num_pages"] < 60
    read = dict(made["read"])
    assert sum(read.values()) == trace["num_heads"] * (1024 // 64 - 1)
    assert max(read[page] for page in holding) > trace["num_heads"] / 2
    assert 0.5 < made["mass"]["kept"] <= 1
    running.wait_until_idle()


def test_prefill_goes_through_the_prefill_worker_and_its_pages_through_nixl(
    client: OpenAI, running: RunningCluster
) -> None:
    messages = chat_about(LICENSE[:5000])
    first = ask(client, running, messages)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    second = ask(client, running, messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= 896
    assert second.choices[0].message.content == first.choices[0].message.content
    running.wait_until_idle()
    length = first.usage.prompt_tokens

    def prefilled(deployment: str) -> float:
        return running.metric("lserve_prefix_tokens_total", deployment=deployment)

    def pulled() -> float:
        return running.metric("lserve_kv_transfer_bytes_total", deployment="DecodeWorker")

    eventually(lambda: prefilled("PrefillWorker") >= 2 * length and pulled() > length // 64 * 400_000, 30)
    assert prefilled("DecodeWorker") == 0
    eventually(lambda: running.metric("lserve_prefix_tokens_total", tier="pool") >= 896, 30)


METRICS = (
    "lserve_time_to_first_token_seconds_count",
    "lserve_inter_token_latency_seconds_count",
    "lserve_time_per_output_token_seconds_count",
    "lserve_e2e_request_latency_seconds_count",
    "lserve_queue_seconds_count",
    "lserve_prefill_seconds_count",
    "lserve_kv_transfer_seconds_count",
    "lserve_kv_transfer_bytes_total",
    "lserve_kv_pages",
    "lserve_leases",
    "lserve_prefix_tokens_total",
    "lserve_attention_density_count",
    "lserve_requests_total",
    "lserve_running_requests",
    "lserve_waiting_requests",
)


def test_every_metric_is_exported(running: RunningCluster) -> None:
    def missing() -> list[str]:
        text = httpx.get(f"{running.url}/metrics").text
        return [name for name in METRICS if f"\n{name}{{" not in text]

    eventually(lambda: not missing(), 30)
    eventually(lambda: running.metric("lserve_kv_pages", pool="retrieval", state="held") == 0, 30)
    assert running.metric("lserve_attention_density_count", phase="decode") > 0


def test_too_many_requests_are_told_to_come_back(client: OpenAI, running: RunningCluster) -> None:
    outcomes: list[str] = []

    def one() -> None:
        try:
            outcomes.append(ask(client, running, QUESTION).choices[0].message.content)
        except RateLimitError as error:
            assert float(error.response.headers["retry-after"]) > 0
            outcomes.append("full")

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [outcome for outcome in outcomes if outcome != "full"]
    assert len(outcomes) == 16 and 10 <= len(answers) < 16
    assert all("Paris" in answer for answer in answers)
    running.wait_until_idle()


def test_a_client_that_leaves_in_mid_stream_costs_nothing_within_a_second(running: RunningCluster) -> None:
    body = {"model": running.model, "messages": QUESTION, "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                assert running.held()
                break
    running.wait_until_idle(within_s=1.0)


def test_a_client_that_leaves_during_prefill_costs_nothing_within_a_second(running: RunningCluster) -> None:
    body = {"model": running.model, "messages": chat_about(LICENSE[500:9000]), "max_tokens": 5}
    with pytest.raises(httpx.ReadTimeout):  # and the connection is closed
        httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=0.5)
    running.wait_until_idle(within_s=1.0)  # the step of 128 tokens that runs is not broken off


def test_a_prefill_worker_killed_in_a_prefill_costs_time_only(client: OpenAI, running: RunningCluster) -> None:
    messages = chat_about(LICENSE[1000:10_000])

    def kill_while_it_computes() -> None:
        eventually(lambda: any(load.running for load in running.counts("PrefillWorker")), 20)
        running.kill(running.workers("PrefillWorker")[0])

    before = running.num_retries()
    killer = threading.Thread(target=kill_while_it_computes)
    killer.start()
    disturbed = ask(client, running, messages)
    killer.join()
    assert running.num_retries() > before
    running.wait_until_ready()
    running.wait_until_idle()
    undisturbed = ask(client, running, messages)
    assert disturbed.choices[0].message.content == undisturbed.choices[0].message.content


def test_a_decode_worker_killed_in_mid_stream_goes_unnoticed(client: OpenAI, running: RunningCluster) -> None:
    messages = [{"role": "user", "content": "Count from 1 to 40: 1, 2, 3,"}]
    options = {"max_tokens": 60, "extra_body": {"lserve": {"dense": True}}}
    undisturbed = ask(client, running, messages, **options)
    pieces: list[str] = []
    killed = False
    for chunk in ask(client, running, messages, stream=True, stream_options={"include_usage": True}, **options):
        if not chunk.choices:
            assert chunk.usage.completion_tokens == undisturbed.usage.completion_tokens
            continue
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == 10:
            killed = True
            running.kill(busiest(running))
    assert killed
    assert "".join(pieces) == undisturbed.choices[0].message.content
    running.wait_until_ready()
    running.wait_until_idle()


def test_prefixes_outlive_every_worker(client: OpenAI, running: RunningCluster) -> None:
    messages = chat_about(LICENSE[2000:7000])
    before = ask(client, running, messages)
    for deployment in ("PrefillWorker", "DecodeWorker"):
        for process in running.workers(deployment):
            running.kill(process)
            process.wait(10)
    running.wait_until_ready()
    after = ask(client, running, messages)
    assert after.usage.prompt_tokens_details.cached_tokens >= 896
    assert after.choices[0].message.content == before.choices[0].message.content
    running.wait_until_idle()


def busiest(running: RunningCluster) -> Any:
    """The decode worker that has used the CPU most since a moment ago."""
    workers = running.workers("DecodeWorker")
    for process in workers:
        process.cpu_percent()
    threading.Event().wait(0.2)
    return max(workers, key=lambda process: process.cpu_percent())
