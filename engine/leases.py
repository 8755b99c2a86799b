"""Leases: time-limited rights to pull pages. What a lease holds stays in place until it ends, and it always ends."""

import heapq
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

LeaseState = Literal["held", "gone"]
"""`held`: the lease was alive, so what was pulled under it counts. `gone`: it was not; throw the bytes away."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One right to pull pages and perhaps a tail row.

    generation: 64 bits that no other lease of any worker process has: a worker that restarted, an id used again show.
    expires_at: on the granting table's clock, in seconds.
    """

    id: int
    generation: int
    expires_at: float
    retrieval_pages: tuple[int, ...] = ()
    streaming_pages: tuple[int, ...] = ()
    tail_row: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseCounts:
    """held: alive now. released, expired: ended so far, by the holder in time and by the clock."""

    held: int
    released: int
    expired: int


class LeaseTable:
    """The leases of one worker. Not thread-safe: the engine's thread owns it.

    clock: seconds, monotonic. give_back: called once for every lease that ends, however it ends, with its retrieval
        pages, streaming pages and tail row: the references that the granter handed over.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        give_back: Callable[[Sequence[int], Sequence[int], int | None], None],
    ) -> None:
        self._clock = clock
        self._give_back = give_back
        self._leases: dict[int, Lease] = {}
        self._expiries: list[tuple[float, int]] = []
        self._next_id = 0
        self._process_generation = secrets.randbits(64)
        self._num_released = 0
        self._num_expired = 0

    @property
    def counts(self) -> LeaseCounts:
        """How many leases are alive and how the others ended."""
        return LeaseCounts(len(self._leases), self._num_released, self._num_expired)

    @property
    def num_held(self) -> int:
        """Leases that are alive."""
        return len(self._leases)

    @property
    def is_drained(self) -> bool:
        """Whether no lease is alive: a worker may stop only then."""
        return not self._leases

    def grant(
        self,
        retrieval_pages: Sequence[int],
        streaming_pages: Sequence[int],
        tail_row: int | None,
        ttl_s: float,
    ) -> Lease:
        """A new lease for `ttl_s` seconds; it takes over the caller's references on the pages and the row."""
        assert ttl_s > 0, f"a lease of {ttl_s} s would never be alive"
        lease = Lease(
            id=self._next_id,
            generation=(self._process_generation + self._next_id) % 2**64,
            expires_at=self._clock() + ttl_s,
            retrieval_pages=tuple(retrieval_pages),
            streaming_pages=tuple(streaming_pages),
            tail_row=tail_row,
        )
        self._next_id += 1
        self._store(lease)
        return lease

    def extend(self, lease_id: int, generation: int, ttl_s: float) -> LeaseState:
        """Let the lease live at least `ttl_s` seconds from now; a lease that is gone stays gone."""
        lease = self._alive(lease_id, generation)
        if lease is None:
            return "gone"
        expires_at = self._clock() + ttl_s
        if expires_at > lease.expires_at:
            self._store(replace(lease, expires_at=expires_at))
        return "held"

    def release(self, lease_id: int, generation: int) -> LeaseState:
        """End the lease. Only the answer `held` says that its pages stood still until now."""
        lease = self._alive(lease_id, generation)
        if lease is None:
            return "gone"
        self._num_released += 1
        self._end(lease)
        return "held"

    def is_alive(self, lease_id: int, generation: int) -> bool:
        """Whether the lease has neither been released nor run out."""
        return self._alive(lease_id, generation) is not None

    def expire(self, now: float | None = None) -> list[Lease]:
        """End every lease whose time is up at `now` (default: the clock's) and return them, earliest first."""
        now = self._clock() if now is None else now
        expired = []
        while self._expiries and self._expiries[0][0] <= now:
            expires_at, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is None or lease.expires_at != expires_at:
                continue  # released, or extended since
            self._num_expired += 1
            self._end(lease)
            expired.append(lease)
        return expired

    def end_all(self) -> list[Lease]:
        """End every lease at once, counted as expired: for a worker that stops without waiting longer."""
        return self.expire(float("inf"))

    def _alive(self, lease_id: int, generation: int) -> Lease | None:
        lease = self._leases.get(lease_id)
        if lease is None or lease.generation != generation:
            return None
        if lease.expires_at <= self._clock():
            self.expire()
            return None
        return lease

    def _store(self, lease: Lease) -> None:
        self._leases[lease.id] = lease
        heapq.heappush(self._expiries, (lease.expires_at, lease.id))

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.id]
        self._give_back(lease.retrieval_pages, lease.streaming_pages, lease.tail_row)
