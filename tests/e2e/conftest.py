"""Fixtures of the end-to-end tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from lserve.deployments.embedded_valkey import EmbeddedValkey


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 3 layers."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def valkey(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedValkey]:
    """An empty Valkey of its own, and a cluster secret."""
    monkeypatch.setenv("LSERVE_CLUSTER_SECRET", "a secret of the tests")
    with EmbeddedValkey() as server:
        yield server


os.environ.setdefault("OMP_NUM_THREADS", "2")
