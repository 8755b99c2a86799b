"""Checkpoints come in whole, from safetensors or GGUF, or are refused with the field or tensor that does not fit."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import LLAMA3, YARN, make_checkpoint, our_logits, random_tokens, their_logits

from lserve.engine.checkpoint import parse_config
from lserve.engine.errors import SettingsError, UnsupportedModelError
from lserve.engine.weights import fingerprint, load_model, read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 8192,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (LLAMA | {"architectures": ["MixtralForCausalLM"]}, "architectures 'MixtralForCausalLM' is not supported"),
        (LLAMA | {"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config {'quant_method': 'awq'}"),
        (QWEN2 | {"num_experts": 8}, "num_experts 8 is not supported"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        (LLAMA | {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (LLAMA | {"head_dim": 15}, "head_dim 15 is odd"),
        (LLAMA | {"vocab_size": None}, "vocab_size must be a positive whole number, got None"),
        (LLAMA | {"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, got 'small'"),
        (MISTRAL, "sliding_window 4096 is not supported"),
        (MISTRAL | {"sliding_window": 1024}, "sliding_window 1024 is not supported"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window 64"),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window",
        ),
    ],
)
def test_config_that_the_model_code_lacks_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
)
FIELDS = [*LLAMA, "model_type", "hidden_act", "head_dim", "rope_scaling", "rope_parameters", "rope_theta"]
FIELDS += ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "attention_bias", "num_experts"]


@given(st.sampled_from([LLAMA, MISTRAL, QWEN2]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), JSON)
def test_any_json_is_a_config_or_refused_in_one_line(
    raw: dict[str, Any], changes: dict[str, Any], ends: object
) -> None:
    try:
        config = parse_config(raw | changes, ends)
    except UnsupportedModelError as error:
        assert "\n" not in str(error)
    else:
        assert config.head_dim % 2 == 0


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA | {"sliding_window": 128},  # Llama's code never looks at it
        MISTRAL | {"sliding_window": None},
        MISTRAL | {"sliding_window": 8192},  # no position is that far
        QWEN2 | {"use_sliding_window": False, "sliding_window": 64},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ],
)
def test_a_sliding_window_that_never_bites_is_fine(raw: dict[str, Any]) -> None:
    assert parse_config(raw).num_layers == 2


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    old = parse_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert parse_config(LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}) == old
    assert old.rope_theta == 5e5
    older = parse_config(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert dict(older.rope_scaling) == YARN | {"original_max_position_embeddings": 8192}


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    assert read_config(str(tmp_path)).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_config(str(tmp_path)).eos_token_ids == (7, 8)


def test_sharded_checkpoints_load_like_whole_ones(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "Llama", max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens = random_tokens()
    ours = our_logits(load_model(str(tmp_path), "cpu", torch.float32), tokens)
    torch.testing.assert_close(ours, their_logits(theirs, tokens), atol=1e-4, rtol=0)


def test_a_bfloat16_checkpoint_is_rotated_without_rounding(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path, "Llama").bfloat16().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    ours = our_logits(load_model(str(tmp_path), "cpu", torch.float32), tokens)
    torch.testing.assert_close(ours, their_logits(theirs, tokens), atol=1e-4, rtol=0)


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites a one-file checkpoint: a tensor replaces or adds, None removes. `__` stands for a dot."""
    tensors = load_file(path / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "the checkpoint lacks tensor 'model.norm.weight'"),
        (
            {"model__norm__weight": torch.ones(95)},
            "tensor 'model.norm.weight' has shape (95,), the configuration says (96,)",
        ),
        (
            {"model__layers__0__self_attn__sinks": torch.ones(6)},
            "tensor 'model.layers.0.self_attn.sinks' has no place in a llama model",
        ),
        ({"model__norm__weight": torch.ones(96, dtype=torch.int8)}, "tensor 'model.norm.weight' has dtype torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "Llama")
    change_tensors(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(str(tmp_path), "cpu", torch.float32)
    assert message in str(caught.value)


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Llama")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors cannot be read"):
        load_model(str(tmp_path), "cpu", torch.float32)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsupportedModelError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_model(str(tmp_path), "cpu", torch.float32)
    with pytest.raises(UnsupportedModelError, match="is not a GGUF file"):
        load_model(str(tmp_path / "pytorch_model.bin"), "cpu", torch.float32)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UnsupportedModelError, match="is not a readable GGUF file"):
        load_model(str(tmp_path / "cut.gguf"), "cpu", torch.float32)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nowhere"), "missing.gguf", "no-owner"):
        with pytest.raises(SettingsError, match=missing):
            load_model(missing, "cpu", torch.float32)


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_checkpoint(tmp_path / name, "Llama")
    first = fingerprint(str(tmp_path / "one"))
    assert first == fingerprint(str(tmp_path / "two")) == fingerprint(str(tmp_path / "one"))
    weights = load_file(tmp_path / "two" / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, tmp_path / "two" / "model.safetensors")
    assert fingerprint(str(tmp_path / "two")) != first
    config = tmp_path / "one" / "config.json"
    saved_by = json.loads(config.read_text()) | {"transformers_version": "4.0.0"}
    config.write_text(json.dumps(saved_by))
    assert fingerprint(str(tmp_path / "one")) == first
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    assert fingerprint(str(tmp_path / "one")) != first


