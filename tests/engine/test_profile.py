"""What a head's history is worth is measured on that head alone, and equals what whole forwards say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_engines import tokens

from lserve.engine.model import Model
from lserve.engine.profile import ANSWER_ALLOWANCE, HeadMeasures, HeadScorer, PlantedText, rank, streaming_heads
from lserve.engine.whole_sequence import Reach, WholeSequence

REACH = Reach(64, 128)
TEXT = PlantedText(tokens(500), range(480), (490, 491, 499), (range(20, 30), range(20, 30), range(40, 44)))
DENSE = ((False, False),) * 3


def log_probs(model: Model, streaming: Any, rows: torch.Tensor, start: int) -> torch.Tensor:
    """Of a sequence in which heads stream from position start on."""
    ids, positions, attend = torch.tensor(TEXT.token_ids), torch.arange(500), WholeSequence(DENSE, REACH, 0.25, True)
    before = model.forward(ids[:start], positions[:start], attend) if start else model.embed(ids[:0])
    after = model.forward(ids[start:], positions[start:], attend.continuation(streaming))
    return model.logits(torch.cat((before, after))[rows]).log_softmax(-1)


def measured(model: Model, seed: int = 0) -> list[dict[int, HeadMeasures]]:
    scorer = HeadScorer(model, TEXT, REACH, seed)
    return [scorer.next_layer((0, 1)) for _ in range(3)]


@pytest.mark.parametrize(("recomputed", "start"), [(480, 0), (200, 280)])
def test_measures_are_those_of_whole_forwards(
    tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch, recomputed: int, start: int
) -> None:
    monkeypatch.setattr("lserve.engine.profile.RECOMPUTED", recomputed)
    monkeypatch.setattr("lserve.engine.profile.NUM_POSITIONS", 500)
    model, answers = tiny[0], torch.tensor(TEXT.answers)
    running = torch.arange(max(192, start + 1), 480)  # all that is past sink and window
    scorer = HeadScorer(model, TEXT, REACH, 0)
    for layer in range(3):
        for head, measures in scorer.next_layer((0, 1)).items():
            streaming = [list(flags) for flags in DENSE]
            streaming[layer][head] = True
            for where, divergence, loss in (
                (running, measures.text_divergence, measures.text_loss),
                (answers, measures.answer_divergence, measures.answer_loss),
            ):
                ours, dense = (log_probs(model, flags, where - 1, start) for flags in (streaming, DENSE))
                assert divergence == pytest.approx((dense.exp() * (dense - ours)).sum(-1).mean().item(), abs=1e-5)
                targets = torch.tensor(TEXT.token_ids)[where, None]
                assert loss == pytest.approx((dense - ours).gather(1, targets).mean().item(), abs=1e-5)
            assert measures.text_divergence > 0 and measures.output_change > 0
            assert 0 < measures.fact_mass < 1
    dense_loss = (
        -log_probs(model, DENSE, running - 1, start).gather(1, torch.tensor(TEXT.token_ids)[running, None]).mean()
    )
    assert scorer.dense_loss == pytest.approx(dense_loss.item(), abs=1e-5)


def test_layers_and_heads_can_be_passed_over(tiny: tuple[Model, Any]) -> None:
    scorer, expected = HeadScorer(tiny[0], TEXT, REACH, 0), measured(tiny[0])
    scorer.skip()
    assert [scorer.next_layer((1,)), scorer.next_layer((0, 1))] == [{1: expected[1][1]}, expected[2]]


def test_the_seed_decides(tiny: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lserve.engine.profile.NUM_POSITIONS", 20)
    assert measured(tiny[0], 1) == measured(tiny[0], 1) != measured(tiny[0], 2)


def test_heads_are_ranked_by_what_they_use_up() -> None:
    quiet = HeadMeasures(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert replace(quiet, text_divergence=0.006).cost(dense_loss=2.0, max_loss=0.003) == pytest.approx(1)
    assert replace(quiet, answer_divergence=ANSWER_ALLOWANCE).cost(2.0, 0.003) == pytest.approx(1)
    ranking = rank([[0.3, 0.1], [0.1, 0.2]])
    assert ranking == [(0, 1), (1, 0), (1, 1), (0, 0)]
    assert streaming_heads(ranking[:2], 2, 2) == ((False, True), (True, False))


def test_several_texts_count_alike() -> None:
    one, two = HeadMeasures(1, 2, 3, 4, 5, 6), HeadMeasures(3, 2, 1, 0, 1, 2)
    assert HeadMeasures.mean([one, two]) == HeadMeasures(2, 2, 2, 2, 3, 4)
