"""Reading a text as a prompt and token by token is the same function, when everything is read."""

from collections.abc import Callable

import pytest

from lserve.engine.config import EngineConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import load
from lserve.engine.request import AttentionOptions
from lserve.quality.likelihood import TextScore, read_text
from lserve.quality.text import load_text

DENSE = AttentionOptions(dense=True)


def read(config: EngineConfig, scored_from: int, num_decoded: int, attention: AttentionOptions) -> TextScore:
    engine = Engine(config, load(config))
    tokens = engine.tokenizer.encode(load_text()[:8000])[:1100]
    score = read_text(engine, tokens, scored_from, num_decoded, 4, attention)
    pools = (engine.retrieval_pool, engine.streaming_pool, engine.row_pool)
    assert [pool.num_used for pool in pools] == [0, 0, 0], "everything is given back"
    return score


@pytest.mark.parametrize("profile", [False, True])
def test_decode_predicts_what_prefill_predicts(tiny_config: Callable[..., EngineConfig], profile: bool) -> None:
    """1,024 is the only block boundary with room for 75 tokens after it: both score the last 75 of 1,100."""
    score = read(tiny_config("float32", profile), 1025, 75, DENSE)
    assert len(score.top_tokens) == 75 and score.decode_characters == score.prompt_characters
    assert score.decode_bits == pytest.approx(score.prompt_bits, rel=1e-4)


def test_a_budget_changes_what_is_decoded_and_not_what_is_prefilled(tiny_config: Callable[..., EngineConfig]) -> None:
    dense, sparse = (read(tiny_config("int4"), 600, 64, attention) for attention in (DENSE, AttentionOptions()))
    assert dense.prompt_bits == sparse.prompt_bits
    assert dense.decode_bits != sparse.decode_bits
    assert len(dense.top_tokens) == len(sparse.top_tokens) == 4 * 64
