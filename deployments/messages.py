"""What the router, decode workers and prefill workers say to each other. Every message is immutable and plain data.

::

    router  -- Request, PrefixHint -->  decode worker  -- PrefillRequest -->  prefill worker
    router  <-- list[Output] ---------  decode worker  <-- ChunkReady ------  prefill worker
    router  <-- WorkerLoad, WorkerInfo  decode worker
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lserve.engine.request import Request
from lserve.engine.results import ChunkReady

if TYPE_CHECKING:  # transfer brings torch, which a router does without
    from lserve.engine.transfer import PeerMetadata

__all__ = [
    "ChunkReady",
    "LeaseCall",
    "PrefillLoad",
    "PrefillRequest",
    "PrefillStarted",
    "PrefixHint",
    "WorkerInfo",
    "WorkerLoad",
]


@dataclass(frozen=True, slots=True)
class PrefixHint:
    """The longest prefix of a prompt that the directory knows, and who holds it.

    num_tokens: length of that prefix, a resume point; 0 when nothing is known.
    worker_ids: prefill workers that hold it in their pools, best first (they go into `PrefillRequest.prefer`).
    prefer: decode workers to call, best first; read by `routing.AddressedRouter`, not by the worker.
    """

    num_tokens: int = 0
    worker_ids: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What does not change while a worker lives.

    worker_id: `routing.own_worker_id()` of the replica. format_id: of every page it writes.
    max_model_len: most tokens of prompt and answer together that one choice may have.
    """

    worker_id: str
    format_id: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How full a decode worker is. Pages are retrieval pages; running and waiting count choices."""

    worker_id: str
    reserved_pages: int
    total_pages: int
    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """How much a prefill worker has to do. queued_tokens: prompt tokens left, of prompts in progress and waiting."""

    worker_id: str
    queued_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Asks a prefill worker for a prompt's pages.

    have_tokens: leading tokens whose pages the decode worker holds already: they are not announced.
    known_tokens: the longest prefix that the directory knows; worth looking for in Redis.
    start: chain hash of the prompt's first 1,024 tokens, empty if it is shorter.
    prefer: prefill workers to call, best first; read by `routing.AddressedRouter`, not by the worker.
    """

    request: Request
    have_tokens: int = 0
    known_tokens: int = 0
    prefer: tuple[str, ...] = ()
    start: bytes = b""


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The first thing a prefill worker says: who it is, and what is needed to read from its pools."""

    worker_id: str
    peer: "PeerMetadata"


@dataclass(frozen=True, slots=True)
class LeaseCall:
    """Extends or releases leases at the worker that granted them: (lease id, generation) pairs.

    prefer: that worker alone; should another answer in its place, every lease is `gone` there.
    """

    leases: tuple[tuple[int, int], ...]
    prefer: tuple[str, ...]
