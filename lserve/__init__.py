"""LServe: long-context LLM serving with block-sparse attention and low-bit KV pages, on Ray Serve.

The public names are resolved when first used, so that importing `lserve.engine.scheduler` brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.config import CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig
    from .engine.engine import Engine
    from .engine.errors import LServeError
    from .engine.request import AttentionOptions, FinishReason, Output, Request, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AttentionOptions": "request",
    "CacheConfig": "config",
    "Engine": "engine",
    "EngineConfig": "config",
    "FinishReason": "request",
    "LServeError": "errors",
    "Output": "request",
    "Request": "request",
    "SamplingParams": "request",
    "SchedulerConfig": "config",
    "SparsityConfig": "config",
}

__all__ = [
    "AttentionOptions",
    "CacheConfig",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "LServeError",
    "Output",
    "Request",
    "SamplingParams",
    "SchedulerConfig",
    "SparsityConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lserve' has no attribute {name!r}")
    return getattr(import_module(f".engine.{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
