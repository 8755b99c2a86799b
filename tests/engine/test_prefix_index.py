from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lserve.engine.chain import chain_hashes
from lserve.engine.errors import CapacityError
from lserve.engine.page_pool import PagePool
from lserve.engine.prefix_index import PrefixHit, PrefixIndex
from lserve.engine.residency import Residency, resume_points

RULES = Residency(sink_size=128, local_window=256)


@dataclass
class Worker:
    """Pools and index of one worker; `prefill` does with pages what an engine does with a prompt."""

    num_retrieval: int = 200
    num_streaming: int = 100
    has_retrieval: bool = True
    has_streaming: bool = True
    retrieval: PagePool = field(init=False)
    streaming: PagePool = field(init=False)
    index: PrefixIndex = field(init=False)

    def __post_init__(self) -> None:
        self.retrieval = PagePool(self.num_retrieval, "retrieval")
        self.streaming = PagePool(self.num_streaming, "streaming")
        self.index = PrefixIndex(
            self.retrieval if self.has_retrieval else None, self.streaming if self.has_streaming else None, RULES
        )

    def prefill(self, tokens: list[int], reuse: bool = True) -> PrefixHit:
        """Takes the hit, computes the rest and publishes all of it; returns the pages that the request holds now."""
        hashes = chain_hashes(b"root", tokens)
        hit = self.index.lookup(hashes, len(tokens)) if reuse else PrefixHit()
        retrieval, streaming = list(hit.retrieval_pages), dict(hit.streaming_pages)
        try:
            if self.has_retrieval:
                retrieval += self.retrieval.allocate(len(hashes) - len(retrieval))
            if self.has_streaming:
                first = hit.num_tokens // 64
                new = [i for i in RULES.streaming_pages_kept(len(tokens)) if i >= first]
                streaming.update(zip(new, self.streaming.allocate(len(new)), strict=True))
        except CapacityError:
            self.release(PrefixHit(hit.num_tokens, retrieval, streaming))
            raise
        self.index.insert(hashes, retrieval, streaming)
        return PrefixHit(hit.num_tokens, retrieval, streaming)

    def serve(self, tokens: list[int]) -> int:
        """Prefills and finishes; returns how many tokens were cached."""
        held = self.prefill(tokens)
        self.release(held)
        return held.num_tokens

    def release(self, held: PrefixHit) -> None:
        self.retrieval.release(held.retrieval_pages)
        self.streaming.release(list(held.streaming_pages.values()))

    def match(self, tokens: list[int]) -> int:
        return self.index.match(chain_hashes(b"root", tokens), len(tokens))

    @contextmanager
    def looked_up(self, tokens: list[int]) -> Iterator[PrefixHit]:
        hit = self.index.lookup(chain_hashes(b"root", tokens), len(tokens))
        yield hit
        self.release(hit)


def prompt(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (64, 0), (128, 0), (129, 128), (1000, 896), (1024, 896), (1025, 1024), (2500, 2432)]
)
def test_the_same_prompt_is_cached_up_to_its_last_resume_point(length: int, cached: int) -> None:
    worker = Worker()
    assert worker.serve(prompt(length)) == 0
    assert worker.serve(prompt(length)) == cached


def test_a_hit_has_all_retrieval_pages_and_the_streaming_pages_of_sink_and_window() -> None:
    worker = Worker()
    held = worker.prefill(prompt(2500))
    with worker.looked_up(prompt(2500)) as hit:
        assert hit.num_tokens == 2432
        assert hit.retrieval_pages == held.retrieval_pages[:38]
        assert hit.streaming_pages == {index: held.streaming_pages[index] for index in (0, 1, 34, 35, 36, 37)}
        assert all(worker.retrieval.refcount(page) == 3 for page in hit.retrieval_pages)
    assert all(worker.retrieval.refcount(page) == 2 for page in held.retrieval_pages)


def test_a_miss_takes_nothing() -> None:
    worker = Worker()
    worker.serve(prompt(2500))
    with worker.looked_up(prompt(2500, start=7)) as hit:
        assert hit == PrefixHit()
    assert worker.retrieval.num_held == worker.streaming.num_held == 0


def test_another_prompt_takes_the_shared_start_up_at_a_resume_point() -> None:
    worker = Worker()
    worker.serve(prompt(5000))
    assert worker.match([*prompt(3000), *prompt(2000, start=9000)]) == 2048


def test_without_streaming_heads_every_multiple_of_128_will_do() -> None:
    worker = Worker(has_streaming=False)
    worker.serve(prompt(5000))
    assert worker.match([*prompt(3000), *prompt(2000, start=9000)]) == 2944