def write_gguf(path: Path, model: Any, architecture: str, **extra: Any) -> None:
    """What llama.cpp's converter writes of a tiny model: Llama's query and key channels in adjacent pairs."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(5)
    for key, value in extra.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key.replace("__", "."), value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key.replace('__', '.')}", value)
        else:
            writer.add_key_value(f"{architecture}.{key.replace('__', '.')}", value, gguf.GGUFValueType.FLOAT32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "kind", "fields", "extra"),
    [
        ("llama", "Llama", {"attention_bias": True, "head_dim": 80}, {}),
        ("qwen2", "Qwen2", {}, {}),
        ("qwen3", "Qwen3", {"head_dim": 32}, {}),
        (
            "llama",
            "Llama",
            {"rope": {"rope_type": "linear", "factor": 2.0}},
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
        ),
        (
            "qwen2",
            "Qwen2",
            {"rope": YARN},
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 64.0,
            },
        ),
        (
            "llama",
            "Llama",
            {"rope": {"rope_type": "linear", "factor": 3.0}},
            {"rope_freqs__weight": np.full(8, 3.0, np.float32)},
        ),
    ],
)
def test_gguf_equals_the_checkpoint_that_it_was_made_from(
    architecture: str, kind: str, fields: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    theirs = make_checkpoint(tmp_path / "source", kind, **dict(fields))
    write_gguf(tmp_path / "tiny.gguf", theirs, architecture, **extra)
    model = load_model(str(tmp_path / "tiny.gguf"), "cpu", torch.float32)
    assert model.config.eos_token_ids == (5,)
    tokens = random_tokens()
    torch.testing.assert_close(our_logits(model, tokens), their_logits(theirs, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"expert_count": 8.0}, "llama.expert_count 8.0 is not supported"),
        ({"rope__dimension_count": 8.0}, "llama.rope.dimension_count 8 is not supported: head_dim is 16"),
        ({"attention__sliding_window": 32.0}, "llama.attention.sliding_window 32 is not supported"),
        ({"rope__scaling__type": "longrope"}, "rope_scaling.rope_type 'longrope' is not supported"),
        ({"blk__0__attn_sinks__weight": np.ones(6, np.float32)}, "tensor 'blk.0.attn_sinks.weight' has no place"),
    ],
)
def test_gguf_that_the_model_code_lacks_is_refused_by_name(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_checkpoint(tmp_path / "source", "Llama"), "llama", **extra)
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(str(tmp_path / "tiny.gguf"), "cpu", torch.float32)
    assert message in str(caught.value)


def test_the_demo_model_answers_as_in_transformers(demo_model_path: Path, demo_reference: Any) -> None:
    tokens = torch.randint(0, 49152, (300,), generator=torch.Generator().manual_seed(0))
    ours = our_logits(load_model(str(demo_model_path), "cpu", torch.float32), tokens)
    torch.testing.assert_close(ours, their_logits(demo_reference, tokens), atol=1e-3, rtol=0)
