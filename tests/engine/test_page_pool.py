import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lserve.engine.errors import CapacityError
from lserve.engine.page_pool import PagePool


class PagePoolMachine(RuleBasedStateMachine):
    """The pool against a dict of reference counts and a set of cached pages."""

    NUM_PAGES = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, "retrieval", self.give_back)
        self.held: dict[int, int] = {}
        self.cached: set[int] = set()
        self.allocations = [0] * self.NUM_PAGES

    def give_back(self, num_pages: int) -> None:
        idle = sorted(page for page in self.cached if page not in self.held)
        assert len(idle) >= num_pages, "the pool asked for more than is idle"
        for page in idle[:num_pages]:
            assert self.pool.uncache(page)
            self.cached.remove(page)

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        available = self.NUM_PAGES - len(self.held)
        if count > available:
            before = self.pool.num_free
            with pytest.raises(CapacityError, match=f"{count} retrieval pages are needed and {available} of 7"):
                self.pool.allocate(count)
            assert self.pool.num_free == before
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        for page in pages:
            assert page not in self.held and page not in self.cached
            self.held[page] = 1
            self.allocations[page] += 1

    @precondition(lambda self: self.held or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted({*self.held, *self.cached})), max_size=4))
        self.pool.share(pages)
        for page in pages:
            self.held[page] = self.held.get(page, 0) + 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        references = [page for page, count in self.held.items() for _ in range(count)]
        pages = data.draw(st.permutations(references))[: data.draw(st.integers(0, len(references)))]
        freed = self.pool.release(pages)
        for page in pages:
            self.held[page] -= 1
        gone = {page for page, count in self.held.items() if count == 0}
        self.held = {page: count for page, count in self.held.items() if count}
        assert sorted(freed) == sorted(gone - self.cached)

    @precondition(lambda self: self.held.keys() - self.cached)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.held.keys() - self.cached)))
        self.pool.cache(page)
        self.cached.add(page)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def uncache(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.cached)))
        assert self.pool.uncache(page) == (page not in self.held)
        self.cached.remove(page)

    @invariant()
    def counts_agree(self) -> None:
        used = self.held.keys() | self.cached
        idle = self.cached - self.held.keys()
        assert self.pool.num_used == len(used)
        assert self.pool.num_free == self.NUM_PAGES - len(used)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_idle == len(idle)
        assert self.pool.num_held == len(self.held)
        assert self.pool.num_available == self.NUM_PAGES - len(self.held)
        for page in range(self.NUM_PAGES):
            assert self.pool.refcount(page) == self.held.get(page, 0) + (page in self.cached)
            assert self.pool.is_idle(page) == (page in idle)
            assert self.pool.generation(page) == self.allocations[page]

    def teardown(self) -> None:
        self.pool.release([page for page, count in self.held.items() for _ in range(count)])
        for page in self.cached:
            self.pool.uncache(page)
        assert self.pool.num_used == 0
        assert sorted(self.pool.allocate(self.NUM_PAGES)) == list(range(self.NUM_PAGES))


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_page_given_back_twice_is_an_assertion() -> None:
    pool = PagePool(2, "retrieval")
    (page,) = pool.allocate(1)
    assert pool.release([page]) == [page]
    with pytest.raises(AssertionError, match=f"page {page} is released and nobody held it"):
        pool.release([page])


def test_the_indexs_reference_is_not_the_requests_to_give_back() -> None:
    pool = PagePool(2, "retrieval")
    (page,) = pool.allocate(1)
    pool.cache(page)
    pool.release([page])
    with pytest.raises(AssertionError):
        pool.release([page])
    assert pool.uncache(page)


@pytest.mark.parametrize("page", [0, -1])
def test_a_free_page_cannot_be_shared_or_cached(page: int) -> None:
    pool = PagePool(1, "streaming")
    with pytest.raises(AssertionError):
        pool.share([page])
    with pytest.raises(AssertionError):
        pool.cache(page)


def test_negative_page_ids_are_never_taken_for_the_last_page() -> None:
    pool = PagePool(2, "retrieval")
    pool.allocate(2)
    for operation in (pool.share, pool.release):
        with pytest.raises(AssertionError):
            operation([-1])


def test_a_pool_without_pages_says_so() -> None:
    pool = PagePool(0, "streaming")
    assert pool.allocate(0) == []
    with pytest.raises(CapacityError, match="1 streaming pages are needed and 0 of 0 are available"):
        pool.allocate(1)


def test_reclaim_is_asked_only_when_it_can_help() -> None:
    asked: list[int] = []

    def reclaim(num_pages: int) -> None:
        asked.append(num_pages)
        for page in list(cached[:num_pages]):
            pool.uncache(page)

    pool = PagePool(4, "retrieval", reclaim)
    cached = pool.allocate(2)
    for page in cached:
        pool.cache(page)
    pool.release(cached)
    pool.allocate(1)
    with pytest.raises(CapacityError):
        pool.allocate(4)
    assert asked == []
    assert len(pool.allocate(2)) == 2
    assert asked == [1]
