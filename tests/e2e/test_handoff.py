"""Pages from prefill worker to decode worker: exact, and as if one worker had done it all."""

from pathlib import Path

import pytest
import torch
from workers import again, cluster, request


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 40_000, (length,), generator=generator).tolist())


@pytest.mark.parametrize("length", [1, 64, 100, 300, 1500])
async def test_disaggregated_equals_unified_to_the_bit(tiny_model: Path, length: int) -> None:
    asked = request(prompt(length), max_tokens=70, logprobs=3)
    async with cluster(tiny_model) as pair:
        apart = await pair.answer(asked)
        assert [message.request.request_id for _, message in pair.pool.calls] == [asked.request_id]
        await pair.idle()
    async with cluster(tiny_model, prefills=0) as unified:
        together = await unified.answer(again(asked))
        await unified.idle()
    assert apart.token_ids == together.token_ids and len(apart.token_ids) == 70
    assert apart.logprobs == together.logprobs
    assert apart.text == together.text
