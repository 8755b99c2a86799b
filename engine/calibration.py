"""Calibration: low-bit weights that know what they will be multiplied by.

Layer by layer, while a checkpoint loads, a fixed text runs through the model, each layer reading what the quantized
layers before it computed. Three things follow from a matrix's inputs:

- Channels are rescaled so that no outlier sets the step of a whole token (SmoothQuant, arXiv 2211.10438; for 4-bit
  weights AWQ, 2306.00978): inputs are divided by a factor per channel, which folds into the norm or up_proj ahead, and
  weights multiplied by it.
- Weights are rounded with their errors made up for (`gptq`). For queries, keys and values a token counts as often as
  others attend to it: an error in the first token's key reaches every token.
- The first and the last layer, whose errors cost most, stay one format above the rest.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lserve.kernels.activation import silu_mul
from lserve.kernels.activation_format import ActivationFormat, quantize_activation
from lserve.kernels.linear import linear
from lserve.kernels.norm import rms_norm
from lserve.kernels.rope import qk_norm_rope, rope
from lserve.kernels.weight_format import W4Weight, W8Weight, quantize_w8

from .config import ModelConfig
from .gptq import gptq_w4, gptq_w8, input_hessian
from .model import Layer
from .quantization import (
    Linear,
    NativeLinear,
    WeightFormat,
    check_widths,
    norm_for,
    quantized_linear,
    silu_mul_for,
)
from .rope import RotaryEmbedding

OUTER_LAYERS: dict[WeightFormat, WeightFormat] = {"w4a8": "int8", "fp8": "native"}
"""What the first and the last layer have instead of a format."""

ACTIVATIONS: dict[WeightFormat, ActivationFormat] = {"fp8": "fp8", "int8": "int8", "w4a8": "int8"}

EXPONENTS = (0.0, 0.5, 0.65, 0.8, 0.9)
"""How much of a channel's range moves from inputs to 8-bit weights; 0 leaves everything as it is."""

W4_EXPONENT = 0.2
"""The same for 4-bit weights, which suffer most themselves: a little, by the mean size of inputs alone."""

SEARCH_TOKENS = 512
"""Inputs on which exponents are compared."""

QUERY_STEP = 8
"""One query in so many is asked what it attends to."""


