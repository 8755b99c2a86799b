"""The fast path of head profiling computes what the engine computes."""

from typing import Any

import pytest
import torch
from tiny_engines import MIXED, SPARSITY, Draws, make_engine, request, run, tokens

from lserve.engine.model import Model
from lserve.engine.whole_sequence import BLOCK, Reach, WholeSequence, dense_attention, streaming_attention

REACH = Reach(SPARSITY.sink_size, SPARSITY.local_window)


def forward(model: Model, token_ids: tuple[int, ...], attend: WholeSequence, start: int = 0) -> torch.Tensor:
    positions = torch.arange(start, start + len(token_ids))
    return model.forward(torch.tensor(token_ids), positions, attend)


@pytest.mark.parametrize("streaming", [MIXED, ((False, False),) * 3, ((True, True),) * 3])
def test_logits_are_the_engines(tiny: tuple[Model, Any], draws: Draws, streaming: tuple[tuple[bool, ...], ...]) -> None:
    engine, _ = make_engine(tiny[0], streaming=streaming)
    asked = request(tokens(700), 40)
    answer = run(engine, [asked])[asked.request_id, 0].token_ids
    model = tiny[0]
    hidden = forward(model, (*asked.prompt_token_ids, *answer), WholeSequence(streaming, REACH, 0.25))
    for position, logits in draws.of(asked).items():
        torch.testing.assert_close(logits, model.logits(hidden[position - 1 : position])[0], atol=1e-3, rtol=0)


def test_a_continuation_is_the_rest_of_the_sequence(tiny: tuple[Model, Any]) -> None:
    model, prompt = tiny[0], tokens(600)
    whole = forward(model, prompt, WholeSequence(MIXED, REACH, 0.25))
    first = WholeSequence(MIXED, REACH, 0.25, keep=True)
    forward(model, prompt[:450], first)
    for _ in range(2):  # what one continuation reads, the next does not see
        rest = forward(model, prompt[450:], first.continuation(), 450)
        torch.testing.assert_close(rest, whole[450:], atol=1e-4, rtol=0)


def test_layers_can_be_run_in_parts(tiny: tuple[Model, Any]) -> None:
    model, prompt = tiny[0], tokens(300)
    attend, positions = WholeSequence(MIXED, REACH, 0.25), torch.arange(300)
    hidden = model.embed(torch.tensor(prompt))
    for layers in (range(0, 1), range(1, 3)):
        hidden = model.run_layers(hidden, positions, attend, layers)
    torch.testing.assert_close(hidden, forward(model, prompt, attend), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_keys", "num_queries"), [(1, 1), (64, 64), (BLOCK, BLOCK), (BLOCK + 1, BLOCK + 1), (900, 900), (900, 70)]
)
def test_heads_see_what_they_should(num_keys: int, num_queries: int) -> None:
    generator = torch.Generator().manual_seed(num_keys)
    query = torch.randn(num_queries, 6, 16, generator=generator)
    key, value = (torch.randn(num_keys, 2, 16, generator=generator) for _ in range(2))
    token = torch.arange(num_keys)
    distance = token[num_keys - num_queries :, None] - token
    dense = distance >= 0
    logits = torch.einsum("mhgd,nhd->hgmn", query.view(-1, 2, 3, 16), key) * 0.25
    for seen, out in (
        (dense, dense_attention(query, key, value, 0.25)),
        (
            dense & ((token < REACH.sink_size) | (distance < REACH.local_window)),
            streaming_attention(query, key, value, 0.25, REACH),
        ),
    ):
        expected = torch.einsum("hgmn,nhd->mhgd", logits.masked_fill(~seen, -torch.inf).softmax(-1), value)
        torch.testing.assert_close(out, expected.flatten(1, 2), atol=1e-5, rtol=0)
