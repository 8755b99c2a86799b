"""Which worker holds how much of a prompt: one Redis entry per resume point, read in one round trip.

An entry is a hint. A worker that has gone or lost its pages costs a detour, and every page is checked where it is read.
"""

import asyncio
import hmac
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lserve.engine.circuit_breaker import CircuitBreaker
from lserve.engine.errors import SettingsError
from lserve.engine.redis_client import client_options

from .settings import Settings, secret

_MAC_BYTES = 32
_MAX_WORKERS = 4  # that an entry names, the most recent ones


@dataclass(frozen=True, slots=True)
class DirectoryHit:
    """The longest prefix that the directory knows: its tokens, and who published it, the most recent first."""

    num_tokens: int
    worker_ids: tuple[str, ...]


class Directory:
    """Belongs to the event loop that first uses it.

    url: redis://, rediss:// or unix://. secret: the cluster's; an entry without its MAC is a miss. ca: see
    `engine/redis_client.py`. ttl_s: how long a hint is believed. timeout_s: the longest that a lookup waits.
    SettingsError if url or ca cannot be used.
    """

    def __init__(
        self,
        url: str,
        secret: bytes,
        *,
        password: str | None = None,
        ca: str | None = None,
        ttl_s: int = 3600,
        timeout_s: float = 0.1,
        key_prefix: str = "lserve:directory:",
        retry_after_s: float = 1.0,
    ) -> None:
        self._key = hmac.digest(secret, b"lserve prefix directory", "sha256")
        self._prefix, self._ttl_s, self._timeout_s = key_prefix, ttl_s, timeout_s
        self._breaker = CircuitBreaker("prefix directory calls", retry_after_s)
        options = client_options(url, password, ca, timeout_s)
        try:
            self._redis = redis.asyncio.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)
        except ValueError as error:
            raise SettingsError(f"redis.url is malformed: {error}") from error

    @classmethod
    def from_settings(cls, settings: Settings, cluster_secret: bytes) -> "Directory":
        """The directory in the Redis that `settings.redis.url` names."""
        assert settings.redis.url is not None
        return cls(
            settings.redis.url,
            cluster_secret,
            password=secret(settings.redis.password_env),
            ca=settings.redis.ca,
            ttl_s=settings.redis.ttl_s,
            timeout_s=settings.redis.timeout_s,
        )

    @property
    def is_available(self) -> bool:
        """False during an outage."""
        return not self._breaker.is_open

    async def lookup(self, resume_points: Sequence[tuple[int, bytes]]) -> DirectoryHit | None:
        """The longest published one of these (tokens, chain hash) pairs. An outage is a miss; never raises."""
        for (num_tokens, chain_hash), value in sorted(
            zip(resume_points, await self._read(resume_points), strict=True), key=lambda pair: -pair[0][0]
        ):
            workers = self._open(chain_hash, value)
            if workers:
                return DirectoryHit(num_tokens, tuple(sorted(workers, key=lambda worker: -workers[worker])))
        return None

    async def publish(self, resume_points: Sequence[tuple[int, bytes]], worker_id: str) -> None:
        """Say that a worker holds prefixes up to these (tokens, chain hash) pairs. Never raises.

        Entries of other workers are kept; of two workers that publish at the same moment one may be lost.
        """
        expires = time.time() + self._ttl_s
        values = await self._read(resume_points)
        if not values or self._breaker.is_open:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for (_, chain_hash), value in zip(resume_points, values, strict=True):
            workers = self._open(chain_hash, value) | {worker_id: expires}
            newest = sorted(workers.items(), key=lambda item: -item[1])[:_MAX_WORKERS]
            pipeline.set(self._name(chain_hash), self._seal(chain_hash, dict(newest)), ex=self._ttl_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await pipeline.execute()
        except Exception as error:
            self._breaker.failed(f"{type(error).__name__}: {error}".splitlines()[0])

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()

    async def _read(self, resume_points: Sequence[tuple[int, bytes]]) -> list[bytes | None]:
        """The raw entry of each resume point; all None while Redis is down or slow."""
        missing: list[bytes | None] = [None] * len(resume_points)
        if not resume_points or not self._breaker.allows():
            return missing
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._redis.mget([self._name(chain_hash) for _, chain_hash in resume_points])
        except Exception as error:  # whatever a broken or foreign server provokes is an outage
            self._breaker.failed(f"{type(error).__name__}: {error}".splitlines()[0])
            return missing
        self._breaker.succeeded()
        return cast("list[bytes | None]", values)

    def _name(self, chain_hash: bytes) -> str:
        return self._prefix + chain_hash.hex()

    def _seal(self, chain_hash: bytes, workers: dict[str, float]) -> bytes:
        body = json.dumps(workers, separators=(",", ":")).encode()
        return self._mac(chain_hash, body) + body

    def _open(self, chain_hash: bytes, value: bytes | None) -> dict[str, float]:
        """Worker ids and when each expires (UNIX time); empty if the entry is missing, forged or expired."""
        if value is None or not hmac.compare_digest(value[:_MAC_BYTES], self._mac(chain_hash, value[_MAC_BYTES:])):
            return {}
        workers: dict[str, float] = json.loads(value[_MAC_BYTES:])
        now = time.time()
        return {worker: expires for worker, expires in workers.items() if expires > now}

    def _mac(self, chain_hash: bytes, body: bytes) -> bytes:
        return hmac.digest(self._key, chain_hash + body, "sha256")
