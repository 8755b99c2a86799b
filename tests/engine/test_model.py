"""The decoder computes what transformers computes, for every architecture, head shape and RoPE variant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import LINEAR, LLAMA3, YARN, causal, make_checkpoint, our_logits, random_tokens, their_logits

from lserve.engine.config import ModelConfig
from lserve.engine.errors import UnsupportedModelError
from lserve.engine.model import Model
from lserve.engine.rope import check_rope_scaling, rope_frequencies
from lserve.engine.weights import load_model, value_rotation

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-one-kv-head": ("Llama", {"heads": (7, 1), "hidden_size": 112}),
    "llama-no-groups": ("Llama", {"heads": (4, 4), "head_dim": 80}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 96}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-linear": ("Llama", {"rope": LINEAR}),
    "llama-llama3": ("Llama", {"rope": LLAMA3, "rope_theta": 500000.0, "head_dim": 64}),
    "llama-yarn": ("Llama", {"rope": YARN, "head_dim": 128}),
    "mistral": ("Mistral", {"heads": (4, 2), "head_dim": 32}),
    "mistral-yarn": ("Mistral", {"rope": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}}),
    "qwen2": ("Qwen2", {"heads": (14, 2), "hidden_size": 112}),
    "qwen2-yarn": ("Qwen2", {"rope": YARN | {"attention_factor": 1.3}, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 80, "heads": (3, 1)}),
    "qwen3-biases-yarn": ("Qwen3", {"head_dim": 48, "attention_bias": True, "rope": YARN | {"mscale": 1.2}}),
    "qwen3-mscale": ("Qwen3", {"head_dim": 32, "rope": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    theirs = make_checkpoint(tmp_path, kind, **dict(fields))
    tokens = random_tokens()
    expected = their_logits(theirs, tokens)
    assert expected.std() > 0.1, "a model that answers all alike would prove nothing"
    torch.testing.assert_close(
        our_logits(load_model(str(tmp_path), "cpu", torch.float32), tokens), expected, atol=1e-4, rtol=0
    )


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("qwen3")
    make_checkpoint(path, "Qwen3", head_dim=80)
    return load_model(str(path), "cpu", torch.float32)


def test_tokens_are_independent_but_for_attention(qwen3: Model) -> None:
    """Any mix of tokens may share a call: permuting them permutes the hidden states."""
    tokens, order = random_tokens(40), torch.randperm(40, generator=torch.Generator().manual_seed(2))

    def no_attention(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query * value.repeat_interleave(3, dim=1)

    positions = torch.arange(40) * 3
    hidden = qwen3.forward(tokens, positions, no_attention)
    torch.testing.assert_close(qwen3.forward(tokens[order], positions[order], no_attention), hidden[order])


def test_attend_sees_each_layer_once_in_order_with_whole_heads(qwen3: Model) -> None:
    seen = []

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.append((layer, query.shape, key.shape, value.shape, query.dtype))
        return causal(layer, query, key, value)

    qwen3.forward(random_tokens(5), torch.arange(5), attend)
    heads, kv_heads = torch.Size([5, 6, 80]), torch.Size([5, 2, 80])
    assert seen == [(layer, heads, kv_heads, kv_heads, torch.float32) for layer in range(2)]


def test_no_tokens_and_no_rows(qwen3: Model) -> None:
    hidden = qwen3.forward(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), lambda i, q, k, v: q)
    assert hidden.shape == (0, 96)
    assert qwen3.logits(hidden).shape == (0, 173)


def test_compute_dtype_is_kept_and_logits_are_float32(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "Qwen2", rope=YARN)
    model = load_model(str(tmp_path), "cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    tokens = random_tokens()
    logits = our_logits(model, tokens)
    assert logits.dtype == torch.float32
    expected = their_logits(theirs, tokens)
    assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 6])
def test_value_rotation_is_orthonormal_and_its_own_inverse(head_dim: int) -> None:
    rotation = value_rotation(head_dim)
    assert rotation.dtype == torch.float32
    torch.testing.assert_close(rotation @ rotation, torch.eye(head_dim), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation, rotation.T)
    block = head_dim & -head_dim
    assert (rotation != 0).sum() == head_dim * block


def test_cached_values_are_the_rotated_ones(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "Qwen2", heads=(2, 2))
    ours, expected = {}, {}

    def keep(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ours[layer] = value
        return causal(layer, query, key, value)

    for index, layer in enumerate(theirs.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, o, index=index: expected.update({index: o[0]}))
    tokens = random_tokens(9)
    load_model(str(tmp_path), "cpu", torch.float32).forward(tokens, torch.arange(9), keep)
    their_logits(theirs, tokens)
    for index in range(2):
        plain = expected[index].view(9, 2, 48)
        torch.testing.assert_close(ours[index], plain @ value_rotation(48), atol=1e-5, rtol=0)


def test_frequency_factors_divide_the_frequencies() -> None:
    factors = (1.0, 2.0, 8.0, 8.0)
    config = ModelConfig("llama", 1, 8, 8, 1, 1, 8, 8, 64, 10000.0, 1e-5)
    scaled = ModelConfig("llama", 1, 8, 8, 1, 1, 8, 8, 64, 10000.0, 1e-5, rope_frequency_factors=factors)
    torch.testing.assert_close(rope_frequencies(scaled)[0] * torch.tensor(factors), rope_frequencies(config)[0])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type 'dynamic' is not supported"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling.rope_type 'longrope' is not supported"),
        ({"rope_type": "linear"}, "rope_scaling of type linear lacks 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "rope_scaling of type llama3 lacks"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor must be a positive number, got '2'"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope_scaling.factor must be a positive number"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling.full_attention"),
    ],
)
def test_rope_scaling_that_is_not_implemented_is_refused_by_name(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message.replace("(", r"\(")):
        check_rope_scaling(parameters)
