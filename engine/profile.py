"""Head profiling, first half: what each KV head's history is worth. The second half is `profile_gate`.

A text with planted facts runs through the model once. Then its last part, which ends by asking for the facts, runs
again and again behind the rest as it was, each time with one head streaming and all the others as they were; what that
changes is measured on running text and at the answers. No training; only the layers from the head's own on are
computed again.

Heads are ranked by how far the predicted distributions move (Kullback-Leibler divergence from the dense model's), not
by the loss itself: a few hundred tokens rank heads by divergence as thousands do, while the change of the loss is
mostly noise at any affordable length (on SmolLM2-135M with 30 % of the heads streaming: +0.14 % bits per character
ranked by divergence, +0.20 % by the change of the layer's output, +0.96 % by the change of the loss, from the same
texts). And divergences add up: of 27 to 45 heads together, the sum over the heads is within a fifth of the whole. But
those at answers are mostly those of a few answers: it takes a hundred questions to tell a head that moves none from one
that moves one of fifty.
"""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from .model import Model
from .whole_sequence import Reach, WholeSequence

RECOMPUTED = 192
"""Tokens of running text, the last ones, that are computed again for each head."""

NUM_POSITIONS = 128
"""How many of them heads are measured on: twice as many rank the heads little better."""

ANSWER_ALLOWANCE = 0.0075
"""Divergence per answer token, in nats, that counts as all that is allowed, of one head as of a whole profile."""


@dataclass(frozen=True, slots=True)
class PlantedText:
    """Calibration text. running: indices of its running text. answers: indices of the tokens that only a planted fact
    tells. mentions: for each answer token, the range of indices where its fact stands for the first time.
    """

    token_ids: tuple[int, ...]
    running: range
    answers: tuple[int, ...]
    mentions: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class HeadMeasures:
    """What changes when one head sees only sink and window; means over tokens.

    text_divergence, answer_divergence: nats from the dense model's distribution, on running text and at answers.
    text_loss, answer_loss: rise of the loss there, in nats. output_change: of the head's attention output, relative.
    fact_mass: attention that the dense head sends from answers back to where the fact was first told.
    """

    text_divergence: float
    answer_divergence: float
    text_loss: float
    answer_loss: float
    output_change: float
    fact_mass: float

    @classmethod
    def mean(cls, measures: Sequence["HeadMeasures"]) -> "HeadMeasures":
        """Of one head over several texts."""
        return cls(*(sum(values) / len(measures) for values in zip(*map(astuple, measures), strict=True)))

    def cost(self, dense_loss: float, max_loss: float) -> float:
        """How much of what is allowed the head alone uses up, 1 being all of it: the score that ranks heads.

        dense_loss: nats per token of running text. max_loss: the relative rise of it that is allowed.
        """
        return self.text_divergence / (dense_loss * max_loss) + self.answer_divergence / ANSWER_ALLOWANCE


def predicted_tokens(text: PlantedText, reach: Reach, seed: int) -> tuple[Tensor, int]:
    """Indices of the tokens that heads are measured on, int64: some of the running text, then the answers.

    The second result is how many are running text: near its end, past sink and window. Which ones follows from the
    seed.
    """
    first = max(reach.sink_size + reach.local_window, text.running.stop - RECOMPUTED + 1)
    far = torch.arange(first, text.running.stop)
    order = torch.randperm(far.numel(), generator=torch.Generator().manual_seed(seed))
    chosen = far[order[:NUM_POSITIONS]].sort().values
    return torch.cat((chosen, torch.tensor(text.answers))), chosen.numel()


