"""What a step of the engine brings, as plain data. No torch."""

from dataclasses import dataclass, field

from .errors import LServeError
from .request import Output, SampledToken


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """One finished chunk of a prompt, ready to be pulled under one lease.

    start, end: the chunk's token positions. retrieval_pages, streaming_pages: (page index, page id) pairs, where the
    page index is position // page_size and the page id belongs to the prefill worker's pool.
    tail_row: row of the prefill worker's tail pool that holds the incomplete page; only with the last chunk.
    first_tokens: first token of each choice; only with the last chunk.
    num_cached_tokens: prompt tokens that the prefill worker took from a prefix cache.
    """

    request_id: str
    lease_id: int
    generation: int
    start: int
    end: int
    retrieval_pages: tuple[tuple[int, int], ...]
    streaming_pages: tuple[tuple[int, int], ...]
    tail_row: int | None = None
    first_tokens: tuple[SampledToken, ...] = ()
    last: bool = False
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WrittenPages:
    """Whole pages that prefill computed in this step and that others may reuse: (chain hash, page id) pairs.

    resume_points: (tokens, chain hash) of the resume points now complete, for the directory.
    """

    retrieval: tuple[tuple[bytes, int], ...]
    streaming: tuple[tuple[bytes, int], ...]
    resume_points: tuple[tuple[int, bytes], ...]


@dataclass(slots=True)
class StepResult:
    """What a step brought: new output, announced chunks, requests whose pages are now reserved, pages, failed requests.

    computed: whether the model ran; when not, everything waits for pages. Pages in `written` may be overwritten by the
    next step: copy them before it. density: phase to the fraction of dense attention's work that the step did.
    prefill_tokens: prompt tokens that it computed. seconds: how long it took.
    """

    outputs: list[Output] = field(default_factory=list)
    chunks: list[ChunkReady] = field(default_factory=list)
    admitted: list["Reservation"] = field(default_factory=list)
    written: list[WrittenPages] = field(default_factory=list)
    errors: list[tuple[str, LServeError]] = field(default_factory=list)
    computed: bool = False
    density: dict[str, float] = field(default_factory=dict)
    prefill_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Pages that an admitted request owns: retrieval page ids by page index, streaming ids by index, its row, and the
    hit.

    admitted_at: monotonic seconds.
    """

    request_id: str
    retrieval_pages: tuple[int, ...]
    streaming_pages: dict[int, int]
    row: int
    num_cached_tokens: int
    chain: tuple[bytes, ...]
    admitted_at: float


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How full the engine is. running, waiting: sequences. leases: alive ones.

    used_pages: retrieval pages that a request or lease holds. cached_pages: those that the prefix index alone holds.
    The same of streaming pages and tail rows. All used_ counts and leases are zero when the worker is idle.

    waiting_pages: retrieval pages that waiting sequences will need. queued_prompts, queued_tokens: prompts, and what is
    left of them to compute, that wait for the prompt in progress, which has head_tokens left.

    preemptions: how often so far a running sequence made room for others.
    """

    running: int
    waiting: int
    used_pages: int
    total_pages: int
    cached_pages: int
    used_streaming_pages: int
    total_streaming_pages: int
    cached_streaming_pages: int
    used_rows: int
    total_rows: int
    leases: int
    waiting_pages: int
    queued_prompts: int
    queued_tokens: int
    head_tokens: int
    preemptions: int = 0
