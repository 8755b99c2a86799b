"""The whole scheduling policy: who is admitted, which chunks and tokens a step computes, who is preempted. No torch.

A sequence is admitted when pages for its whole input (and rows for all its choices) are there, oldest first;
swapped-out sequences go before new ones. A step takes one token of every running sequence and up to `chunk_size`
prompt tokens. When decode runs out of pages the youngest running sequence is preempted.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .config import BLOCK_SIZE, PAGE_SIZE, SchedulerConfig, SparsityConfig
from .errors import CapacityError
from .page_pool import PagePool
from .prefix_index import PrefixIndex
from .residency import Residency
from .sequence import PrefillChunk, Sequence, State


@dataclass(slots=True)
class Plan:
    """What one step does, in this order: swap in, decode, prefill."""

    swapped_in: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)


class Scheduler:
    """Owns the queues and the page tables of all sequences of one engine.

    swap_out(sequence) -> bool copies its pages to host memory before they are released; False means that memory is
    full, and the sequence is recomputed instead. has_retrieval, has_streaming: whether a class has any slots.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        sparsity: SparsityConfig,
        residency: Residency,
        retrieval: PagePool,
        streaming: PagePool,
        rows: PagePool,
        index: PrefixIndex | None,
        swap_out: Callable[[Sequence], bool],
        has_retrieval: bool,
        has_streaming: bool,
    ) -> None:
        self._config, self._sparsity, self._residency = config, sparsity, residency
        self._retrieval, self._streaming, self._rows = retrieval, streaming, rows
        self._index, self._swap_out = index, swap_out
        self._has_retrieval, self._has_streaming = has_retrieval, has_streaming
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()
        self.held: list[Sequence] = []
        self.num_preemptions = 0
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything now or after pages come free (held sequences wait for someone else)."""
        return bool(self.waiting or self.swapped or self.prefilling or self.running)

    @property
    def prompts_to_compute(self) -> list[int]:
        """Tokens left of each prompt that is to be computed here, in the order of their turns."""
        waiting = (s for s in self.waiting if s.prefill_only or not s.hold)
        return [s.num_prefill - s.num_computed for s in (*self.prefilling, *waiting)]

    @property
    def waiting_pages(self) -> int:
        """Retrieval pages that the waiting sequences will ask for."""
        return sum(s.num_prefill // PAGE_SIZE + 1 for s in self.waiting) if self._has_retrieval else 0

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence. Raises CapacityError when `max_waiting` sequences wait already."""
        if len(self.waiting) >= self._config.max_waiting:
            raise CapacityError(f"{len(self.waiting)} requests are waiting already, the most that this worker queues")
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """Decides the next step and allocates every page it writes."""
        plan = Plan()
        for sequence in list(self.running):
            self._grow(sequence)
        self._swap_in(plan)
        self._admit(plan)
        plan.decode = list(self.running)
        self._chunks(plan)
        return plan

    def reserve_streaming(self, sequence: Sequence, indices: list[int]) -> None:
        """Gives the sequence streaming pages at these page indices, where it has none. Raises CapacityError."""
        missing = [i for i in indices if i not in sequence.streaming_pages] if self._has_streaming else []
        sequence.streaming_pages.update(zip(missing, self._streaming.allocate(len(missing)), strict=True))

    def start_prefill(self, sequence: Sequence, num_computed: int) -> None:
        """A held sequence's pages are filled up to num_computed (a multiple of 128): the rest is computed here."""
        self.held.remove(sequence)
        sequence.num_computed = num_computed
        sequence.state = State.PREFILL
        self.prefilling.append(sequence)

    def start_decode(self, sequence: Sequence) -> None:
        """The sequence's whole input is in pages and tail, and its first token is appended: it joins the batch."""
        if sequence in self.held:
            self.held.remove(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        sequence.state = State.RUNNING
        self.running.append(sequence)
        self.drop_stale_streaming(sequence)

    def fork(self, lead: Sequence) -> list[Sequence]:
        """Sequences for the request's further choices, sharing the lead's whole pages; call after prefill, before
        start_decode.

        Each takes one of the lead's fork rows; the caller copies the tail. Its own page comes with its first step.
        """
        whole = lead.num_prefill // PAGE_SIZE
        forks = []
        for number in range(1, lead.num_forks + 1):
            sequence = Sequence(lead.request, lead.choice + number, list(lead.token_ids), lead.num_prefill)
            sequence.num_computed, sequence.num_cached = lead.num_computed, lead.num_cached
            sequence.row = lead.fork_rows.pop()
            sequence.retrieval_pages = lead.retrieval_pages[:whole]
            self._retrieval.share(sequence.retrieval_pages)
            sequence.streaming_pages = {i: page for i, page in lead.streaming_pages.items() if i < whole}
            self._streaming.share(sequence.streaming_pages.values())
            forks.append(sequence)
        lead.num_forks = 0
        return forks

    def drop_stale_streaming(self, sequence: Sequence) -> None:
        """Releases streaming pages that left the window of the next position and are no sink."""
        wanted = self._residency.streaming_pages_to_resume(sequence.num_computed)
        stale = [i for i in sequence.streaming_pages if i not in wanted and i < sequence.num_computed // PAGE_SIZE]
        self._streaming.release([sequence.streaming_pages.pop(i) for i in stale])

    def finish(self, sequence: Sequence) -> None:
        """Takes the sequence out of every queue and releases all it holds. Idempotent."""
        for queue in (self.waiting, self.swapped, self.held, self.prefilling, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)
        sequence.state = State.FINISHED

    def preempt(self, sequence: Sequence) -> None:
        """Moves a running sequence out of device memory: to host memory, or back to the waiting queue to be
        recomputed.
        """
        self.running.remove(sequence)
        self.num_preemptions += 1
        if self._swap_out(sequence):
            self._release(sequence)
            sequence.state = State.SWAPPED
            self.swapped.append(sequence)
            return
        self._release(sequence)
        sequence.num_prefill, sequence.num_computed = sequence.num_tokens, 0
        sequence.hold, sequence.fresh, sequence.state = False, True, State.WAITING
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._retrieval.release(sequence.retrieval_pages)
        self._streaming.release(list(sequence.streaming_pages.values()))
        rows = sequence.fork_rows + ([] if sequence.row is None else [sequence.row])
        self._rows.release(rows)
        sequence.retrieval_pages, sequence.streaming_pages = [], {}
        sequence.fork_rows, sequence.row = [], None

    def _swap_in(self, plan: Plan) -> None:
        while self.swapped and len(self.running) < self._config.max_batch_size:
            sequence = self.swapped[0]
            count = sequence.own_page + 1
            try:
                rows = self._rows.allocate(1)
            except CapacityError:
                return
            try:
                sequence.retrieval_pages = self._retrieval.allocate(count if self._has_retrieval else 0)
                self.reserve_streaming(
                    sequence, [*self._residency.streaming_pages_to_resume(sequence.position), count - 1]
                )
            except CapacityError:
                sequence.fork_rows = rows
                self._release(sequence)
                return
            sequence.row, sequence.state = rows[0], State.RUNNING
            self.swapped.popleft()
            self.running.append(sequence)
            plan.swapped_in.append(sequence)

    def _admit(self, plan: Plan) -> None:
        while self.waiting and not self.swapped:
            sequence = self.waiting[0]
            if not self._reserve(sequence):
                return
            self.waiting.popleft()
            plan.admitted.append(sequence)
            if sequence.hold:
                sequence.state = State.HELD
                self.held.append(sequence)
            else:
                sequence.state = State.PREFILL
                self.prefilling.append(sequence)

    def _reserve(self, sequence: Sequence) -> bool:
        """Takes the prefix hit, then pages for the whole input and the first output token, and rows for every
        choice.
        """
        busy = len(self.running) + len(self.prefilling) + len(self.held) + sum(len(s.fork_rows) for s in self._seated())
        seats = 1 if sequence.prefill_only else 1 + sequence.num_forks
        if busy + seats > self._config.max_batch_size:
            return False
        try:
            rows = self._rows.allocate(seats)
        except CapacityError:
            return False
        sequence.row, sequence.fork_rows = rows[0], rows[1:]
        if self._index is not None and sequence.chain:
            hit = self._index.lookup(sequence.chain, sequence.num_prefill)
            sequence.retrieval_pages = list(hit.retrieval_pages)
            sequence.streaming_pages = dict(hit.streaming_pages)
            sequence.num_computed = sequence.num_cached = hit.num_tokens
        try:
            needed = sequence.num_prefill // PAGE_SIZE + 1 - sequence.num_computed // PAGE_SIZE
            sequence.retrieval_pages += self._retrieval.allocate(needed if self._has_retrieval else 0)
            if sequence.hold:
                self.reserve_streaming(sequence, self._residency.streaming_pages_for_decode(sequence.num_prefill))
            elif self._has_streaming and self._streaming.num_available < self._chunk_pages():
                raise CapacityError("streaming pages are short")
        except CapacityError:
            self._release(sequence)
            sequence.num_computed = sequence.num_cached = 0
            return False
        return True

    def _take_what_came(self, sequence: Sequence) -> None:
        """Before its first chunk: what others with the same start have computed since it was admitted."""
        if self._index is None or not sequence.chain or sequence.num_computed > sequence.num_cached:
            return
        if self._index.match(sequence.chain, sequence.num_prefill) <= sequence.num_cached:
            return
        hit = self._index.lookup(sequence.chain, sequence.num_prefill)
        count = len(hit.retrieval_pages)
        self._retrieval.release(sequence.retrieval_pages[:count])
        sequence.retrieval_pages[:count] = hit.retrieval_pages
        self._streaming.release([p for i, p in sequence.streaming_pages.items() if i in hit.streaming_pages])
        sequence.streaming_pages |= hit.streaming_pages
        sequence.num_computed = sequence.num_cached = hit.num_tokens

    def _seated(self) -> list[Sequence]:
        return self.prefilling + self.held

    def _chunk_pages(self) -> int:
        return self._config.chunk_size // PAGE_SIZE + 1

    def _grow(self, sequence: Sequence) -> None:
        """Gives a running sequence the page of its newest token, preempting the youngest when pages are short."""
        own_page = sequence.own_page
        while sequence.state is State.RUNNING:
            try:
                if self._has_retrieval and own_page >= len(sequence.retrieval_pages):
                    sequence.retrieval_pages += self._retrieval.allocate(1)
                if own_page not in sequence.streaming_pages:
                    self.reserve_streaming(sequence, [own_page])
                return
            except CapacityError:
                self.preempt(self.running[-1])

    def _chunks(self, plan: Plan) -> None:
        """Fills the step's prompt tokens, oldest first; only a sequence's last chunk is no multiple of 128."""
        room = self._config.chunk_size
        for sequence in self.prefilling:
            if room < BLOCK_SIZE:
                return
            self._take_what_came(sequence)
            left = sequence.num_prefill - sequence.num_computed
            length = left if left <= room else room // BLOCK_SIZE * BLOCK_SIZE
            start = sequence.num_computed
            pages = range(start // PAGE_SIZE, (start + length) // PAGE_SIZE + 1)
            if plan.prefill and plan.prefill[0].sequence.request.attention.dense != sequence.request.attention.dense:
                return
            try:
                self.reserve_streaming(sequence, list(pages))
            except CapacityError:
                return
            plan.prefill.append(PrefillChunk(sequence, start, length))
            room -= length
