"""Page tables on the device, one line per tail row, kept up to date with little more than the pages that are new."""

from collections.abc import Sequence as SequenceOf

import torch

from lserve.kernels.upload import upload

from .kv_cache import KVCache
from .sequence import Sequence


class PageTables:
    """Page ids by page index for every row that decodes.

    retrieval, streaming: int32 [rows, max_pages]. Entries that no head may read hold whatever they held before.
    """

    def __init__(self, cache: KVCache, num_rows: int, max_pages: int) -> None:
        self._page_format, self._device = cache.page_format, cache.device
        self.retrieval = torch.zeros(num_rows, max_pages, dtype=torch.int32, device=cache.device)
        self.streaming = torch.zeros(num_rows, max_pages, dtype=torch.int32, device=cache.device)
        self._sources: list[list[int] | None] = [None] * num_rows
        self._written = [0] * num_rows

    def update(self, sequences: SequenceOf[Sequence]) -> None:
        """Writes what these sequences' tables gained since the last call."""
        retrieval: list[tuple[int, int, int]] = []
        streaming: list[tuple[int, int, int]] = []
        for sequence in sequences:
            row, own = sequence.row, sequence.own_page
            assert row is not None
            if self._sources[row] is not sequence.retrieval_pages:  # a new list with every row and every swap
                self._sources[row], self._written[row] = sequence.retrieval_pages, 0
            first = self._written[row]
            if first > own:
                continue
            if self._page_format.num_retrieval_slots:
                retrieval += [(row, i, sequence.retrieval_pages[i]) for i in range(first, own + 1)]
            if self._page_format.num_streaming_slots:
                streaming += [(row, i, page) for i, page in sequence.streaming_pages.items() if i >= first]
            self._written[row] = own + 1
        for table, entries in ((self.retrieval, retrieval), (self.streaming, streaming)):
            if entries:
                rows, indices, pages = upload(entries, torch.int64, self._device).unbind(1)
                table[rows, indices] = pages.int()
