"""A tiny random model on disk that speaks the demo model's tokens, with a head profile of both classes."""

import shutil
from pathlib import Path

from tiny_checkpoints import make_checkpoint

from lserve.cli.demo_model import demo_model
from lserve.engine.head_profile import HeadProfile

VOCABULARY = 49152
MAX_POSITION = 8192
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
STREAMING = ((False, True), (True, True), (False, False))
"""Per layer and KV head: a mixed layer, one that only streams, one that only retrieves."""


def make_tiny_model(path: Path, **fields: int) -> Path:
    """A Llama of 3 layers with 6 query heads on 2 KV heads, beside its `heads.json`; returns the path."""
    make_checkpoint(path, "Llama", vocab_size=VOCABULARY, num_layers=3, max_position=MAX_POSITION, **fields)
    for name in TOKENIZER_FILES:
        shutil.copy(demo_model() / name, path)
    HeadProfile("", 128, 256, STREAMING).save(path / "heads.json")
    return path
