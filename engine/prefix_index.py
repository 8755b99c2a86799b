"""A worker's own prefix cache: chain hashes to the pages that are still in its pools."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import BLOCK_SIZE, PAGE_SIZE, RESUME_INTERVAL
from .page_pool import PagePool
from .residency import Residency, last_resume_point
from .sealed_page import PageKey


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The cached start of a prompt: its length in tokens (a multiple of 128; 0 is a miss) and its pages.

    retrieval_pages: page ids by page index, for all of it (empty where the model has no retrieval heads).
    streaming_pages: page index to page id, of the sink and the window before the end of the hit.
    """

    num_tokens: int = 0
    retrieval_pages: list[int] = field(default_factory=list)
    streaming_pages: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    page: int
    parent: bytes | None
    num_children: int = 0


class PrefixIndex:
    """Finds, keeps and forgets the pages of prompts' starts.

    It holds one reference on each page it knows and gives the least recently used idle ones back when a pool runs
    short (it installs itself as the pools' `reclaim`). A chain is given up from its deepest page on, so a page that
    stays can always be reached. Every use touches a chain from its end to its start; that alone keeps the order right.

    retrieval_pool, streaming_pool: None where the model has no heads of that class.
    """

    def __init__(self, retrieval_pool: PagePool | None, streaming_pool: PagePool | None, residency: Residency) -> None:
        assert retrieval_pool is not None or streaming_pool is not None, "a model has heads of one class at least"
        self.residency = residency
        self._retrieval_pool = retrieval_pool
        self._streaming_pool = streaming_pool
        self._retrieval: OrderedDict[bytes, _Entry] = OrderedDict()
        self._streaming: OrderedDict[bytes, int] = OrderedDict()
        if retrieval_pool is not None:
            retrieval_pool.reclaim = self._reclaim_retrieval
        if streaming_pool is not None:
            streaming_pool.reclaim = self._reclaim_streaming

    @property
    def num_retrieval_pages(self) -> int:
        """Retrieval pages in the index."""
        return len(self._retrieval)

    @property
    def num_streaming_pages(self) -> int:
        """Streaming pages in the index."""
        return len(self._streaming)

    def keys(self) -> list[PageKey]:
        """Everything that is kept, the most recently used first, each chain from its start on."""
        retrieval = [PageKey(chain_hash, "retrieval") for chain_hash in reversed(self._retrieval)]
        return retrieval + [PageKey(chain_hash, "streaming") for chain_hash in reversed(self._streaming)]

    def resume_points(self) -> list[tuple[int, bytes]]:
        """(tokens, chain hash) where prompts that begin with what is kept may be taken up; retrieval heads only."""
        lengths: dict[bytes, int] = {}
        for chain_hash in self._retrieval:
            path = []
            link: bytes | None = chain_hash
            while link is not None and link not in lengths:
                path.append(link)
                link = self._retrieval[link].parent
            length = 0 if link is None else lengths[link]
            for link in reversed(path):
                length += PAGE_SIZE
                lengths[link] = length
        points = {h: n for h, n in lengths.items() if n % RESUME_INTERVAL == 0}
        for chain_hash, entry in self._retrieval.items():
            if entry.num_children == 0:  # the last multiples of 128; a prompt's last token is computed in any case
                link = chain_hash
                for _ in range(2 * BLOCK_SIZE // PAGE_SIZE):
                    if link is not None:
                        points |= {link: lengths[link]} if lengths[link] % BLOCK_SIZE == 0 else {}
                        link = self._retrieval[link].parent
        return [(tokens, chain_hash) for chain_hash, tokens in points.items()]

    def page(self, key: PageKey) -> int | None:
        """The page that is kept under a key; None when it is not (any more)."""
        if key.head_class == "streaming":
            return self._streaming.get(key.chain_hash)
        entry = self._retrieval.get(key.chain_hash)
        return None if entry is None else entry.page

    def match(self, hashes: Sequence[bytes], prompt_length: int) -> int:
        """How many tokens `lookup` would return; takes no references and changes nothing."""
        limit = min(last_resume_point(prompt_length), len(hashes) * PAGE_SIZE)
        if self._retrieval_pool is not None:
            limit = self._num_retrieval_known(hashes[: limit // PAGE_SIZE]) * PAGE_SIZE
        for point in range(limit // BLOCK_SIZE * BLOCK_SIZE, 0, -BLOCK_SIZE):
            if self._streaming_pool is None or self._can_resume(hashes, point):
                return point
        return 0

    def lookup(self, hashes: Sequence[bytes], prompt_length: int) -> PrefixHit:
        """The longest start of a prompt that is here whole, with one reference per page taken for the caller.

        hashes: the chain hashes of the prompt's full pages. The hit ends at a multiple of 128 and leaves at least one
        prompt token to compute. Any multiple of 128 serves, since the resume points of *other* prompts that begin
        alike lie there too: the last one of a conversation's previous turn, for one.
        """
        num_tokens = self.match(hashes, prompt_length)
        if num_tokens == 0:
            return PrefixHit()
        retrieval_pages: list[int] = []
        streaming_pages: dict[int, int] = {}
        if self._retrieval_pool is not None:
            chain = hashes[: num_tokens // PAGE_SIZE]
            retrieval_pages = [self._retrieval[chain_hash].page for chain_hash in chain]
            self._retrieval_pool.share(retrieval_pages)
            self._touch(self._retrieval, chain)
        if self._streaming_pool is not None:
            indices = self.residency.streaming_pages_to_resume(num_tokens)
            streaming_pages = {index: self._streaming[hashes[index]] for index in indices}
            self._streaming_pool.share(streaming_pages.values())
            self._touch(self._streaming, [hashes[index] for index in indices])
        return PrefixHit(num_tokens, retrieval_pages, streaming_pages)

    def insert(
        self, hashes: Sequence[bytes], retrieval_pages: Sequence[int], streaming_pages: Mapping[int, int]
    ) -> None:
        """Keep the start of a prompt; the caller holds a reference on every page and goes on holding it.

        hashes, retrieval_pages: one per full page, from the prompt's first on (no retrieval pages where the model has
        no such heads). streaming_pages: page index to page id, any of those that `Residency.streaming_pages_kept`
        lists. May be called again with more pages as chunks finish. A page that is known under its hash stays; the
        caller's copy of it is not kept.
        """
        if self._retrieval_pool is not None:
            assert len(hashes) == len(retrieval_pages), f"{len(hashes)} hashes for {len(retrieval_pages)} pages"
            parent: bytes | None = None
            for chain_hash, page in zip(hashes, retrieval_pages, strict=True):
                if chain_hash not in self._retrieval:
                    self._retrieval_pool.cache(page)
                    self._retrieval[chain_hash] = _Entry(page, parent)
                    if parent is not None:
                        self._retrieval[parent].num_children += 1
                parent = chain_hash
            self._touch(self._retrieval, hashes)
        if self._streaming_pool is not None:
            indices = sorted(streaming_pages)
            for index in indices:
                if hashes[index] not in self._streaming:
                    self._streaming_pool.cache(streaming_pages[index])
                    self._streaming[hashes[index]] = streaming_pages[index]
            self._touch(self._streaming, [hashes[index] for index in sorted({*indices, *self._sink_known(hashes)})])

    def clear(self) -> None:
        """Forget everything; pages that nobody else holds become free."""
        for chain_hash in list(self._retrieval):
            self._forget_retrieval(chain_hash)
        for chain_hash in list(self._streaming):
            self._forget_streaming(chain_hash)

    def _num_retrieval_known(self, hashes: Sequence[bytes]) -> int:
        # A chain is given up from its end only, so what is known of it is a start: bisect for its length.
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in self._retrieval:
                low = middle + 1
            else:
                high = middle
        return low

    def _can_resume(self, hashes: Sequence[bytes], point: int) -> bool:
        needed = self.residency.streaming_pages_to_resume(point)
        return all(hashes[index] in self._streaming for index in reversed(needed))

    def _sink_known(self, hashes: Sequence[bytes]) -> list[int]:
        sink = self.residency.sink_pages(len(hashes) * PAGE_SIZE)
        return [index for index in sink if hashes[index] in self._streaming]

    @staticmethod
    def _touch(entries: OrderedDict[bytes, Any], hashes: Sequence[bytes]) -> None:
        for chain_hash in reversed(hashes):
            entries.move_to_end(chain_hash)

    def _reclaim_retrieval(self, num_pages: int) -> None:
        skipped = 0
        while num_pages > 0 and skipped < len(self._retrieval):
            chain_hash, entry = next(iter(self._retrieval.items()))
            assert self._retrieval_pool is not None
            if entry.num_children == 0 and self._retrieval_pool.is_idle(entry.page):
                self._forget_retrieval(chain_hash)
                num_pages -= 1
                skipped = 0
            else:
                self._retrieval.move_to_end(chain_hash)
                skipped += 1

    def _reclaim_streaming(self, num_pages: int) -> None:
        skipped = 0
        while num_pages > 0 and skipped < len(self._streaming):
            chain_hash, page = next(iter(self._streaming.items()))
            assert self._streaming_pool is not None
            if self._streaming_pool.is_idle(page):
                self._forget_streaming(chain_hash)
                num_pages -= 1
                skipped = 0
            else:
                self._streaming.move_to_end(chain_hash)
                skipped += 1

    def _forget_retrieval(self, chain_hash: bytes) -> None:
        assert self._retrieval_pool is not None
        entry = self._retrieval.pop(chain_hash)
        self._retrieval_pool.uncache(entry.page)
        parent = None if entry.parent is None else self._retrieval.get(entry.parent)
        if parent is not None:
            parent.num_children -= 1
        if chain_hash in self._streaming:  # no hit can reach it any more
            self._forget_streaming(chain_hash)

    def _forget_streaming(self, chain_hash: bytes) -> None:
        assert self._streaming_pool is not None
        self._streaming_pool.uncache(self._streaming.pop(chain_hash))
