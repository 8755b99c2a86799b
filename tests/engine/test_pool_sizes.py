"""How much a worker takes of a GPU, alone and beside others."""

import pytest
import torch

from lserve.engine.config import CacheConfig, EngineConfig, ModelConfig, SparsityConfig
from lserve.engine.errors import SettingsError
from lserve.engine.page_format import PageFormat, make_page_format
from lserve.engine.pool_sizes import pool_sizes

GIB = 1 << 30
MODEL = ModelConfig("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5, 1e-5)


def page_format() -> PageFormat:
    streaming = ((True, False) * 4,) * 32
    return make_page_format(MODEL, CacheConfig(), SparsityConfig(), streaming, "", "w4a8", "bfloat16")


def bytes_taken(gpu_share: float) -> int:
    pages = page_format()
    sizes = pool_sizes(EngineConfig("", device="cuda", gpu_share=gpu_share), pages, 8192)
    return (
        sizes.retrieval_pages * pages.retrieval_page_bytes
        + sizes.streaming_pages * pages.streaming_page_bytes
        + sizes.rows * pages.tail_row_bytes
    )


@pytest.mark.parametrize(
    ("share", "free", "own", "expected"),
    [
        (1.0, 100, 5, 80),  # alone: 80 % of what is free
        (0.5, 135, 5, 52),  # the first of two: half of 140, less its weights
        (0.5, 75, 5, 52),  # the second takes as much
        (0.5, 30, 5, 24),  # something else fills the card
    ],
)
def test_a_worker_takes_its_share(
    share: float, free: int, own: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: own * GIB)
    assert bytes_taken(share) / GIB == pytest.approx(expected, rel=0.01)


def test_a_share_without_room_for_one_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    with pytest.raises(SettingsError, match="one request of 8192 tokens needs"):
        bytes_taken(0.1)
