"""Head profiling, second half: the accuracy gate, which finds how many of the ranked heads may stream.

It judges whole profiles by what users notice, on texts and facts that the ranking never saw: the loss on running text,
and answers to questions about planted facts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, nll_loss

from .model import Model
from .profile import ANSWER_ALLOWANCE
from .whole_sequence import Reach, WholeSequence

_Head = TypeVar("_Head")

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
    """A document with planted facts, and questions about them that may follow it, each by itself."""

    token_ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the gate measured of a profile.

    num_streaming: heads. loss_rise: of the documents' tokens, relative to the dense model's; standard_error: of it.
    right, asked: questions. An answer is right when its every token is the most likely one. lost, gained: right answers
    of the dense model only, and of this profile only. answer_loss: nats per answer. answer_divergence: nats per answer
    token from the dense model's distribution.
    """

    num_streaming: int
    loss_rise: float
    standard_error: float
    right: int
    asked: int
    lost: int
    gained: int
    answer_loss: float
    answer_divergence: float


@dataclass(frozen=True, slots=True)
class _Reading:
    """losses: nats per token, float64 [N]. right, answer_losses: per question. answers: log-probabilities of all tokens
    where an answer's stand, [A, vocabulary].
    """

    losses: Tensor
    right: Tensor
    answer_losses: Tensor
    answers: Tensor


class Gate:
    """Measures profiles of one model on documents, against the dense model."""

    def __init__(self, model: Model, documents: Sequence[FactDocument], reach: Reach) -> None:
        self._model, self._documents, self._reach = model, documents, reach
        self._dense = self._read(((False,) * model.config.num_kv_heads,) * model.config.num_layers)

    def measure(self, streaming: Streaming) -> Measurement:
        """Reads all documents with these heads streaming."""
        num_streaming, dense = sum(map(sum, streaming)), self._dense
        ours = self._read(streaming) if num_streaming else dense
        rise, loss = ours.losses - dense.losses, dense.losses.mean().item()
        return Measurement(
            num_streaming=num_streaming,
            loss_rise=rise.mean().item() / loss,
            standard_error=rise.std().item() / math.sqrt(rise.numel()) / loss,
            right=int(ours.right.sum()),
            asked=ours.right.numel(),
            lost=int((dense.right & ~ours.right).sum()),
            gained=int((ours.right & ~dense.right).sum()),
            answer_loss=ours.answer_losses.mean().item(),
            answer_divergence=kl_div(ours.answers, dense.answers, log_target=True, reduction="batchmean").item(),
        )

    @torch.inference_mode()
    def _read(self, streaming: Streaming) -> _Reading:
        losses, right, answer_losses, answers = [], [], [], []
        for document in self._documents:
            attend = WholeSequence(streaming, self._reach, self._model.config.head_dim**-0.5, keep=True)
            losses.append(self._losses(document.token_ids, self._run(document.token_ids, 0, attend)))
            for question in document.questions:
                token_ids = (*question.token_ids, *question.answer)
                hidden = self._run(token_ids, len(document.token_ids), attend.continuation())
                log_probs = self._model.logits(hidden[-len(question.answer) - 1 : -1]).log_softmax(-1)
                answer = torch.tensor(question.answer, device=log_probs.device)
                right.append(bool((log_probs.argmax(-1) == answer).all()))
                answer_losses.append(nll_loss(log_probs, answer, reduction="sum").item())
                answers.append(log_probs)
        return _Reading(torch.cat(losses), torch.tensor(right), torch.tensor(answer_losses), torch.cat(answers))

    def _losses(self, token_ids: Sequence[int], hidden: Tensor) -> Tensor:
        """Nats of each token for which a streaming head misses something: those past sink and window."""
        first = self._reach.sink_size + self._reach.local_window
        targets = torch.tensor(token_ids[first:], device=hidden.device)
        losses = []
        for start in range(0, targets.numel(), ROWS):
            target = targets[start : start + ROWS]
            logits = self._model.logits(hidden[first - 1 + start :][: target.numel()])
            losses.append(cross_entropy(logits, target, reduction="none"))
        return torch.cat(losses).double()

    def _run(self, token_ids: Sequence[int], start: int, attend: WholeSequence) -> Tensor:
        device = self._model.device
        positions = torch.arange(start, start + len(token_ids), device=device)
        return self._model.forward(torch.tensor(token_ids, device=device), positions, attend)


def within(measured: Measurement, max_loss: float) -> bool:
    """Whether loss and recall stay within the relative loss that is allowed.

    Answers near the edge flip either way, whatever streams: recall counts as lost when more of them went wrong, net,
    than is allowed and two standard deviations of such flips explain; or when the distributions that answers are drawn
    from have moved too far, which shows with few questions too.
    """
    chance = 2 * math.sqrt(measured.lost + measured.gained)
    recall_holds = measured.lost - measured.gained <= max_loss * measured.asked + chance
    return measured.loss_rise <= max_loss and recall_holds and measured.answer_divergence <= ANSWER_ALLOWANCE


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


def with_more(chosen: list[_Head], further: Sequence[_Head], passes: Callable[[list[_Head]], bool]) -> list[_Head]:
    """The chosen, and of the further ones each that passes beside all who are in already."""
    for head in further:
        if passes([*chosen, head]):
            chosen = [*chosen, head]
    return chosen
