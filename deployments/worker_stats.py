"""What a worker measures of itself for the autoscaling policy."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lserve.engine.results import EngineLoad

from .autoscaling import WorkerStats

SPAN_S = 30.0
BUSY_SPAN_S = 120.0
"""A single prompt of 200,000 tokens keeps a worker busy for ten seconds: a longer look tells how busy it really is."""


class StatsWindow:
    """Belongs to one event loop. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._prefills: deque[tuple[float, float, int]] = deque()
        self._gaps: deque[tuple[float, float]] = deque()
        self._waits: deque[tuple[float, float]] = deque()
        self._first_tokens: deque[tuple[float, float]] = deque()
        self._floor_s = math.inf

    def note_step(self, seconds: float, prefill_tokens: int, has_decoded: bool) -> None:
        """A step of the engine: how long it took, the prompt tokens that it computed, whether choices got tokens."""
        if prefill_tokens:
            self._prefills.append((self._clock(), seconds, prefill_tokens))
        if has_decoded:
            self._gaps.append((self._clock(), seconds))
            self._floor_s = min(self._floor_s, seconds)

    def note_wait(self, seconds: float) -> None:
        """A request got its pages after this time."""
        self._waits.append((self._clock(), seconds))

    def note_first_token(self, seconds: float) -> None:
        """A request's first token, this long after the request came here."""
        self._first_tokens.append((self._clock(), seconds))

    def stats(self, load: EngineLoad, max_batch_size: int | None) -> WorkerStats:
        """What happened lately, and how full the engine is now. max_batch_size: None where batches do not matter."""
        now = self._clock()
        _forget(self._prefills, now - BUSY_SPAN_S)
        for kept in (self._gaps, self._waits, self._first_tokens):
            _forget(kept, now - SPAN_S)
        span_s = min(BUSY_SPAN_S, max(now - self._started, SPAN_S))
        prefill_s = sum(seconds for _, seconds, _ in self._prefills)
        prefill_tokens = sum(tokens for *_, tokens in self._prefills)
        gaps = [seconds for _, seconds in self._gaps]
        waits = [seconds for _, seconds in self._waits]
        first_tokens = sorted(seconds for _, seconds in self._first_tokens)
        total_pages = max(load.total_pages, 1)
        return WorkerStats(
            queued_prompts=load.queued_prompts,
            queued_tokens=load.queued_tokens,
            busy=min(1.0, prefill_s / span_s),
            tokens_per_s=prefill_tokens / prefill_s if prefill_s else 0.0,
            wait_s=sum(waits) / len(waits) if waits else 0.0,
            ttft_s=first_tokens[math.ceil(0.9 * len(first_tokens)) - 1] if first_tokens else 0.0,
            itl_s=sum(gaps) / len(gaps) if gaps else 0.0,
            itl_floor_s=self._floor_s if math.isfinite(self._floor_s) else 0.0,
            page_use=(load.used_pages + load.waiting_pages) / total_pages,
            batch_use=0.0 if max_batch_size is None else (load.running + load.waiting) / max_batch_size,
        )


def _forget(kept: "deque[Any]", before: float) -> None:
    while kept and kept[0][0] < before:
        kept.popleft()
