"""The demo model, fully dense with float32 pages, answers token for token as in transformers."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from tiny_engines import assert_idle, request, run

from lserve.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import load
from lserve.engine.pool_sizes import PoolSizes

SHORT = (1, 2, 3, 5, 8, 13, 20, 31, 47, 63, 64, 65, 90, 127, 128, 129, 180, 256, 300)
LONG = (2000, 4000)
NEW_TOKENS = 64
MODULES = ("argparse", "datetime", "decimal", "difflib", "doctest", "inspect", "pickle", "statistics", "threading")


@pytest.fixture(scope="module")
def english() -> str:
    """Plain English that every Python brings along: docstrings of the standard library, one after the other."""
    texts = []
    for name in MODULES:
        tree = ast.parse(Path(sysconfig.get_paths()["stdlib"], f"{name}.py").read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        texts += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 80]
    return "\n\n".join(texts)


@pytest.fixture(scope="module", params=DEVICES)
def engine(demo_model_path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that reads everything, over float32 pages, with a chunk that splits the long prompts."""
    config = EngineConfig(
        str(demo_model_path),
        device=request.param,
        compute_dtype="float32",
        cache=CacheConfig(kv_dtype="float32", prefix_cache=False),
        sparsity=SparsityConfig(token_budget=None),
        scheduler=SchedulerConfig(chunk_size=1024, max_batch_size=32),
    )
    yield Engine(config, load(config), sizes=PoolSizes(retrieval_pages=180, streaming_pages=0, rows=32))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_tokens_equal_transformers(engine: Engine, demo_reference: Any, english: str) -> None:
    """Where the best two of transformers' logits differ by more than 1e-2; after a near tie the answers may part."""
    ids = engine.tokenizer.encode(english)
    assert len(ids) > sum(SHORT + LONG)
    asked, start = [], 0
    for length in SHORT + LONG:
        asked.append(request(ids[start : start + length], NEW_TOKENS))
        start += length
    answers = run(engine, asked[: len(SHORT)]) | run(engine, asked[len(SHORT) :])
    assert_idle(engine)
    compared = 0
    for item in asked:
        answer = torch.tensor(answers[item.request_id, 0].token_ids)
        assert len(answer) == NEW_TOKENS
        prompt = torch.tensor(item.prompt_token_ids)
        with torch.inference_mode():
            logits = demo_reference(torch.cat((prompt, answer))[None], logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-2
        assert torch.equal(answer[clear], logits.argmax(-1)[clear]), f"prompt of {len(prompt)} tokens"
        compared += int(clear.sum())
    assert compared > 0.95 * NEW_TOKENS * len(asked)
