"""Which worker gets a request: pure rules over what workers last said and what was sent to them since."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from .messages import PrefillLoad, WorkerLoad

ELSEWHERE = 0.5
"""What a cached token costs at a prefill worker that does not hold it, in computed ones: Redis has it, as a rule.

Fetching a page takes about a fifth of the time that computing it does; but Redis serves all workers, and may have lost
it.
"""

AFFINITY = 4.0
"""A prefix stays where it is until the queue there is longer by this many times the tokens that it saves.

With 1 the shortest wait of each single prompt wins, and prefixes drive each other out of the caches: at 20 requests/s
benchmarks/bench_routing.py measures a p90 of 19.5 s instead of 7.2.
"""

HOME_TOKENS = 16_384.0
"""How much longer the queue of a prefix's home may be before anybody has computed the prefix."""


class DecodeChoice:
    """The decode worker with the fewest reserved pages."""

    def __init__(self) -> None:
        self._loads: dict[str, WorkerLoad] = {}
        self._sent_pages: defaultdict[str, int] = defaultdict(int)

    @property
    def is_busy(self) -> bool:
        """Whether anything was sent since the loads were told, and it matters to whom."""
        return len(self._loads) > 1 and bool(self._sent_pages)

    def told(self, loads: Iterable[WorkerLoad]) -> None:
        """What all workers that live say now."""
        self._loads = {load.worker_id: load for load in loads}
        self._sent_pages.clear()

    def rank(self, num_pages: int) -> tuple[str, ...]:
        """Workers, the best first, for a request of so many pages, which counts as sent to the first one.

        Empty when there is nothing to choose.
        """
        if len(self._loads) < 2:
            return ()
        pages = {worker: load.reserved_pages + self._sent_pages[worker] for worker, load in self._loads.items()}
        ranked = sorted(pages, key=pages.__getitem__)
        self._sent_pages[ranked[0]] += num_pages
        return tuple(ranked)


class PrefillChoice:
    """The prefill worker that will be done with a prompt first, by its queue and by what it lacks of the prompt.

    So whoever holds a prefix gets it, until its queue is too long for that. A prefix that nobody is known to hold has a
    home as well, so that prompts which begin alike meet while the first of them is computed. elsewhere: see above.
    """

    def __init__(self, elsewhere: float = ELSEWHERE) -> None:
        self._elsewhere = elsewhere
        self._queued: dict[str, float] = {}
        self._sent: defaultdict[str, float] = defaultdict(float)

    @property
    def is_busy(self) -> bool:
        """Whether anything was sent since the loads were told, and it matters to whom."""
        return len(self._queued) > 1 and bool(self._sent)

    def told(self, loads: Iterable[PrefillLoad]) -> None:
        """What all workers that live say now."""
        self._queued = {load.worker_id: load.queued_tokens for load in loads}
        self._sent.clear()

    def rank(
        self, num_tokens: int, cached_tokens: int, holders: tuple[str, ...], start: bytes = b""
    ) -> tuple[str, ...]:
        """Workers, the best first, for a prompt of which num_tokens are to be had; it counts as sent to the first one.

        holders: who published the first cached_tokens of them, the most recent first: only that one still has them for
        sure. start: names how the prompt begins; empty for a short one. Before workers have said anything, holders.
        """
        if not self._queued:
            return holders
        own = dict.fromkeys(self._queued, num_tokens - (1.0 - self._elsewhere) * cached_tokens)
        bonus = dict.fromkeys(self._queued, 0.0)
        if holders and holders[0] in own:
            own[holders[0]] = num_tokens - cached_tokens
        elif start:
            bonus[max(own, key=lambda worker: hashlib.sha256(start + worker.encode()).digest())] = HOME_TOKENS
        cost = {
            worker: queued + self._sent[worker] + AFFINITY * own[worker] - bonus[worker]
            for worker, queued in self._queued.items()
        }
        ranked = sorted(cost, key=cost.__getitem__)
        self._sent[ranked[0]] += own[ranked[0]]
        return tuple(ranked)

    def lost(self, worker_id: str) -> None:
        """A worker does not answer: it is not chosen before it has spoken again."""
        self._queued.pop(worker_id, None)
        self._sent.pop(worker_id, None)
