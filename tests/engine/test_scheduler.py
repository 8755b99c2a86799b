"""The scheduling policy over real page pools, with a runner that computes nothing. No torch."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_bench import SINK, WINDOW, Bench

from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE
from lserve.engine.errors import CapacityError
from lserve.engine.sequence import State


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench that must end idle."""
    made = Bench()
    yield made
    made.drain()
    made.assert_idle()


def test_oldest_first_and_whole_blocks_but_for_the_last_chunk(bench: Bench) -> None:
    first, second, third = bench.add(300), bench.add(70), bench.add(500)
    assert [(c.sequence, c.start, c.length) for c in bench.step().prefill] == [(first, 0, 256)]
    assert [(c.sequence, c.start, c.length) for c in bench.step().prefill] == [
        (first, 256, 44),
        (second, 0, 70),
        (third, 0, 128),
    ]
    plan = bench.step()
    assert plan.decode == [first, second]
    assert [(c.start, c.length) for c in plan.prefill] == [(128, 256)]


def test_one_that_does_not_fit_yet_is_not_overtaken() -> None:
    bench = Bench(num_retrieval=10)
    big, bigger, small = bench.add(400, 4), bench.add(500, 4), bench.add(5, 4)
    plan = bench.step()
    assert plan.admitted == [big] and list(bench.scheduler.waiting) == [bigger, small]
    bench.drain()
    bench.assert_idle()


def test_no_more_choices_at_once_than_the_batch_holds() -> None:
    bench = Bench(max_batch_size=4)
    for n in (2, 1, 2, 4):
        bench.add(10, 3, n=n)
    sizes = []
    while bench.scheduler.has_work:
        sizes.append(len(bench.step().decode))
    assert max(sizes) == 4
    bench.assert_idle()


def test_a_full_queue_refuses() -> None:
    bench = Bench(max_waiting=1)
    bench.add(10)
    with pytest.raises(CapacityError, match="1 requests are waiting already"):
        bench.add(10)
    bench.drain()
    bench.assert_idle()


def test_dense_and_sparse_prompts_take_turns(bench: Bench) -> None:
    bench.add(50, dense=True), bench.add(50), bench.add(50)
    assert [[c.sequence.request.attention.dense for c in bench.step().prefill] for _ in range(2)] == [
        [True],
        [False, False],
    ]


def test_choices_share_whole_pages_and_nothing_else(bench: Bench) -> None:
    lead = bench.add(150, 100, n=3)
    bench.step()
    choices = bench.scheduler.running
    assert [s.choice for s in choices] == [0, 1, 2] and choices[0] is lead
    assert [bench.retrieval.refcount(page) for page in lead.retrieval_pages[:2]] == [3, 3]
    assert len({s.row for s in choices}) == 3
    bench.step()
    assert bench.retrieval.num_used == 2 + 3
    bench.drain()


