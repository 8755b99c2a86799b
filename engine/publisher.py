"""What leaves an engine after a prefill chunk: pages for its own prefix index, the cluster's, and a decode worker."""

import time
from collections.abc import Sequence as SequenceOf

from .config import PAGE_SIZE
from .leases import LeaseTable
from .page_format import PageFormat
from .page_pool import PagePool
from .prefix_index import PrefixIndex
from .request import SampledToken
from .residency import Residency, resume_points
from .results import ChunkReady, WrittenPages
from .sequence import PrefillChunk, Sequence


class PagePublisher:
    """Keeps, names and leases the pages that prefill wrote. index: None where there is no prefix cache."""

    def __init__(
        self,
        page_format: PageFormat,
        residency: Residency,
        retrieval_pool: PagePool,
        streaming_pool: PagePool,
        row_pool: PagePool,
        index: PrefixIndex | None,
        lease_ttl_s: float,
    ) -> None:
        self._page_format, self._residency, self._index = page_format, residency, index
        self._retrieval_pool, self._streaming_pool, self._row_pool = retrieval_pool, streaming_pool, row_pool
        self._lease_ttl_s = lease_ttl_s
        self.leases = LeaseTable(time.monotonic, self._give_back)

    def keep(self, sequence: Sequence, end: int) -> None:
        """Puts whole pages up to position `end` into the worker's own index, of the streaming ones those to be kept."""
        if self._index is None or not sequence.chain:
            return
        last = min(end // PAGE_SIZE, len(sequence.chain))
        kept = set(self._residency.streaming_pages_kept(sequence.num_prefill))
        self._index.insert(
            sequence.chain[:last],
            sequence.retrieval_pages[:last],
            {i: p for i, p in sequence.streaming_pages.items() if i in kept and i < last},
        )

    def written(self, chunk: PrefillChunk) -> WrittenPages:
        """The chunk's whole pages under their chain hashes, for Redis and the directory."""
        sequence = chunk.sequence
        whole = range(chunk.start // PAGE_SIZE, min(chunk.end // PAGE_SIZE, len(sequence.chain)))
        kept = set(self._residency.streaming_pages_kept(sequence.num_prefill))
        retrieval = whole if self._page_format.num_retrieval_slots else range(0)
        points = [p for p in resume_points(sequence.num_prefill) if chunk.start < p <= chunk.end]
        return WrittenPages(
            tuple((sequence.chain[i], sequence.retrieval_pages[i]) for i in retrieval),
            tuple((sequence.chain[i], p) for i, p in sequence.streaming_pages.items() if i in kept and i in whole),
            tuple((p, sequence.chain[p // PAGE_SIZE - 1]) for p in points),
        )

    def announce(self, sequence: Sequence, end: int, first_tokens: SequenceOf[SampledToken] = ()) -> ChunkReady:
        """Leases the pages up to position `end` that were not announced yet and, at the prompt's end, the tail row."""
        is_last, begin = end == sequence.num_prefill, sequence.num_announced // PAGE_SIZE
        whole = range(begin, end // PAGE_SIZE)
        sequence.num_announced = max(sequence.num_announced, end)
        wanted = set(self._residency.streaming_pages_for_decode(sequence.num_prefill)) & sequence.streaming_pages.keys()
        retrieval_slots = self._page_format.num_retrieval_slots
        retrieval = tuple((i, sequence.retrieval_pages[i]) for i in whole) if retrieval_slots else ()
        streaming = tuple((i, sequence.streaming_pages[i]) for i in whole if i in wanted)
        row = sequence.row if is_last else None
        pages = [page for _, page in retrieval], [page for _, page in streaming]
        self._retrieval_pool.share(pages[0])
        self._streaming_pool.share(pages[1])
        if row is not None:
            self._row_pool.share([row])
        lease = self.leases.grant(*pages, row, self._lease_ttl_s)
        return ChunkReady(
            request_id=sequence.request_id,
            lease_id=lease.id,
            generation=lease.generation,
            start=begin * PAGE_SIZE,
            end=end,
            retrieval_pages=retrieval,
            streaming_pages=streaming,
            tail_row=row,
            first_tokens=tuple(first_tokens),
            last=is_last,
            num_cached_tokens=sequence.num_cached,
        )

    def _give_back(self, retrieval: SequenceOf[int], streaming: SequenceOf[int], row: int | None) -> None:
        self._retrieval_pool.release(retrieval)
        self._streaming_pool.release(streaming)
        if row is not None:
            self._row_pool.release([row])
