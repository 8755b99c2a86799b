"""Head profiling, second half: the accuracy gate, which finds how many of the ranked heads may stream.

It judges whole profiles by what users notice, on texts and facts that the ranking never saw: the loss on running text,
and answers to questions about planted facts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Model
from .whole_sequence import Reach, WholeSequence

ROWS = 512
"""Hidden states that become logits at once."""

Streaming = Sequence[Sequence[bool]]
"""[layers][KV heads]: whether the head streams."""


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids that follow a document's, up to the answer; and the answer's."""

    token_ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FactDocument:
    """A document with planted facts, and questions about them. Right answers' tokens are all the top ones."""

    token_ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the gate measured of a profile.

    num_streaming: heads. loss_rise: of the loss on running text, relative to the dense model's; standard_error: of it.
    right, asked: questions about planted facts. answer_loss: nats per answer.
    """

    num_streaming: int
    loss_rise: float
    standard_error: float
    right: int
    asked: int
    answer_loss: float


class Gate:
    """Measures profiles of one model against the dense model."""

    def __init__(
        self, model: Model, passages: Sequence[Sequence[int]], documents: Sequence[FactDocument], reach: Reach
    ) -> None:
        self._model, self._reach = model, reach
        self._passages, self._documents = passages, documents
        config = model.config
        self._dense = [self._losses(p, ((False,) * config.num_kv_heads,) * config.num_layers) for p in passages]

    def measure(self, streaming: Streaming) -> Measurement:
        """Runs all texts with these heads streaming."""
        rises = [self._losses(p, streaming) - dense for p, dense in zip(self._passages, self._dense, strict=True)]
        rise, dense = torch.cat(rises), torch.cat(self._dense).mean().item()
        answers = [answer for document in self._documents for answer in self._answers(document, streaming)]
        return Measurement(
            num_streaming=sum(map(sum, streaming)),
            loss_rise=rise.mean().item() / dense,
            standard_error=rise.std().item() / math.sqrt(rise.numel()) / dense,
            right=sum(right for right, _ in answers),
            asked=len(answers),
            answer_loss=sum(loss for _, loss in answers) / max(len(answers), 1),
        )

    @torch.inference_mode()
    def _losses(self, passage: Sequence[int], streaming: Streaming) -> Tensor:
        """Nats of each token for which a streaming head misses something: those past sink and window."""
        hidden = self._run(passage, 0, self._attend(streaming))
        first = self._reach.sink_size + self._reach.local_window
        targets = torch.tensor(passage[first:], device=self._model.device)
        losses = []
        for start in range(0, targets.numel(), ROWS):
            target = targets[start : start + ROWS]
            logits = self._model.logits(hidden[first - 1 + start :][: target.numel()])
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        return torch.cat(losses).double()

    @torch.inference_mode()
    def _answers(self, document: FactDocument, streaming: Streaming) -> Iterator[tuple[bool, float]]:
        """Per question, whether the answer is right, and its loss. The document is read once."""
        attend = self._attend(streaming, keep=True)
        self._run(document.token_ids, 0, attend)
        for question in document.questions:
            token_ids = (*question.token_ids, *question.answer)
            hidden = self._run(token_ids, len(document.token_ids), attend.continuation())
            logits = self._model.logits(hidden[-len(question.answer) - 1 : -1])
            answer = torch.tensor(question.answer, device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
            yield bool((logits.argmax(-1) == answer).all()), loss.item()

    def _attend(self, streaming: Streaming, keep: bool = False) -> WholeSequence:
        return WholeSequence(streaming, self._reach, self._model.config.head_dim**-0.5, keep)

    def _run(self, token_ids: Sequence[int], start: int, attend: WholeSequence) -> Tensor:
        device = self._model.device
        positions = torch.arange(start, start + len(token_ids), device=device)
        return self._model.forward(torch.tensor(token_ids, device=device), positions, attend)


def within(measured: Measurement, dense: Measurement, max_loss: float) -> bool:
    """Whether loss and recall stay within the relative loss that is allowed."""
    return measured.loss_rise <= max_loss and measured.right >= dense.right * (1 - max_loss)


def largest_passing(num_heads: int, guess: int, passes: Callable[[int], bool]) -> int:
    """The most heads that pass, by bisection: passes(0) is taken for granted, and more heads for no better than fewer.

    guess: where to look first; the search leaves its neighbourhood in growing steps.
    """
    low, high = 0, num_heads + 1
    step = max(num_heads // 12, 1)
    probe = min(max(guess, 1), num_heads)
    while high - low > 1:
        if passes(probe):
            low = probe
        else:
            high = probe
        middle = (low + high) // 2
        probe, step = min(max(middle, probe - step), probe + step), 2 * step
    return low
