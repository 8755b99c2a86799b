"""A scheduler with real pools and a runner that computes nothing. No torch."""

from dataclasses import dataclass, field

from lserve.engine.chain import chain_hashes
from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE, SchedulerConfig, SparsityConfig
from lserve.engine.page_pool import PagePool
from lserve.engine.prefix_index import PrefixIndex
from lserve.engine.request import AttentionOptions, Request, SamplingParams
from lserve.engine.residency import Residency
from lserve.engine.scheduler import Plan, Scheduler
from lserve.engine.sequence import Sequence, State

SINK, WINDOW = 64, 128
MOST_STREAMING = SINK // PAGE_SIZE + WINDOW // PAGE_SIZE + 1


@dataclass
class Bench:
    """A scheduler, its pools, and a stand-in for engine and runner."""

    num_retrieval: int = 40
    num_streaming: int = 60
    num_rows: int = 12
    chunk_size: int = 256
    max_batch_size: int = 8
    max_waiting: int = 100
    swap_bytes: int = 10**9
    prefix_cache: bool = False
    has_retrieval: bool = True
    has_streaming: bool = True
    swapped: set[Sequence] = field(default_factory=set)
    live: list[Sequence] = field(default_factory=list)
    restored: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.retrieval = PagePool(self.num_retrieval, "retrieval")
        self.streaming = PagePool(self.num_streaming, "streaming")
        self.rows = PagePool(self.num_rows, "tail row")
        sparsity, residency = SparsityConfig(sink_size=SINK, local_window=WINDOW), Residency(SINK, WINDOW)
        self.residency = residency
        self.index = None
        if self.prefix_cache:
            pools = (
                self.retrieval if self.has_retrieval else None,
                self.streaming if self.has_streaming else None,
            )
            self.index = PrefixIndex(*pools, residency)
        config = SchedulerConfig(self.chunk_size, self.max_batch_size, max_waiting=self.max_waiting)
        self.scheduler = Scheduler(
            config,
            sparsity,
            residency,
            self.retrieval,
            self.streaming,
            self.rows,
            self.index,
            self.swap_out,
            self.has_retrieval,
            self.has_streaming,
        )

    def swap_out(self, sequence: Sequence) -> bool:
        """Host memory of swap_bytes, a page being a byte."""
        assert sequence not in self.swapped and sequence not in self.restored, "saved before it was restored"
        if sum(len(s.token_ids) // PAGE_SIZE + 1 for s in [*self.swapped, sequence]) > self.swap_bytes:
            return False
        self.swapped.add(sequence)
        return True

    def add(self, num_tokens: int, max_tokens: int = 4, n: int = 1, tokens: int = 7, **flags: bool) -> Sequence:
        """Queues a request of num_tokens equal tokens."""
        dense = flags.pop("dense", False)
        prompt = (tokens,) * num_tokens
        params = SamplingParams(n=n, max_tokens=max_tokens)
        sequence = Sequence(Request("r", prompt, params, AttentionOptions(dense=dense)), 0, list(prompt), num_tokens)
        sequence.num_forks = n - 1
        sequence.prefill_only, sequence.hold = flags.get("prefill_only", False), flags.get("hold", False)
        if self.index is not None:
            sequence.chain = chain_hashes(b"root", prompt)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def step(self) -> Plan:
        """What the engine does: restore, decode, prefill, and let go of what is done."""
        plan = self.scheduler.schedule()
        self.restored = list(plan.swapped_in)
        self.check_plan(plan)
        for sequence in plan.swapped_in:
            self.swapped.remove(sequence)
        self.restored = []
        for sequence in plan.decode:
            sequence.num_computed = sequence.num_tokens
            self.emit(sequence)
            if sequence.state is State.RUNNING:
                self.scheduler.drop_stale_streaming(sequence)
        for chunk in plan.prefill:
            sequence = chunk.sequence
            sequence.num_computed = chunk.end
            self.publish(sequence, chunk.end)
            if chunk.is_last and sequence.prefill_only:
                self.finish(sequence)
            elif chunk.is_last:
                self.start(sequence)
            if sequence.state is State.PREFILL:
                self.scheduler.drop_stale_streaming(sequence)
        return plan

    def start(self, lead: Sequence) -> None:
        """Begins decoding all choices."""
        forks = self.scheduler.fork(lead)
        self.live += forks
        for sequence in [lead, *forks]:
            self.scheduler.start_decode(sequence)
            self.emit(sequence)

    def emit(self, sequence: Sequence) -> None:
        """Draws a token; ends the choice at its max_tokens."""
        sequence.token_ids.append(5)
        if sequence.num_tokens == len(sequence.request.prompt_token_ids) + sequence.request.sampling.max_tokens:
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, whatever its state."""
        self.scheduler.finish(sequence)
        self.swapped.discard(sequence)
        self.live.remove(sequence)

    def publish(self, sequence: Sequence, end: int) -> None:
        """Puts whole pages into the index."""
        if self.index is None or not sequence.chain:
            return
        last = min(end // PAGE_SIZE, len(sequence.chain))
        kept = set(self.residency.streaming_pages_kept(sequence.num_prefill))
        streaming = {i: p for i, p in sequence.streaming_pages.items() if i in kept and i < last}
        self.index.insert(sequence.chain[:last], sequence.retrieval_pages[:last], streaming)

    def check_plan(self, plan: Plan) -> None:
        """Everything that the step reads and writes is there."""
        for sequence in plan.decode:
            assert sequence.state is State.RUNNING and sequence.row is not None
            own = sequence.own_page
            assert len(sequence.retrieval_pages) == (own + 1 if self.has_retrieval else 0)
            if self.has_streaming:
                wanted = {*self.residency.streaming_pages_to_resume(sequence.position), own}
                assert set(sequence.streaming_pages) == wanted and len(wanted) <= MOST_STREAMING
            self.assert_private(sequence, own)
        assert sum(c.length for c in plan.prefill) <= self.chunk_size
        assert len({c.sequence.request.attention.dense for c in plan.prefill}) <= 1
        for chunk in plan.prefill:
            assert chunk.start % BLOCK_SIZE == 0 and chunk.length > 0
            assert chunk.is_last or chunk.length % BLOCK_SIZE == 0
            written = range(chunk.start // PAGE_SIZE, chunk.end // PAGE_SIZE + 1)
            needed = {*self.residency.streaming_pages_to_resume(chunk.start), *written}
            assert not self.has_streaming or needed <= set(chunk.sequence.streaming_pages)
            for page in written:
                self.assert_private(chunk.sequence, page)
        rows = [row for s in self.live for row in [*s.fork_rows, *([] if s.row is None else [s.row])]]
        assert len(set(rows)) == len(rows) <= self.num_rows
        assert len(plan.decode) <= self.max_batch_size

    def assert_private(self, sequence: Sequence, page: int) -> None:
        """A page that is written has one holder."""
        if self.has_retrieval:
            assert self.retrieval.refcount(sequence.retrieval_pages[page]) == 1
        if self.has_streaming:
            assert self.streaming.refcount(sequence.streaming_pages[page]) == 1

    def assert_idle(self) -> None:
        """Nothing is held but what the index keeps."""
        assert not self.live and not self.scheduler.has_work and not self.scheduler.held and not self.swapped
        assert [p.num_held for p in (self.retrieval, self.streaming, self.rows)] == [0, 0, 0]

    def drain(self, most: int = 5000) -> None:
        """Steps until all is done; every step must do something."""
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            plan = self.step()
            assert plan.decode or plan.prefill, "nothing progresses"
        raise AssertionError("the work does not end")
