"""Fixtures of the engine's tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import make_checkpoint
from tiny_engines import VOCABULARY, Draws

from lserve.cli.demo_model import demo_gguf
from lserve.engine import engine as engine_module
from lserve.engine.model import Model
from lserve.engine.weights import load_model


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched when it is not there."""
    return demo_gguf()


@pytest.fixture(scope="session")
def demo_reference(demo_model_path: Path) -> Any:
    """The demo model in transformers, float32. Takes ten seconds to load."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A random Llama of 3 layers with 6 query heads on 2 KV heads of 16 channels: ours and transformers'."""
    path = tmp_path_factory.mktemp("tiny")
    theirs = make_checkpoint(path, "Llama", vocab_size=VOCABULARY, num_layers=3, max_position=4096)
    return load_model(str(path), "cpu", torch.float32), theirs


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """All logits that engines sample from during the test."""
    kept = Draws()
    monkeypatch.setattr(engine_module, "sample", kept)
    return kept
