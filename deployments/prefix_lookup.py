"""From a prompt to a PrefixHint: hash its pages, ask the directory."""

import asyncio
from collections.abc import Sequence

from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.config import BLOCK_SIZE, PAGE_SIZE, RESUME_INTERVAL
from lserve.engine.residency import last_resume_point

from .directory import Directory
from .messages import PrefixHint
from .pool import WorkerPool

RECENT_TOKENS = 16_384
"""How far from a prompt's end every multiple of 128 is asked for: there the previous turn of a conversation ended."""

LONG_PROMPT = 8_192
"""Tokens from which hashing goes to a thread; up to here it takes 0.2 ms."""


class PrefixLookup:
    """Finds the longest cached prefix of a prompt. secret: the cluster's; pool: says in which format pages are."""

    def __init__(self, directory: Directory, secret: bytes, pool: WorkerPool) -> None:
        self._directory, self._secret, self._pool = directory, secret, pool

    async def __call__(self, tenant: str, token_ids: Sequence[int]) -> PrefixHint:
        """What the directory knows; an empty hint when it knows nothing or does not answer in time."""
        points = candidate_points(len(token_ids))
        if not points:
            return PrefixHint()
        root = chain_root(self._secret, tenant, (await self._pool.info()).format_id)
        if len(token_ids) <= LONG_PROMPT:
            chain = chain_hashes(root, token_ids)
        else:
            chain = await asyncio.to_thread(chain_hashes, root, token_ids)
        hit = await self._directory.lookup([(point, chain[point // PAGE_SIZE - 1]) for point in points])
        return PrefixHint() if hit is None else PrefixHint(hit.num_tokens, hit.worker_ids)


def candidate_points(prompt_length: int) -> list[int]:
    """Where this prompt may be taken up, ascending: its own resume points, and those of prompts that begin like it."""
    last = last_resume_point(prompt_length)
    recent = range(max(BLOCK_SIZE, (last - RECENT_TOKENS) // BLOCK_SIZE * BLOCK_SIZE), last + 1, BLOCK_SIZE)
    return sorted({*range(RESUME_INTERVAL, last + 1, RESUME_INTERVAL), *recent})
