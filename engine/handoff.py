"""What a prefill engine announces: one finished chunk, its pages, and the lease to pull them under."""

from dataclasses import dataclass

from .request import SampledToken


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
