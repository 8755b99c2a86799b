"""Head gates: between full and streaming attention, trained towards the heads that are not needed."""

from typing import Any

import pytest
import torch
from test_profile import DENSE, REACH, TEXT
from tiny_engines import MIXED

from lserve.engine.model import Model
from lserve.engine.profile import HeadScorer
from lserve.engine.profile_optimize import GateOptimizer, gated_forward
from lserve.engine.whole_sequence import WholeSequence


@pytest.mark.parametrize("streaming", [DENSE, MIXED])
def test_gates_of_0_and_1_are_streaming_and_retrieval_heads(tiny: tuple[Model, Any], streaming: Any) -> None:
    model, ids = tiny[0], torch.tensor(TEXT.token_ids)
    gates = 1 - torch.tensor(streaming, dtype=torch.float32)
    expected = model.forward(ids, torch.arange(len(ids)), WholeSequence(streaming, REACH, 0.25))
    torch.testing.assert_close(gated_forward(model, ids, gates, REACH), expected, atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_the_cost(tiny: tuple[Model, Any]) -> None:
    optimizer = GateOptimizer(tiny[0], [TEXT], REACH, 0.003, 0.0, 0)
    sample, gates = optimizer._samples[0], optimizer.gates
    with torch.no_grad():
        gates.fill_(0.5)
    optimizer.cost(sample).backward()
    for at in ((0, 0), (1, 1), (2, 0)):
        costs = []
        for moved in (0.52, 0.48):
            with torch.no_grad():
                gates.fill_(0.5)[at] = moved
                costs.append(optimizer.cost(sample).item())
        assert gates.grad[at].item() == pytest.approx((costs[0] - costs[1]) / 0.04, rel=0.05)


def test_heads_below_the_marginal_cost_give_in_and_others_stay(tiny: tuple[Model, Any]) -> None:
    scorer = HeadScorer(tiny[0], TEXT, REACH, 0)
    costs = [[m.cost(scorer.dense_loss, 0.003) for m in scorer.next_layer((0, 1)).values()] for _ in range(3)]
    in_order = sorted(cost for row in costs for cost in row)
    optimizer = GateOptimizer(tiny[0], [TEXT], REACH, 0.003, (in_order[2] + in_order[3]) / 2, 0)
    spent = [optimizer.step() for _ in range(40)]
    assert spent[0] == pytest.approx(0, abs=1e-3)
    assert spent[-1] > 0
    assert 0 <= optimizer.gates.min() < 0.1 and 0.2 < optimizer.gates.max() <= 1
    cheapest = {(i, j) for i in range(3) for j in range(2) if costs[i][j] <= in_order[0]}
    assert all(optimizer.gates[at] < 0.3 for at in cheapest)
