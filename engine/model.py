"""The decoder: Llama, Mistral, Qwen2 and Qwen3 are one computation with or without biases and QK norm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lserve.kernels.norm import rms_norm
from lserve.kernels.rope import qk_norm_rope, rope

from .config import ModelConfig
from .quantization import Linear, add_norm_for, norm_for, silu_mul_for
from .rope import RotaryEmbedding

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, D]) -> [T, Hq, D], in the compute dtype.

Query (not scaled) and key come after QK norm and RoPE, value comes rotated (`value_rotation`). All three may be views
into larger tensors.
"""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; norms are [hidden_size] or [head_dim] in the compute dtype.

    qkv: fused projection, rows ordered query, key, value heads (values rotated). gate_up: gate's rows first.
    """

    input_norm: Tensor
    qkv: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model. embedding: [vocab_size, hidden_size]; head may share it."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear


class Model:
    """A decoder on one device. It keeps no state between calls: attention is the caller's."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._weights = weights
        self._rotary = RotaryEmbedding(config, weights.embedding.device)
        self._widths = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    @property
    def weights(self) -> Weights:
        """All weights; they are not to be changed."""
        return self._weights

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: of hidden states, queries, keys and values."""
        return self._weights.embedding.dtype

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Runs all layers over T tokens of any mix of sequences; `attend` is called once per layer, in order.

        token_ids, positions: int64 [T] on the model's device. Returns hidden states [T, hidden_size] for `logits`.
        """
        return self.run_layers(self.embed(token_ids), positions, attend, range(self.config.num_layers))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states before the first layer: token_ids int64 [T] to [T, hidden_size]."""
        return torch.nn.functional.embedding(token_ids, self._weights.embedding)

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        """Runs some consecutive layers: hidden states [T, hidden_size] before the first to those after the last."""
        config, num_tokens, num_heads = self.config, hidden.shape[0], sum(self._widths)
        eps, weights = config.rms_norm_eps, self._weights.layers
        cos, sin = self._rotary.tables(positions)
        residual, first = hidden, weights[layers.start]
        x = norm_for(first.qkv, residual, first.input_norm, eps)
        for index in layers:
            layer = weights[index]
            heads = layer.qkv(x).view(num_tokens, num_heads, config.head_dim)
            query, key, value = heads.split_with_sizes(self._widths, dim=1)
            if layer.query_norm is None or layer.key_norm is None:
                query, key = rope(query, key, cos, sin)
            else:
                query, key = qk_norm_rope(query, key, layer.query_norm, layer.key_norm, eps, cos, sin)
            attended = attend(index, query, key, value)
            delta = layer.output(attended.reshape(num_tokens, config.num_heads * config.head_dim))
            x, residual = add_norm_for(layer.gate_up, delta, residual, layer.post_norm, eps)
            delta = layer.down(silu_mul_for(layer.down, layer.gate_up(x)))
            if index + 1 in layers:
                following = weights[index + 1]
                x, residual = add_norm_for(following.qkv, delta, residual, following.input_norm, eps)
        return residual + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: hidden [N, hidden_size], rows of `forward`'s result, to float32 [N, vocab_size]."""
        normalized = rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)
        return self._weights.head(normalized).float()
