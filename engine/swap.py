"""Host memory for preempted sequences: pages, tail and page choices go out and come back exactly."""

from dataclasses import dataclass

import torch

from .kv_cache import KVCache
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Saved:
    retrieval: torch.Tensor
    streaming: torch.Tensor
    streaming_index: list[int]
    tail: torch.Tensor
    selection: tuple[torch.Tensor, torch.Tensor]
    num_bytes: int


class HostSwap:
    """Copies of preempted sequences, at most `limit_bytes` in all."""

    def __init__(self, cache: KVCache, limit_bytes: int) -> None:
        self._cache, self._limit = cache, limit_bytes
        self._saved: dict[Sequence, _Saved] = {}
        self.used_bytes = 0

    def save(self, sequence: Sequence) -> bool:
        """Copies the sequence's pages, tail row and page choices; False, and nothing kept, when they do not fit."""
        assert sequence.row is not None
        index = sorted(sequence.streaming_pages)
        page_format = self._cache.page_format
        needed = len(sequence.retrieval_pages) * page_format.retrieval_page_bytes
        needed += len(index) * page_format.streaming_page_bytes
        needed += page_format.tail_row_bytes + self._cache.selection_row_bytes
        if self.used_bytes + needed > self._limit:
            return False
        saved = _Saved(
            self._export("retrieval", sequence.retrieval_pages),
            self._export("streaming", [sequence.streaming_pages[i] for i in index]),
            index,
            self._cache.export("tail", [sequence.row]),
            self._cache.export_selection(sequence.row),
            needed,
        )
        self._saved[sequence] = saved
        self.used_bytes += needed
        return True

    def restore(self, sequence: Sequence) -> None:
        """Writes a saved sequence into the pages and row that it holds now, and forgets the copy."""
        saved = self._saved[sequence]
        assert sequence.row is not None
        if saved.retrieval.numel():
            self._cache.restore("retrieval", sequence.retrieval_pages[: saved.retrieval.shape[0]], saved.retrieval)
        if saved.streaming.numel():
            kept = [n for n, i in enumerate(saved.streaming_index) if i in sequence.streaming_pages]
            pages = [sequence.streaming_pages[saved.streaming_index[n]] for n in kept]
            self._cache.restore("streaming", pages, saved.streaming[kept])
        self._cache.restore("tail", [sequence.row], saved.tail)
        self._cache.restore_selection(sequence.row, saved.selection)
        self.discard(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Forgets a saved sequence (finished, aborted or restored); nothing happens when there is none."""
        saved = self._saved.pop(sequence, None)
        if saved is not None:
            self.used_bytes -= saved.num_bytes

    def _export(self, pool: str, pages: list[int]) -> torch.Tensor:
        return self._cache.export(pool, pages) if pool in self._cache.pools else torch.empty(0, dtype=torch.uint8)
