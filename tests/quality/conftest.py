"""A tiny random model that speaks the demo model's tokens, and engines over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_model

from lserve.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory, with a head profile in heads.json."""
    return make_tiny_model(tmp_path_factory.mktemp("quality"))


@pytest.fixture(scope="session")
def tiny_config(tiny_path: Path) -> Callable[..., EngineConfig]:
    """Settings for it: kv_dtype, profile (whether heads stream), and sparsity's fields by name."""

    def make(kv_dtype: Any = "int4", profile: bool = False, **sparsity: Any) -> EngineConfig:
        heads = str(tiny_path / "heads.json") if profile else None
        return EngineConfig(
            str(tiny_path),
            cache=CacheConfig(kv_dtype, retrieval_pool_bytes=64 << 20),
            sparsity=SparsityConfig(head_profile=heads, **{"token_budget": 512} | sparsity),
            scheduler=SchedulerConfig(max_batch_size=16),
        )

    return make