def test_without_retrieval_heads_streaming_pages_suffice() -> None:
    worker = Worker(has_retrieval=False)
    worker.serve(prompt(5000))
    with worker.looked_up(prompt(5000)) as hit:
        assert hit.num_tokens == 4992 and hit.retrieval_pages == []
        assert len(hit.streaming_pages) == 6
    assert worker.match([*prompt(3000), *prompt(2000, start=9000)]) == 2048


def test_the_next_turn_of_a_conversation_goes_on_where_the_last_prompt_ended() -> None:
    worker = Worker()
    worker.serve(prompt(1500))
    assert worker.match(prompt(2900)) == 1408


def test_a_prompt_of_whole_blocks_can_be_extended_from_its_very_end() -> None:
    worker = Worker()
    worker.serve(prompt(1536))
    assert worker.match(prompt(1536)) == 1408
    assert worker.match(prompt(1700)) == 1536


def test_chunks_are_inserted_as_they_finish() -> None:
    worker = Worker()
    hashes = chain_hashes(b"root", prompt(3000))
    retrieval = worker.retrieval.allocate(len(hashes))
    streaming: dict[int, int] = {}
    kept = RULES.streaming_pages_kept(3000)
    for end in (1024, 2048, 3000):
        pages = end // 64
        new = [index for index in kept if len(streaming) <= kept.index(index) and index < pages]
        streaming.update(zip(new, worker.streaming.allocate(len(new)), strict=True))
        worker.index.insert(hashes[:pages], retrieval[:pages], {index: streaming[index] for index in new})
        assert worker.match(prompt(3000)) == {1024: 1024, 2048: 2048, 3000: 2944}[end]


def test_an_equal_prompt_computed_twice_is_kept_once() -> None:
    worker = Worker()
    tokens = prompt(1100)
    hashes = chain_hashes(b"root", tokens)
    first = worker.prefill(tokens)
    copies = worker.retrieval.allocate(len(hashes))
    worker.index.insert(hashes, copies, {})
    with worker.looked_up(tokens) as hit:
        assert hit.retrieval_pages == first.retrieval_pages[:16]
    assert worker.retrieval.release(copies) == copies
    worker.release(first)
    assert worker.retrieval.num_held == 0


def test_pressure_gives_the_oldest_chain_up_from_its_end() -> None:
    worker = Worker(num_retrieval=64)
    worker.serve(prompt(2048, start=0))
    worker.serve(prompt(2048, start=5000))
    assert worker.retrieval.num_free == 0
    pages = worker.retrieval.allocate(16)
    assert worker.match(prompt(2048, start=0)) == 1024
    assert worker.match(prompt(2048, start=5000)) == 1920
    worker.retrieval.release(pages)


def test_use_keeps_a_chain() -> None:
    worker = Worker(num_retrieval=64)
    worker.serve(prompt(2048, start=0))
    worker.serve(prompt(2048, start=5000))
    with worker.looked_up(prompt(2048, start=0)):
        pass
    worker.retrieval.allocate(2 + 32)
    assert worker.match(prompt(2048, start=0)) == 1920
    assert worker.match(prompt(2048, start=5000)) == 0


def test_pages_in_use_are_never_given_up() -> None:
    worker = Worker(num_retrieval=48)
    held = worker.prefill(prompt(2048))
    worker.serve(prompt(1024, start=5000))
    worker.retrieval.allocate(16)
    with pytest.raises(CapacityError):
        worker.retrieval.allocate(1)
    assert worker.match(prompt(2048)) == 1920
    assert all(worker.retrieval.refcount(page) == 2 for page in held.retrieval_pages)


def test_a_request_too_large_for_what_is_idle_leaves_the_cache_alone() -> None:
    worker = Worker(num_retrieval=48)
    held = worker.prefill(prompt(2048))
    worker.serve(prompt(1024, start=5000))
    with pytest.raises(CapacityError):
        worker.retrieval.allocate(17)
    assert worker.match(prompt(1024, start=5000)) == 896
    worker.release(held)


def test_an_idle_start_stays_while_a_deeper_page_is_in_use() -> None:
    worker = Worker(num_retrieval=60)
    start, whole = prompt(1024), prompt(2048)
    first = worker.prefill(start)
    hashes = chain_hashes(b"root", whole)
    copies = worker.retrieval.allocate(len(hashes))
    worker.index.insert(hashes, copies, {})  # knows the start by the first request's pages, the rest by these
    worker.release(first)
    assert worker.retrieval.num_idle == 16
    with pytest.raises(CapacityError):
        worker.retrieval.allocate(20)
    assert worker.match(start) == 896
    worker.retrieval.release(copies)
    assert worker.retrieval.num_held == 0
    assert len(worker.retrieval.allocate(60)) == 60
    assert worker.index.num_retrieval_pages == 0


