"""Keeps a broken service from costing more than one failure per back-off."""

import logging
import threading
import time

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0


class CircuitBreaker:
    """Open after a failure, for a back-off that doubles up to 30 s; then one caller at a time may try again.

    name: what is broken, for the log, which gets one line per outage and one at its end. Thread-safe.
    """

    def __init__(self, name: str, first_backoff_s: float = _FIRST_BACKOFF_S) -> None:
        self._name = name
        self._first_backoff_s = self._backoff_s = first_backoff_s
        self._broken = self._trying = False
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self.num_outages = 0

    @property
    def is_open(self) -> bool:
        """Whether an outage is going on."""
        return self._broken

    @property
    def would_allow(self) -> bool:
        """What `allows` would say now."""
        return not self._broken or time.monotonic() >= self._retry_at

    def allows(self) -> bool:
        """Whether to try now. While open, True once per back-off."""
        with self._lock:
            if not self._broken:
                return True
            now = time.monotonic()
            if now < self._retry_at:
                return False
            self._trying = True
            self._retry_at = now + self._backoff_s
            return True

    def succeeded(self) -> None:
        """A try worked: closed again."""
        with self._lock:
            recovered, self._broken = self._broken, False
            self._backoff_s = self._first_backoff_s
        if recovered:
            logger.info("%s work again", self._name)

    def failed(self, reason: str) -> None:
        """A try did not work. Of many that fail together only the first one counts."""
        with self._lock:
            first = not self._broken
            if not (first or self._trying):
                return
            self._broken, self._trying = True, False
            self._retry_at = time.monotonic() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)
            self.num_outages += first
        if first:
            logger.warning("%s fail, going on without: %s", self._name, reason)
