"""The prefill workers as a decode worker sees them: something that computes prompts and keeps their pages on lease."""

from collections.abc import AsyncGenerator
from typing import Protocol

from .messages import ChunkReady, LeaseCall, PrefillRequest, PrefillStarted


class PrefillPool(Protocol):
    """Where decode workers get prompts computed. Every method raises WorkerLostError when the worker is lost."""

    def prefill(self, message: PrefillRequest) -> AsyncGenerator[PrefillStarted | ChunkReady, None]:
        """Who does it, then every chunk. Closing the generator drops the request. Raises what the worker raises."""

    async def release(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which ends."""

    async def extend(self, call: LeaseCall) -> list[str]:
        """`held` or `gone` for each lease, which lives its whole time again."""
