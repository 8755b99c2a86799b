"""What the router, decode workers and prefill workers say to each other. Every message is immutable and plain data.

::

    router  -- Request, PrefixHint -->  decode worker  -- PrefillRequest -->  prefill worker
    router  <-- list[Output] ---------  decode worker  <-- ChunkReady ------  prefill worker
    router  <-- WorkerLoad, WorkerInfo  decode worker
"""

from dataclasses import dataclass

from lserve.engine.request import Request, SampledToken


@dataclass(frozen=True, slots=True)
class PrefixHint:
    """The longest prefix of a prompt that the directory knows, and who holds it.

    num_tokens: length of that prefix, a resume point; 0 when nothing is known.
    worker_ids: prefill workers that hold it in their pools, best first (they go into `PrefillRequest.prefer`).
    prefer: decode workers to call, best first; read by `routing.AddressedRouter`, not by the worker.
    """

    num_tokens: int = 0
    worker_ids: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change while a worker lives.

    worker_id: `routing.own_worker_id()` of the replica. format_id: of every page it writes.
    max_model_len: most tokens of prompt and answer together that one choice may have.
    """

    worker_id: str
    format_id: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How full a decode worker is. Pages are retrieval pages; running and waiting count choices."""

    worker_id: str
    reserved_pages: int
    total_pages: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Asks a prefill worker for a prompt's pages.

    have_tokens: leading tokens whose pages the decode worker holds already: they are not announced.
    prefer: prefill workers to call, best first; read by `routing.AddressedRouter`, not by the worker.
    """

    request: Request
    have_tokens: int = 0
    prefer: tuple[str, ...] = ()


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
