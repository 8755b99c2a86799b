"""The pages of one head class: who holds which, and which are free. Numbers only; the bytes are in `kv_cache.py`."""

from collections.abc import Callable, Iterable, Sequence

from .errors import CapacityError


class PagePool:
    """Hands out page ids 0 to num_pages - 1 and counts their references; every operation is O(1) per page.

    Requests, leases and transfers each hold references of their own (`allocate`, `share`, `release`). The prefix index
    holds at most one on each page (`cache`, `uncache`), counted apart, so that the pool knows without looking which
    pages are *idle*: nobody but the index holds them, and it can give them back when others need room. Not thread-safe:
    the engine's thread owns it.

    reclaim: called with the number of missing pages when too few are free but enough are idle; it is expected to
        `uncache` that many idle pages.
    """

    def __init__(self, num_pages: int, name: str, reclaim: Callable[[int], object] | None = None) -> None:
        assert num_pages >= 0, f"a pool cannot have {num_pages} pages"
        self.name = name
        self.num_pages = num_pages
        self.reclaim = reclaim
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._generations = [0] * num_pages
        self._cached = bytearray(num_pages)
        self._num_cached = 0
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds, the prefix index included."""
        return self.num_pages - len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that the prefix index holds, alone or together with others."""
        return self._num_cached

    @property
    def num_idle(self) -> int:
        """Pages that the prefix index alone holds."""
        return self._num_idle

    @property
    def num_held(self) -> int:
        """Pages that a request, lease or transfer holds: zero when the worker is idle, whatever its index keeps."""
        return self.num_used - self._num_idle

    @property
    def num_available(self) -> int:
        """How many pages `allocate` can give: free ones and idle ones."""
        return len(self._free) + (self._num_idle if self.reclaim is not None else 0)

    def refcount(self, page: int) -> int:
        """How many references there are on the page, the prefix index's included."""
        return self._references[page]

    def generation(self, page: int) -> int:
        """How often the page was allocated. A note of (page, generation) is stale when this has risen since."""
        return self._generations[page]

    def is_idle(self, page: int) -> bool:
        """Whether the prefix index alone holds the page."""
        return bool(self._cached[page]) and self._references[page] == 1

    def allocate(self, num_pages: int) -> list[int]:
        """Take `num_pages` pages, one reference on each; raises CapacityError, taking none, when there are too few."""
        assert num_pages >= 0, f"{self.name}: cannot allocate {num_pages} pages"
        if num_pages > len(self._free) and self.reclaim is not None and num_pages <= self.num_available:
            self.reclaim(num_pages - len(self._free))
        if num_pages > len(self._free):
            raise CapacityError(
                f"{num_pages} {self.name} pages are needed and {self.num_available} of {self.num_pages} are available"
            )
        if num_pages == 0:
            return []
        pages = self._free[: -num_pages - 1 : -1]
        del self._free[-num_pages:]
        for page in pages:
            self._references[page] = 1
            self._generations[page] += 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Take one more reference on each page; all must be in use."""
        for page in pages:
            count = self._references[page]
            assert page >= 0 and count > 0, f"{self.name}: page {page} is free and cannot be shared"
            self._num_idle -= count == 1 and self._cached[page]
            self._references[page] = count + 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """Give one reference on each page back; returns the pages that are free now.

        The index's own reference is not the caller's to give: releasing an idle or a free page is an assertion error.
        """
        freed = []
        for page in pages:
            count = self._references[page] - 1
            assert page >= 0 and count >= self._cached[page], f"{self.name}: page {page} is released and nobody held it"
            self._references[page] = count
            if count == 0:
                freed.append(page)
            else:
                self._num_idle += count == 1 and self._cached[page]
        self._free.extend(freed)
        return freed

    def cache(self, page: int) -> None:
        """Take the prefix index's reference on a page that is in use and not in the index."""
        assert page >= 0 and self._references[page] > 0, f"{self.name}: page {page} is free and cannot be cached"
        assert not self._cached[page], f"{self.name}: page {page} is in the prefix index already"
        self._cached[page] = 1
        self._references[page] += 1
        self._num_cached += 1

    def uncache(self, page: int) -> bool:
        """Give the prefix index's reference back; returns whether the page is free now."""
        assert page >= 0 and self._cached[page], f"{self.name}: page {page} is not in the prefix index"
        self._cached[page] = 0
        self._num_cached -= 1
        self._references[page] -= 1
        if self._references[page] > 0:
            return False
        self._num_idle -= 1
        self._free.append(page)
        return True