class HeadScorer:
    """Measures the heads of one model on one text, layer by layer from the first.

    dense_loss: nats per token of the running text measured on. Which tokens those are follows from the seed.
    """

    def __init__(self, model: Model, text: PlantedText, reach: Reach, seed: int) -> None:
        config, device = model.config, model.device
        self._model, self._text, self._reach = model, text, reach
        predicted, self._num_running = predicted_tokens(text, reach, seed)
        self._start = max(text.running.stop - RECOMPUTED, 0)
        self._rows = (predicted - 1 - self._start).to(device)
        token_ids = torch.tensor(text.token_ids, device=device)
        self._targets = token_ids[predicted.to(device), None]
        self._positions = torch.arange(token_ids.numel(), device=device)
        self._dense = ((False,) * config.num_kv_heads,) * config.num_layers
        self._before = WholeSequence(self._dense, reach, config.head_dim**-0.5, keep=True)
        with torch.inference_mode():
            if self._start:
                model.forward(token_ids[: self._start], self._positions[: self._start], self._before)
            self._hidden = model.embed(token_ids[self._start :])
            self._layer = 0
            hidden, _ = self._run(range(config.num_layers), None)
            self._log_probs = self._predict(hidden)
            self.dense_loss = -self._log_probs.gather(1, self._targets)[: self._num_running].mean().item()

    def skip(self) -> None:
        """Passes over the next layer."""
        self._hidden, _ = self._run(range(self._layer, self._layer + 1), None)
        self._layer += 1

    @torch.inference_mode()
    def next_layer(self, heads: Collection[int]) -> dict[int, HeadMeasures]:
        """Measures some heads of the next layer."""
        config = self._model.config
        after, dense = self._run(range(self._layer, self._layer + 1), None)
        mass = self._fact_mass(dense.query, dense.key)
        measures = {}
        for head in heads:
            hidden, streaming = self._run(range(self._layer, config.num_layers), head)
            log_probs = self._predict(hidden)
            divergence = kl_div(log_probs, self._log_probs, log_target=True, reduction="none").sum(-1)
            loss = (self._log_probs - log_probs).gather(1, self._targets)[:, 0]
            change = (streaming.out[:, head] - dense.out[:, head]).norm(dim=-1) / dense.out[:, head].norm(dim=-1)
            running, answers = slice(self._num_running), slice(self._num_running, None)
            measures[head] = HeadMeasures(
                text_divergence=_mean(divergence[running]),
                answer_divergence=_mean(divergence[answers]),
                text_loss=_mean(loss[running]),
                answer_loss=_mean(loss[answers]),
                output_change=_mean(change),
                fact_mass=mass[head],
            )
        self._hidden, self._layer = after, self._layer + 1
        return measures

    @torch.inference_mode()
    def _run(self, layers: range, streaming_head: int | None) -> tuple[Tensor, "_Seen"]:
        """Hidden states after the layers, where one head of the first streams; and what that layer's attention did."""
        streaming = [list(flags) for flags in self._dense]
        if streaming_head is not None:
            streaming[layers.start][streaming_head] = True
        seen = _Seen(self._before.continuation(streaming), layers.start, self._rows)
        return self._model.run_layers(self._hidden, self._positions[self._start :], seen, layers), seen

    def _predict(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden[self._rows]).log_softmax(-1)

    def _fact_mass(self, query: Tensor, key: Tensor) -> list[float]:
        """Per KV head, mean over its query heads and the answer tokens."""
        rows, num_kv_heads, head_dim = self._rows[self._num_running :], key.shape[1], key.shape[2]
        grouped = query[rows].float().view(rows.numel(), num_kv_heads, -1, head_dim) * head_dim**-0.5
        logits = torch.einsum("mhgd,nhd->hgmn", grouped, key.float())
        later = self._positions > self._start + rows[:, None]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        told = [weights[:, :, i, m.start : m.stop].sum(-1).mean(1) for i, m in enumerate(self._text.mentions)]
        means: list[float] = torch.stack(told).mean(0).tolist()
        return means


class _Seen:
    """Attention that keeps what passed in one layer: query, all keys, and rows of its output [R, Hkv, G x D]."""

    query: Tensor
    key: Tensor
    out: Tensor

    def __init__(self, attend: WholeSequence, layer: int, rows: Tensor) -> None:
        self._attend, self._layer, self._rows = attend, layer, rows

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = self._attend(layer, query, key, value)
        if layer == self._layer:
            before = self._attend.history.get(layer)
            self.query, self.key = query, key if before is None else torch.cat((before[0], key))
            self.out = out[self._rows].float().view(self._rows.numel(), key.shape[1], -1)
        return out


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def rank(costs: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(layer, KV head) of all heads, the cheapest to turn into a streaming head first. costs: [layers][KV heads]."""
    heads = [(layer, head) for layer, row in enumerate(costs) for head in range(len(row))]
    return sorted(heads, key=lambda at: (costs[at[0]][at[1]], at))


def streaming_heads(
    heads: Sequence[tuple[int, int]], num_layers: int, num_kv_heads: int
) -> tuple[tuple[bool, ...], ...]:
    """These (layer, KV head) as a head profile has them."""
    chosen = set(heads)
    return tuple(tuple((layer, head) in chosen for head in range(num_kv_heads)) for layer in range(num_layers))