def test_streaming_pressure_costs_the_deepest_resume_points_first() -> None:
    worker = Worker(num_streaming=15)
    worker.serve(prompt(2500))
    assert worker.index.num_streaming_pages == 15
    for num_pages, cached in ((1, 2432), (1, 2048), (3, 2048), (1, 1024), (3, 1024), (1, 128), (5, 0)):
        worker.streaming.allocate(num_pages)
        assert worker.match(prompt(2500)) == cached
    assert worker.index.num_retrieval_pages == 39


def test_a_streaming_page_goes_with_its_retrieval_page() -> None:
    worker = Worker(num_retrieval=39)
    worker.serve(prompt(2500))
    worker.retrieval.allocate(39)
    assert worker.index.num_streaming_pages == 0
    assert worker.streaming.num_used == 0


def test_clear_forgets_everything_and_frees_what_nobody_holds() -> None:
    worker = Worker()
    held = worker.prefill(prompt(2500))
    worker.serve([*prompt(1024), *prompt(500, start=9000)])
    worker.index.clear()
    assert worker.match(prompt(2500)) == 0
    assert worker.retrieval.num_used == 39
    worker.release(held)
    assert worker.retrieval.num_used == worker.streaming.num_used == 0


class IndexMachine(RuleBasedStateMachine):
    """Requests over a tree of prompts come and go in tiny pools; page contents are checked against the prompts."""

    @initialize(has_retrieval=st.booleans(), has_streaming=st.booleans())
    def start(self, has_retrieval: bool, has_streaming: bool) -> None:
        self.worker = Worker(60, 40, has_retrieval or not has_streaming, has_streaming)
        self.running: list[PrefixHit] = []
        self.contents: dict[tuple[str, int], bytes] = {}

    @rule(
        branches=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4),
        extra=st.integers(1, 700),
        reuse=st.sampled_from([True, True, False]),
    )
    def prefill(self, branches: list[int], extra: int, reuse: bool) -> None:
        tokens = [token for branch in branches for token in [branch] * 640] + [2] * extra
        hashes = chain_hashes(b"root", tokens)
        expected = self.worker.match(tokens) if reuse else 0
        try:
            held = self.worker.prefill(tokens, reuse)
        except CapacityError:
            return
        assert held.num_tokens == expected
        assert held.num_tokens < len(tokens)
        first = held.num_tokens // 64
        for name, pages in (("r", dict(enumerate(held.retrieval_pages))), ("s", held.streaming_pages)):
            for index, page in pages.items():
                if index < first:
                    assert self.contents[name, page] == hashes[index], "a hit returned another prompt's page"
                self.contents[name, page] = hashes[index]
        self.running.append(held)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.worker.release(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))))

    @rule(length=st.integers(1, 60))
    def pressure(self, length: int) -> None:
        pool = self.worker.retrieval
        fits = length <= pool.num_available
        try:
            pages = pool.allocate(length)
        except CapacityError:
            assert not fits or self.running, "idle pages are kept back only by deeper pages in use"
            return
        assert fits
        pool.release(pages)

    @invariant()
    def every_kept_page_can_be_reached(self) -> None:
        if not hasattr(self, "worker"):
            return
        entries = self.worker.index._retrieval
        children = dict.fromkeys(entries, 0)
        for entry in entries.values():
            if entry.parent is not None:
                assert entry.parent in entries
                children[entry.parent] += 1
        assert all(entry.num_children == children[chain_hash] for chain_hash, entry in entries.items())

    @invariant()
    def requests_hold_what_is_held(self) -> None:
        if not hasattr(self, "worker"):
            return
        assert self.worker.retrieval.num_held == len({p for held in self.running for p in held.retrieval_pages})
        assert self.worker.streaming.num_held == len(
            {p for held in self.running for p in held.streaming_pages.values()}
        )

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            for held in self.running:
                self.worker.release(held)
            assert self.worker.retrieval.num_held == self.worker.streaming.num_held == 0
            assert len(self.worker.retrieval.allocate(60)) == 60, "everything idle can be had"
            assert len(self.worker.streaming.allocate(40)) == 40


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_resume_points_of_the_index_are_those_of_the_design() -> None:
    worker = Worker()
    worker.serve(prompt(5000))
    found = {worker.match([*prompt(n), 10**6]) for n in range(64, 5001, 64)} - {0}
    assert found >= {1024, 2048, 3072, 4096, 4992}
    assert found >= set(resume_points(5000))
