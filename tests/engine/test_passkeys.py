"""Specifies that sparse decoding finds what dense decoding finds: a number hidden in 7,500 tokens of real text."""

import pydoc_data.topics
from pathlib import Path

import pytest
from devices import DEVICES

from lserve.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import load
from lserve.engine.request import AttentionOptions, Request, SamplingParams

NUM_TOKENS = 7500
BUDGET = 1024
DEPTHS = (0.9, 0.7, 0.5, 0.3, 0.1)  # the deepest first: the text before a key is then in the prefix cache
KEY = "90417"
FACTS = f"""The phone number of Mr. Lighthouse is {KEY}. Remember it. {KEY} is the phone number of Mr. Lighthouse.

The secret word of the sailors is marmalade. Remember it. Marmalade is the secret word of the sailors."""


def hide(engine: Engine, depth: float) -> list[int]:
    """A chat about Python's language reference, with a number to remember at this depth: 7,500 tokens."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = engine.tokenizer.encode(text)[: NUM_TOKENS - 220]
    cut = int(len(ids) * depth)
    document = f"{engine.tokenizer.decode(ids[:cut])}\n\n{FACTS}\n\n{engine.tokenizer.decode(ids[cut:])}"
    question = "What is the phone number of Mr. Lighthouse?"
    prompt = engine.tokenizer.encode_chat([("user", f"{document}\n\n{question}")])
    assert NUM_TOKENS - 120 <= len(prompt) <= NUM_TOKENS
    return prompt


def answer(engine: Engine, prompt: list[int], dense: bool) -> str:
    """What the model says, and while it does so, that no retrieval head reads more than the budget."""
    params = SamplingParams(temperature=0, max_tokens=20)
    engine.add_request(Request("ask", tuple(prompt), params, AttentionOptions(dense=dense)))
    text = ""
    while engine.has_work:
        result = engine.step()
        text += "".join(output.text for output in result.outputs)
        for sequence in engine.scheduler.running:
            if not dense and not sequence.fresh:
                listed = engine.cache.selected_counts[:, sequence.row]
                assert int(listed.min()) * 64 + 64 == int(listed.max()) * 64 + 64 == BUDGET
    return text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", DEVICES)
def test_hidden_numbers_are_found_within_a_budget_of_1024_tokens(demo_model_path: Path, device: str) -> None:
    config = EngineConfig(
        str(demo_model_path),
        device=device,
        cache=CacheConfig(kv_dtype="int4", retrieval_pool_bytes=1 << 30),
        sparsity=SparsityConfig(token_budget=BUDGET),
        scheduler=SchedulerConfig(max_batch_size=2),
    )
    engine = Engine(config, load(config))
    for depth in DEPTHS:
        prompt = hide(engine, depth)
        assert KEY in answer(engine, prompt, dense=True), f"the dense model does not find the number at {depth}"
        assert KEY in answer(engine, prompt, dense=False), f"not found at {depth}"
