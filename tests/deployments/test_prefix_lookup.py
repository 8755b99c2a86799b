"""Asking the directory for a prompt's longest cached prefix."""

from collections.abc import Sequence

from fake_pool import FakePool

from lserve.deployments.directory import Directory
from lserve.deployments.embedded_valkey import EmbeddedValkey
from lserve.deployments.messages import PrefixHint
from lserve.deployments.prefix_lookup import PrefixLookup, candidate_points
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.config import PAGE_SIZE
from lserve.engine.residency import resume_points

SECRET = b"cluster"


async def publish(directory: Directory, tenant: str, tokens: Sequence[int]) -> None:
    """As a prefill worker does it after a prompt."""
    chain = chain_hashes(chain_root(SECRET, tenant, "format"), tokens)
    points = [(point, chain[point // PAGE_SIZE - 1]) for point in resume_points(len(tokens))]
    await directory.publish(points, "worker")


async def test_a_conversation_goes_on_where_its_last_turn_ended_and_no_tenant_sees_another() -> None:
    first_turn = list(range(2900))
    second_turn = [*first_turn, *range(5000, 7000)]
    with EmbeddedValkey() as valkey:
        directory = Directory(valkey.url, SECRET)
        lookup = PrefixLookup(directory, SECRET, FakePool())
        await publish(directory, "us", first_turn)
        assert await lookup("us", second_turn) == PrefixHint(2816, ("worker",))
        assert await lookup("us", [*range(1500), *range(9000, 9900)]) == PrefixHint(1024, ("worker",))
        assert await lookup("them", second_turn) == PrefixHint()
        assert await lookup("us", [1, 2, 3]) == PrefixHint()
        await directory.close()


async def test_a_directory_that_is_down_is_a_miss() -> None:
    directory = Directory("unix:///nowhere.sock", SECRET)
    assert await PrefixLookup(directory, SECRET, FakePool())("", range(5000)) == PrefixHint()
    await directory.close()


def test_every_resume_point_is_a_candidate_and_long_prompts_have_few() -> None:
    for length in (0, 1, 128, 129, 1024, 5000, 40_000, 1_000_000):
        points = candidate_points(length)
        assert set(points) >= set(resume_points(length))
        assert all(0 < point < length and point % 128 == 0 for point in points)
    assert len(points) < 1200