class Calibration:
    """Quantizes the layers of one model in order; holds the text's hidden states between them."""

    def __init__(self, config: ModelConfig, passages: Tensor, embedding: Tensor, weight_format: WeightFormat) -> None:
        """passages: int64 [P, L] token ids. embedding: [vocab_size, hidden_size] in the compute dtype."""
        self._config, self._format, self._dtype = config, weight_format, embedding.dtype
        self._passages, self._length = passages.shape
        self._hidden = torch.nn.functional.embedding(passages.flatten(), embedding)
        positions = torch.arange(self._length, device=passages.device).repeat(self._passages)
        self._cos, self._sin = RotaryEmbedding(config, embedding.device).tables(positions)
        self._widths = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def quantize(self, layers: Iterator[Layer]) -> Iterator[Layer]:
        """All layers, which must have native weights (in any float dtype), in the weight format, one at a time."""
        outer = OUTER_LAYERS.get(self._format, self._format)
        for index, layer in enumerate(layers):
            yield self._quantize(layer, outer if index in (0, self._config.num_layers - 1) else self._format)

    def _quantize(self, layer: Layer, form: WeightFormat) -> Layer:
        eps, dtype = self._config.rms_norm_eps, self._dtype
        x = rms_norm(self._hidden, layer.input_norm, eps)
        received = self._attention_received(layer, linear(x, _weight(layer.qkv).to(dtype), _bias(layer.qkv, dtype)))
        input_norm, weight = _fold(layer.input_norm, _weight(layer.qkv), self._factors(x, _weight(layer.qkv), form))
        x = rms_norm(self._hidden, input_norm, eps)
        qkv = self._round(x, weight, _bias(layer.qkv, dtype), form, 1 + received)
        attended = self._attend(layer, qkv(norm_for(qkv, self._hidden, input_norm, eps)))
        output = self._round(attended, _weight(layer.output), _bias(layer.output, dtype), form)
        self._hidden = self._hidden + output(attended)

        x = rms_norm(self._hidden, layer.post_norm, eps)
        bias = _bias(layer.gate_up, dtype)
        inner = silu_mul(linear(x, _weight(layer.gate_up).to(dtype), bias))
        inner_factors = self._factors(inner, _weight(layer.down), form)
        post_norm, weight = _fold(
            layer.post_norm, _weight(layer.gate_up), self._factors(x, _weight(layer.gate_up), form)
        )
        rows = torch.cat((torch.ones_like(inner_factors), inner_factors))
        bias = None if bias is None else (bias.float() / rows).to(dtype)
        gate_up = self._round(rms_norm(self._hidden, post_norm, eps), weight / rows[:, None], bias, form)
        gated = gate_up(norm_for(gate_up, self._hidden, post_norm, eps))
        down = self._round(silu_mul(gated), _weight(layer.down) * inner_factors, _bias(layer.down, dtype), form)
        self._hidden = self._hidden + down(silu_mul_for(down, gated))
        return replace(
            layer, input_norm=input_norm, qkv=qkv, output=output, post_norm=post_norm, gate_up=gate_up, down=down
        )

    def _attend(self, layer: Layer, heads: Tensor) -> Tensor:
        """Causal attention within each passage: qkv's output [T, heads x head_dim] to [T, query heads x head_dim]."""
        query, key, value = self._split(layer, heads)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2).flatten(0, 1)

    def _attention_received(self, layer: Layer, heads: Tensor) -> Tensor:
        """How much attention each token gets in its passage, mean over heads: float32 [T]."""
        query, key, _ = self._split(layer, heads)
        group = self._config.num_heads // self._config.num_kv_heads
        queries = torch.arange(QUERY_STEP - 1, self._length, QUERY_STEP, device=heads.device)
        later = torch.arange(self._length, device=heads.device) > queries[:, None]
        received = []
        for q, k in zip(query[:, :, queries], key, strict=True):
            scores = (q @ k.repeat_interleave(group, dim=0).transpose(1, 2)).float() * self._config.head_dim**-0.5
            shares = scores.masked_fill_(later, -torch.inf).softmax(dim=-1)
            received.append(shares.sum(dim=1).mean(dim=0) * QUERY_STEP)
        return torch.cat(received)

    def _split(self, layer: Layer, heads: Tensor) -> list[Tensor]:
        """qkv's output to query, key and value [P, heads, L, head_dim], rotated."""
        heads = heads.view(len(heads), sum(self._widths), self._config.head_dim)
        query, key, value = heads.split_with_sizes(self._widths, dim=1)
        if layer.query_norm is None or layer.key_norm is None:
            query, key = rope(query, key, self._cos, self._sin)
        else:
            eps = self._config.rms_norm_eps
            query, key = qk_norm_rope(query, key, layer.query_norm, layer.key_norm, eps, self._cos, self._sin)
        shape = self._passages, self._length, -1, self._config.head_dim
        return [x.reshape(shape).transpose(1, 2) for x in (query, key, value)]

    def _round(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, form: WeightFormat, counts: Tensor | None = None
    ) -> Linear:
        """weight [N, K] rounded for inputs like x [T, K]; counts [T]: how much each input counts."""
        if form == "native":
            return NativeLinear(weight.to(self._dtype), bias)
        check_widths(weight, form)
        hessian = input_hessian(x, ACTIVATIONS[form], counts)
        rounded: W8Weight | W4Weight
        rounded = gptq_w4(weight, hessian) if form == "w4a8" else gptq_w8(weight, hessian, _code_dtype(form))
        return quantized_linear(rounded, bias, self._dtype)

    def _factors(self, x: Tensor, weight: Tensor, form: WeightFormat) -> Tensor:
        """What to divide each channel of inputs like x [T, K] by, and to multiply weight [N, K] by: float32 [K]."""
        if form == "native":
            return torch.ones(x.shape[1], device=x.device)
        if form == "w4a8":
            return _centred(x.float().abs().mean(dim=0).clamp_(min=1e-5) ** W4_EXPONENT)
        weight = weight.float()
        of_inputs = x.abs().amax(dim=0).float().clamp_(min=1e-5)
        of_weights = weight.abs().amax(dim=0).clamp_(min=1e-5)
        sample = x[:: max(1, len(x) // SEARCH_TOKENS)].float()
        exact = sample @ weight.t()
        best, best_error = torch.ones_like(of_inputs), torch.inf
        for exponent in EXPONENTS:
            factors = _centred(of_inputs**exponent / of_weights ** (1 - exponent)) if exponent else best
            inputs = quantize_activation(sample / factors, ACTIVATIONS[form])
            near = quantize_w8(weight * factors, _code_dtype(form))
            outputs = (inputs.codes.float() @ near.codes.float().t()).mul_(inputs.scale).mul_(near.scale)
            error = outputs.sub_(exact).square_().sum().item()
            if error < best_error:
                best, best_error = factors, error
        return best


def _fold(norm: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weights [K] divided by factors, as its dtype has them, and weight [N, K] times what that comes to."""
    folded = (norm.float() / factors).to(norm.dtype)
    return folded, weight * torch.where(folded == 0, 1.0, norm.float() / folded.float())


def _centred(factors: Tensor) -> Tensor:
    """Factors with geometric mean 1."""
    return factors / factors.log().mean().exp()


def _code_dtype(form: WeightFormat) -> torch.dtype:
    return torch.float8_e4m3fn if form == "fp8" else torch.int8


def _weight(layer: Linear) -> Tensor:
    assert isinstance(layer, NativeLinear)
    return layer.weight


def _bias(layer: Linear, dtype: torch.dtype) -> Tensor | None:
    assert isinstance(layer, NativeLinear)
    return None if layer.bias is None else layer.bias.to(dtype)
