"""A warmed-up engine holds nothing, and gives what it would have given."""

from typing import Any

import pytest
from tiny_engines import MIXED, RETRIEVAL, Draws, assert_idle, make_engine, request, run, tokens

from lserve.engine.model import Model
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.warm_up import warm_up


@pytest.mark.parametrize("streaming", [RETRIEVAL, MIXED], ids=["retrieval", "mixed"])
def test_a_warm_up_leaves_no_trace(tiny: tuple[Model, Any], draws: Draws, streaming: Any) -> None:
    asked = [request(tokens(300), 8) for _ in range(2)]
    for item, warm in zip(asked, (False, True), strict=True):
        engine, probe = make_engine(tiny[0], streaming=streaming, prefix_cache=True)
        if warm:
            warm_up(engine)
            assert set(probe.batch_sizes) == {1, 2, 4, 8, 16}
            assert_idle(engine)
        run(engine, [item])
    cold, warm = (list(draws.of(item).values()) for item in asked)
    assert len(cold) == len(warm) == 8 and all(bool((a == b).all()) for a, b in zip(cold, warm, strict=True))


def test_a_warm_up_fits_any_pool(tiny: tuple[Model, Any]) -> None:
    engine, probe = make_engine(tiny[0], sizes=PoolSizes(retrieval_pages=4, streaming_pages=0, rows=8))
    warm_up(engine)
    assert set(probe.batch_sizes) == {1, 2}
    assert_idle(engine)


def test_a_prefill_worker_warms_up_no_batches(tiny: tuple[Model, Any]) -> None:
    engine, probe = make_engine(tiny[0])
    warm_up(engine, decodes=False)
    assert set(probe.batch_sizes) == {1}