@pytest.mark.parametrize("classes", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("swap_bytes", [0, 15, 10**9])
def test_running_out_of_pages_preempts_the_youngest(classes: tuple[bool, bool], swap_bytes: int) -> None:
    bench = Bench(num_retrieval=9, swap_bytes=swap_bytes, has_retrieval=classes[0], has_streaming=classes[1])
    old, young = bench.add(250, 300), bench.add(200, 200)
    preempted = False
    while bench.scheduler.has_work:
        bench.step()
        preempted |= young.state in (State.SWAPPED, State.WAITING)
        assert old.state not in (State.SWAPPED, State.WAITING)
    assert preempted == classes[0]
    bench.assert_idle()


def test_a_recomputed_sequence_is_no_longer_held_for_another_worker() -> None:
    """A held request that decodes and is preempted for recompute goes through prefill here, like any other."""
    bench = Bench(swap_bytes=0)
    sequence = bench.add(100, 50, hold=True)
    plan = bench.step()
    assert plan.admitted == [sequence] and sequence.state is State.HELD and not plan.prefill
    sequence.num_computed = 100
    bench.start(sequence)
    bench.step()
    bench.scheduler.preempt(sequence)
    assert [c.length for c in bench.step().prefill] == [102]
    bench.drain()
    bench.assert_idle()


def test_what_comes_back_from_host_memory_is_not_sent_away_in_the_same_step() -> None:
    """Running sequences take their next pages first: else the copy would be made of pages not yet restored."""
    bench = Bench(num_retrieval=4)
    old, young = bench.add(127, 30), bench.add(100, 20)
    bench.step()
    bench.step()
    assert old.own_page == 2 and len(old.retrieval_pages) == 2
    bench.scheduler.preempt(young)
    plan = bench.step()
    assert plan.decode == [old] and not plan.swapped_in and young.state is State.SWAPPED
    bench.drain()
    bench.assert_idle()


def test_held_requests_get_all_that_a_handoff_fills() -> None:
    bench = Bench()
    sequence = bench.add(600, 4, hold=True)
    bench.step()
    assert len(sequence.retrieval_pages) == 600 // PAGE_SIZE + 1
    assert sorted(sequence.streaming_pages) == bench.residency.streaming_pages_for_decode(600)
    assert not bench.scheduler.has_work
    bench.scheduler.start_prefill(sequence, 512)
    bench.scheduler.reserve_streaming(sequence, bench.residency.streaming_pages_to_resume(512))
    assert [(c.start, c.length) for c in bench.step().prefill] == [(512, 88)]
    bench.drain()
    bench.assert_idle()


def test_a_prefix_in_the_index_is_shared_and_not_computed() -> None:
    bench = Bench(prefix_cache=True)
    first = bench.add(600, 4)
    bench.drain()
    second, other = bench.add(600, 4), bench.add(600, 4, tokens=8)
    plan = bench.step()
    assert first.num_cached == 0 and second.num_cached == 512 and other.num_cached == 0
    assert [(c.sequence, c.start, c.length) for c in plan.prefill] == [(second, 512, 88), (other, 0, 128)]
    bench.drain()
    bench.assert_idle()


def test_a_prefix_that_came_while_a_prompt_waited_is_not_computed_again() -> None:
    bench = Bench(prefix_cache=True)
    first, second, held = bench.add(600, 1), bench.add(600, 1), bench.add(600, 1, hold=True)
    chunks = [(c.sequence, c.start, c.length) for _ in range(3) for c in bench.step().prefill]
    assert chunks == [(first, 0, 256), (first, 256, 256), (first, 512, 88), (second, 512, 88)]
    bench.scheduler.start_prefill(held, 0)
    assert [(c.sequence, c.start, c.length) for c in bench.step().prefill] == [(held, 512, 88)]
    assert (first.num_cached, second.num_cached, held.num_cached) == (0, 512, 512)
    bench.drain()
    bench.assert_idle()


class Life(RuleBasedStateMachine):
    """Anything may come, go, be preempted or be handed over at any time; pages and progress stay right."""

    @initialize(
        swap_bytes=st.sampled_from([0, 8, 10**9]),
        prefix_cache=st.booleans(),
        classes=st.sampled_from([(True, True), (True, False), (False, True)]),
        num_retrieval=st.sampled_from([24, 40]),
        batch=st.sampled_from([3, 6]),
    )
    def build(
        self, swap_bytes: int, prefix_cache: bool, classes: tuple[bool, bool], num_retrieval: int, batch: int
    ) -> None:
        """Pools of the least size that `pool_sizes` would give."""
        rows = batch + 2
        live = (SINK + WINDOW) // PAGE_SIZE + 2
        self.bench = Bench(
            num_retrieval=num_retrieval if classes[0] else 1 << 20,
            num_streaming=(rows * live + 2 * 256 // PAGE_SIZE + 2 * live) if classes[1] else 0,
            num_rows=rows,
            max_batch_size=batch,
            swap_bytes=swap_bytes,
            prefix_cache=prefix_cache,
            has_retrieval=classes[0],
            has_streaming=classes[1],
        )

    @rule(
        num_tokens=st.integers(1, 700),
        max_tokens=st.integers(1, 200),
        n=st.integers(1, 3),
        tokens=st.integers(0, 2),
        kind=st.sampled_from(["", "", "", "prefill_only", "hold", "dense"]),
    )
    def add(self, num_tokens: int, max_tokens: int, n: int, tokens: int, kind: str) -> None:
        """A request that fits when it is alone."""
        pages = (num_tokens + max_tokens) // PAGE_SIZE + 1 + (n - 1) * (max_tokens // PAGE_SIZE + 2)
        if pages <= min(self.bench.num_retrieval, 40):
            self.bench.add(num_tokens, max_tokens, n, tokens, **({kind: True} if kind else {}))

    @rule(times=st.integers(1, 40))
    def step(self, times: int) -> None:
        """Some steps; one that does nothing while nobody outside holds anything is a deadlock."""
        for _ in range(times):
            had_work = self.bench.scheduler.has_work
            plan = self.bench.step()
            if had_work and not self.bench.scheduler.held:
                assert plan.decode or plan.prefill, "nothing progresses"

    @precondition(lambda self: self.bench.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any sequence ends from outside."""
        self.bench.finish(data.draw(st.sampled_from(self.bench.live)))

    @precondition(lambda self: self.bench.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Any running sequence loses its place."""
        self.bench.scheduler.preempt(data.draw(st.sampled_from(self.bench.scheduler.running)))

    @precondition(lambda self: self.bench.scheduler.held)
    @rule(data=st.data(), computed=st.integers(0, 4))
    def hand_over(self, data: st.DataObject, computed: int) -> None:
        """A held request's pages arrive, wholly or in part."""
        bench, sequence = self.bench, data.draw(st.sampled_from(self.bench.scheduler.held))
        start = sequence.num_cached + computed * BLOCK_SIZE
        if computed == 4 or start >= sequence.num_prefill:
            sequence.num_computed = sequence.num_prefill
            bench.publish(sequence, sequence.num_prefill)
            bench.start(sequence)
        else:
            bench.scheduler.reserve_streaming(sequence, bench.residency.streaming_pages_to_resume(start))
            bench.scheduler.start_prefill(sequence, start)

    @invariant()
    def references_add_up(self) -> None:
        """Every page's references are those of the sequences that list it, and the index's."""
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        for pool, tables in (
            (bench.retrieval, [s.retrieval_pages for s in bench.live]),
            (bench.streaming, [list(s.streaming_pages.values()) for s in bench.live]),
        ):
            holders = [page for table in tables for page in table]
            assert pool.num_held == len(set(holders))
            assert all(pool.refcount(page) - 1 <= holders.count(page) <= pool.refcount(page) for page in set(holders))
        assert bench.rows.num_used == sum(len(s.fork_rows) + (s.row is not None) for s in bench.live)
        assert {s for s in bench.live if s.state is State.SWAPPED} == bench.swapped

    def teardown(self) -> None:
        """What is left ends by itself, but for held requests, which somebody outside must end."""
        if hasattr(self, "bench"):
            for sequence in list(self.bench.scheduler.held):
                self.bench.finish(sequence)
            while self.bench.scheduler.has_work:
                plan = self.bench.step()
                for sequence in list(self.bench.scheduler.held):
                    self.bench.finish(sequence)
                assert plan.decode or plan.prefill or plan.admitted, "nothing progresses"
            self.bench.assert_idle()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
