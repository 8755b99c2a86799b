"""The search of `lserve profile`: measure the heads, rank them, and ask the gate how many may stream."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from lserve.engine.head_profile import HeadProfile, Matrix
from lserve.engine.model import Model
from lserve.engine.profile import HeadMeasures, HeadScorer, rank, streaming_heads
from lserve.engine.profile_gate import Gate, Measurement, largest_passing, with_more, within
from lserve.engine.profile_optimize import GateOptimizer
from lserve.engine.whole_sequence import Reach

from .profile_state import ProfileState
from .profile_texts import ProfileTexts

OPTIMIZER_STEPS = 40

SECOND_CHANCES = 2
"""Heads further down the ranking that are tried one by one, once the next one fails: costs add up only nearly."""

TOO_MUCH = 0.5
"""Cost past which a head is a retrieval head for certain: it alone would use up half of what is allowed. Lower, and one
answer that a head moves would rule it out.
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What the search gave.

    measures, scores: per head. gates: where they were optimised. measurements: of every profile tried, by number of
    streaming heads, dense first. chosen, streaming: the profile that the gate let pass.
    """

    measures: tuple[tuple[HeadMeasures, ...], ...]
    scores: Matrix
    gates: Matrix | None
    measurements: tuple[Measurement, ...]
    chosen: Measurement
    streaming: tuple[tuple[bool, ...], ...]

    @property
    def dense(self) -> Measurement:
        """Of the profile without streaming heads."""
        return self.measurements[0]


class Search:
    """One search over one model. What is measured is kept in the state, and taken from it."""

    def __init__(
        self,
        model: Model,
        texts: ProfileTexts,
        reach: Reach,
        max_loss: float,
        seed: int,
        state: ProfileState,
        progress: Progress,
    ) -> None:
        self._model, self._texts, self._reach, self._max_loss, self._seed = model, texts, reach, max_loss, seed
        self._state, self._progress = state, progress
        self._shape = model.config.num_layers, model.config.num_kv_heads
        self._gate: Gate | None = None

    def run(self, optimize: bool) -> Found:
        """Everything, in order."""
        dense_loss = self._measure_heads()
        num_layers, num_kv_heads = self._shape
        num_texts = len(self._texts.calibration)
        measures = tuple(
            tuple(self._mean(layer, head, num_texts) for head in range(num_kv_heads)) for layer in range(num_layers)
        )
        scores = tuple(
            tuple(float(f"{head.cost(dense_loss, self._max_loss):.4g}") for head in layer) for layer in measures
        )
        ranking = rank(scores)
        guess = expected_count(scores, ranking)
        gates = None
        if optimize:
            gates = self._optimize(scores[ranking[guess - 1][0]][ranking[guess - 1][1]])
            ranking = sorted(ranking, key=lambda at: gates[at[0]][at[1]])  # equal gates stay in order of their scores
        measured: dict[tuple[tuple[int, int], ...], Measurement] = {(): self._try([])}

        def passes(heads: Sequence[tuple[int, int]]) -> bool:
            measured[tuple(heads)] = self._try(heads)
            return within(measured[tuple(heads)], self._max_loss)

        count = largest_passing(len(ranking), guess, lambda count: passes(ranking[:count]))
        chosen = with_more(ranking[:count], ranking[count + 1 : count + 1 + SECOND_CHANCES], passes)
        in_order = tuple(sorted(measured.values(), key=lambda measurement: measurement.num_streaming))
        streaming = streaming_heads(chosen, *self._shape)
        return Found(measures, scores, gates, in_order, measured[tuple(chosen)], streaming)

    def _measure_heads(self) -> float:
        """Fills the state's measures; returns the dense loss of the texts."""
        num_layers, num_kv_heads = self._shape
        texts, losses = self._texts.calibration, []
        bar = self._progress.add_task("measuring heads", total=len(texts) * num_layers * num_kv_heads)
        for number, text in enumerate(texts):
            scorer = HeadScorer(self._model, text, self._reach, self._seed)
            losses.append(scorer.dense_loss)
            for layer in range(num_layers):
                heads = [head for head in range(num_kv_heads) if self._may_stream(number, layer, head, losses)]
                if (number, layer) in self._state.measures or not heads:
                    scorer.skip()
                else:
                    self._state.add_layer(number, layer, scorer.next_layer(heads))
                self._progress.advance(bar, num_kv_heads)
        return sum(losses) / len(losses)

    def _may_stream(self, number: int, layer: int, head: int, losses: Sequence[float]) -> bool:
        """Whether the texts before this one leave it open; no more time is spent on certain retrieval heads."""
        if number == 0:
            return True
        return self._mean(layer, head, number).cost(sum(losses) / len(losses), self._max_loss) < TOO_MUCH

    def _mean(self, layer: int, head: int, num_texts: int) -> HeadMeasures:
        """Over those of the first texts that the head was measured on."""
        texts = [self._state.measures.get((text, layer), {}) for text in range(num_texts)]
        return HeadMeasures.mean([heads[head] for heads in texts if head in heads])

    def _optimize(self, marginal_cost: float) -> Matrix:
        """Gates after training, from the state when it has them."""
        if self._state.gates is None:
            bar = self._progress.add_task("optimising gates", total=OPTIMIZER_STEPS)
            texts = self._texts.calibration
            optimizer = GateOptimizer(self._model, texts, self._reach, self._max_loss, marginal_cost, self._seed)
            for _ in range(OPTIMIZER_STEPS):
                optimizer.step()
                self._progress.advance(bar)
            self._state.set_gates(optimizer.gates.tolist())
        assert self._state.gates is not None
        return tuple(map(tuple, self._state.gates))

    def _try(self, heads: Sequence[tuple[int, int]]) -> Measurement:
        """The gate's measurement of these heads streaming."""
        streaming = streaming_heads(heads, *self._shape)
        digest = HeadProfile("", self._reach.sink_size, self._reach.local_window, streaming).digest
        if digest not in self._state.measured:
            bar = self._progress.add_task(f"trying {len(heads)} streaming heads", total=1)
            if self._gate is None:
                self._gate = Gate(self._model, self._texts.documents, self._reach)
            self._state.add_measurement(digest, self._gate.measure(streaming))
            self._progress.advance(bar)
        return self._state.measured[digest]


def expected_count(scores: Matrix, ranking: Sequence[tuple[int, int]]) -> int:
    """How many heads use up what is allowed if costs add up, which they nearly do; at least one."""
    total = 0.0
    for number, (layer, head) in enumerate(ranking):
        total += scores[layer][head]
        if total > 1:
            return max(number, 1)
    return len(ranking)
