from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lserve.engine.leases import Lease, LeaseTable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Home:
    """Where ended leases give back to."""

    def __init__(self) -> None:
        self.pages: list[tuple[tuple[int, ...], tuple[int, ...], int | None]] = []

    def __call__(self, retrieval: Sequence[int], streaming: Sequence[int], row: int | None) -> None:
        self.pages.append((tuple(retrieval), tuple(streaming), row))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def home() -> Home:
    return Home()


@pytest.fixture
def table(clock: Clock, home: Home) -> LeaseTable:
    return LeaseTable(clock, home)


def test_a_release_in_time_is_held_once(table: LeaseTable, home: Home) -> None:
    lease = table.grant([1, 2], [3], 4, ttl_s=5)
    assert not table.is_drained and table.num_held == 1
    assert table.release(lease.id, lease.generation) == "held"
    assert home.pages == [((1, 2), (3,), 4)]
    assert table.release(lease.id, lease.generation) == "gone"
    assert len(home.pages) == 1
    assert table.is_drained


def test_a_lease_that_ran_out_is_gone_even_before_anyone_swept(table: LeaseTable, clock: Clock, home: Home) -> None:
    lease = table.grant([1], [], None, ttl_s=5)
    clock.now += 5
    assert table.release(lease.id, lease.generation) == "gone"
    assert home.pages == [((1,), (), None)]
    assert table.counts.expired == 1


def test_another_generation_is_gone_and_leaves_the_lease_alone(table: LeaseTable, home: Home) -> None:
    lease = table.grant([1], [], None, ttl_s=5)
    assert table.release(lease.id, lease.generation ^ 1) == "gone"
    assert table.extend(lease.id, lease.generation ^ 1, 10) == "gone"
    assert home.pages == []
    assert table.release(lease.id, lease.generation) == "held"


def test_a_restarted_worker_does_not_know_the_leases_of_the_one_before(clock: Clock, home: Home) -> None:
    before, after = LeaseTable(clock, home), LeaseTable(clock, home)
    old, new = before.grant([1], [], None, 5), after.grant([2], [], None, 5)
    assert old.id == new.id and old.generation != new.generation
    assert after.release(old.id, old.generation) == "gone"
    assert after.num_held == 1


def test_extending_keeps_a_lease_alive_and_never_shortens_it(table: LeaseTable, clock: Clock) -> None:
    lease = table.grant([1], [], None, ttl_s=5)
    clock.now += 4
    assert table.extend(lease.id, lease.generation, 5) == "held"
    assert table.extend(lease.id, lease.generation, 1) == "held"
    clock.now += 4
    assert table.expire() == []
    clock.now += 1
    assert [ended.id for ended in table.expire()] == [lease.id]
    assert table.extend(lease.id, lease.generation, 5) == "gone"


def test_leases_expire_earliest_first(table: LeaseTable, clock: Clock, home: Home) -> None:
    for page, ttl in ((1, 30), (2, 10), (3, 20), (4, 40)):
        table.grant([page], [], None, ttl)
    expired = table.expire(clock.now + 30)
    assert [lease.retrieval_pages for lease in expired] == [(2,), (3,), (1,)]
    assert len(home.pages) == 3
    assert [lease.retrieval_pages for lease in table.end_all()] == [(4,)]
    assert table.is_drained


class LeaseMachine(RuleBasedStateMachine):
    """Every granted page comes back exactly once, whatever the order of events."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.home = Home()
        self.table = LeaseTable(self.clock, self.home)
        self.num_granted = 0
        self.deadlines: dict[int, float] = {}

    @rule(target=leases, ttl=st.integers(1, 20))
    def grant(self, ttl: int) -> Lease:
        lease = self.table.grant([self.num_granted], [], None, ttl)
        self.num_granted += 1
        self.deadlines[lease.id] = self.clock.now + ttl
        return lease

    @rule(lease=leases, ttl=st.integers(1, 20))
    def extend(self, lease: Lease, ttl: int) -> None:
        alive = self.deadlines.get(lease.id, 0) > self.clock.now
        assert self.table.extend(lease.id, lease.generation, ttl) == ("held" if alive else "gone")
        if alive:
            self.deadlines[lease.id] = max(self.deadlines[lease.id], self.clock.now + ttl)

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        alive = self.deadlines.pop(lease.id, 0) > self.clock.now
        assert self.table.release(lease.id, lease.generation) == ("held" if alive else "gone")

    @rule(seconds=st.integers(1, 15), sweep=st.booleans())
    def wait(self, seconds: int, sweep: bool) -> None:
        self.clock.now += seconds
        if sweep:
            self.table.expire()
            alive = {lease_id for lease_id, deadline in self.deadlines.items() if deadline > self.clock.now}
            assert self.table.num_held == len(alive)

    @invariant()
    def nothing_is_lost_or_given_back_twice(self) -> None:
        pages = [retrieval[0] for retrieval, _, _ in self.home.pages]
        assert len(set(pages)) == len(pages)
        counts = self.table.counts
        assert counts.held + len(pages) == self.num_granted
        assert counts.released + counts.expired == len(pages)

    def teardown(self) -> None:
        self.table.end_all()
        assert self.table.is_drained and len(self.home.pages) == self.num_granted


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
