"""Gate optimisation, as in DuoAttention (arXiv 2410.10819): all heads are weighed against each other at once.

Each KV head gets a gate between 1 (its full attention) and 0 (sink and window only), and mixes the two outputs. The
gates alone are trained: to stay close to the dense model, and to be small. A head whose gate stays high is needed also
when the others stream, which measuring it alone cannot tell.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from .errors import SettingsError
from .model import Layer, Model
from .profile import ANSWER_ALLOWANCE, PlantedText, predicted_tokens
from .quantization import Linear, NativeLinear
from .rope import RotaryEmbedding
from .whole_sequence import Reach, dense_attention, streaming_attention

LEARNING_RATE = 0.05


class GateOptimizer:
    """Trains the gates of one model on calibration texts, one text a step.

    gates: float32 [layers, KV heads], all 1 at first. marginal_cost: cost (HeadMeasures.cost) of a head that may or may
    not stream: the pull towards 0 is such that heads that cost less give in.
    """

    def __init__(
        self, model: Model, texts: Sequence[PlantedText], reach: Reach, max_loss: float, marginal_cost: float, seed: int
    ) -> None:
        if not all(isinstance(layer.qkv, NativeLinear) for layer in model.weights.layers):
            raise SettingsError("head gates can be optimised only with weights: native")
        self._model, self._reach, self._max_loss = model, reach, max_loss
        # a gate g of a head that costs c alone costs about c (1 - g)^2: at a pull of 2 c the optimum is g = 0
        self._pull = 2 * marginal_cost
        self._samples = [_Sample(model, text, reach, seed) for text in texts]
        config = model.config
        self.gates = torch.ones(config.num_layers, config.num_kv_heads, device=model.device, requires_grad=True)
        self._adam = torch.optim.Adam([self.gates], lr=LEARNING_RATE)
        self._steps = 0

    def step(self) -> float:
        """One step; returns what the gates cost before it, 1 being all that is allowed."""
        sample = self._samples[self._steps % len(self._samples)]
        self._steps += 1
        cost = self.cost(sample)
        self._adam.zero_grad()
        (cost + self._pull * self.gates.sum()).backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        return cost.item()

    def cost(self, sample: "_Sample") -> Tensor:
        """What the gates cost on one text, differentiable in them."""
        log_probs = sample.predict(self._model, gated_forward(self._model, sample.token_ids, self.gates, self._reach))
        divergence = kl_div(log_probs, sample.log_probs, log_target=True, reduction="none").sum(-1)
        running, answers = divergence[: sample.num_running].mean(), divergence[sample.num_running :].mean()
        return running / (sample.dense_loss * self._max_loss) + answers / ANSWER_ALLOWANCE


class _Sample:
    """A text on the device, and what the dense model predicts where it is measured."""

    def __init__(self, model: Model, text: PlantedText, reach: Reach, seed: int) -> None:
        predicted, self.num_running = predicted_tokens(text, reach, seed)
        self.token_ids = torch.tensor(text.token_ids, device=model.device)
        self._rows = (predicted - 1).to(model.device)
        gates = torch.ones(model.config.num_layers, model.config.num_kv_heads, device=model.device)
        with torch.no_grad():
            self.log_probs = self.predict(model, gated_forward(model, self.token_ids, gates, reach))
        targets = self.token_ids[predicted.to(model.device), None]
        self.dense_loss = -self.log_probs.gather(1, targets)[: self.num_running].mean().item()

    def predict(self, model: Model, hidden: Tensor) -> Tensor:
        """Log-probabilities where the text is measured."""
        weights = model.weights
        normalized = rms_norm(hidden[self._rows], hidden.shape[-1:], weights.final_norm, model.config.rms_norm_eps)
        return _project(weights.head, normalized).float().log_softmax(-1)


def gated_forward(model: Model, token_ids: Tensor, gates: Tensor, reach: Reach) -> Tensor:
    """Hidden states [T, hidden_size] as Model.forward's, in operations that autograd knows; a layer is kept at a time.

    gates: [layers, KV heads].
    """
    rotary = RotaryEmbedding(model.config, model.device)
    cos, sin = rotary.tables(torch.arange(token_ids.numel(), device=model.device))
    if cos.shape[-1] != model.config.head_dim:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    hidden = model.embed(token_ids)
    for layer, row in zip(model.weights.layers, gates, strict=True):
        forward: Callable[..., Tensor] = _gated_layer
        hidden = checkpoint(forward, model, layer, hidden, cos, sin, row, reach, use_reentrant=False)
    return hidden


def _gated_layer(
    model: Model, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor, gates: Tensor, reach: Reach
) -> Tensor:
    config, num_tokens = model.config, hidden.shape[0]
    eps, scale, width = config.rms_norm_eps, config.head_dim**-0.5, hidden.shape[-1:]
    heads = _project(layer.qkv, rms_norm(hidden, width, layer.input_norm, eps)).view(num_tokens, -1, config.head_dim)
    query, key, value = heads.split_with_sizes([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
    if layer.query_norm is not None and layer.key_norm is not None:
        query = rms_norm(query, query.shape[-1:], layer.query_norm, eps)
        key = rms_norm(key, key.shape[-1:], layer.key_norm, eps)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    full = dense_attention(query, key, value, scale)
    near = streaming_attention(query, key, value, scale, reach)
    mixed = near + gates.to(full.dtype).repeat_interleave(config.group_size)[:, None] * (full - near)
    hidden = hidden + _project(layer.output, mixed.reshape(num_tokens, -1))
    gate, up = _project(layer.gate_up, rms_norm(hidden, width, layer.post_norm, eps)).chunk(2, -1)
    return hidden + _project(layer.down, silu(gate) * up)


def _project(layer: Linear, x: Tensor) -> Tensor:
    assert isinstance(layer, NativeLinear)
    return linear(x, layer.weight, layer.bias)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.float().chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (torch.cat((first, second), -1) * cos[:, None] + turned * sin[:, None]).to(heads.dtype)
