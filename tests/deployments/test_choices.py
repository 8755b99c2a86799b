"""Which worker gets a request."""

import asyncio

import pytest
from stub_fleet import VirtualLoop, play, shared_prefixes, single_prompts

from lserve.deployments.choices import AFFINITY, DecodeChoice, PrefillChoice
from lserve.deployments.messages import PrefillLoad, WorkerLoad


def prefill_choice(**queued: int) -> PrefillChoice:
    choice = PrefillChoice()
    choice.told([PrefillLoad(worker, tokens) for worker, tokens in queued.items()])
    return choice


def test_a_request_goes_to_the_decode_worker_with_the_fewest_pages_sent_ones_included() -> None:
    choice = DecodeChoice()
    assert choice.rank(5) == () and not choice.is_busy
    choice.told([WorkerLoad("a", 10, 100, 1, 0), WorkerLoad("b", 14, 100, 1, 0)])
    assert [choice.rank(5)[0] for _ in range(3)] == ["a", "b", "a"]
    assert choice.is_busy
    choice.told([WorkerLoad("a", 10, 100, 1, 0), WorkerLoad("b", 4, 100, 1, 0)])
    assert choice.rank(5) == ("b", "a")


def test_a_prefix_goes_where_it_is_until_that_queue_is_too_long() -> None:
    few = int(AFFINITY * 5000)  # half of what the prefix saves: Redis has it for the others
    assert prefill_choice(a=few - 1, b=0).rank(12_000, 10_000, ("a",)) == ("a", "b")
    assert prefill_choice(a=few + 1, b=0).rank(12_000, 10_000, ("a",)) == ("b", "a")


def test_what_was_sent_counts() -> None:
    choice = prefill_choice(a=0, b=0)
    assert {choice.rank(1000, 0, ())[0] for _ in range(2)} == {"a", "b"}
    choice.told([PrefillLoad("a", 0), PrefillLoad("b", 500)])
    assert [choice.rank(1000, 0, ())[0] for _ in range(2)] == ["a", "b"]


def test_prompts_that_begin_alike_meet_before_anybody_holds_them() -> None:
    workers = dict.fromkeys("abcd", 0)
    homes = [prefill_choice(**workers).rank(3000, 0, (), bytes([n]) * 32)[0] for n in range(64)]
    again = [prefill_choice(**workers).rank(3000, 0, (), bytes([n]) * 32)[0] for n in range(64)]
    assert homes == again and {homes.count(worker) > 6 for worker in "abcd"} == {True}


def test_a_worker_that_is_gone_is_not_chosen() -> None:
    choice = prefill_choice(a=0, b=10_000)
    assert choice.rank(100, 0, ("gone",)) == ("a", "b")
    choice.lost("a")
    assert choice.rank(100, 0, ("a",)) == ("b",)
    assert PrefillChoice().rank(100, 50, ("x", "y")) == ("x", "y")


def test_virtual_time_passes_at_once() -> None:
    async def sleep() -> float:
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(sleep()) == 86_400


@pytest.mark.parametrize(("has_redis", "factor"), [(False, 2.0), (True, 1.3)])
def test_at_saturation_shared_prefixes_are_answered_much_sooner(has_redis: bool, factor: float) -> None:
    """A short form of benchmarks/bench_routing.py."""
    prompts = shared_prefixes(1500, 20.0, seed=2)
    aware, *others = (play(policy, prompts, has_redis) for policy in ("prefix-aware", "random", "round-robin"))
    assert factor * aware.ttft_p90_s < min(other.ttft_p90_s for other in others)
    assert aware.hit_rate >= max(other.hit_rate for other in others) - 0.01


def test_prompts_with_nothing_in_common_are_answered_no_later() -> None:
    prompts = single_prompts(600, 4.5, seed=1)
    aware, *others = (play(policy, prompts, False) for policy in ("prefix-aware", "random", "round-robin"))
    assert aware.ttft_p90_s <= min(other.ttft_p90_s for other in others)
    assert aware.hit_rate == 0.0
