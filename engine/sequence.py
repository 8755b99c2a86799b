"""A sequence: one choice of one request while the engine works on it. Host bookkeeping, no torch."""

from dataclasses import dataclass, field
from enum import Enum, auto

from .config import PAGE_SIZE
from .request import Request


class State(Enum):
    """Where a sequence is. WAITING holds nothing; SWAPPED holds host memory; every other state holds pages and a
    row.
    """

    WAITING = auto()
    HELD = auto()
    PREFILL = auto()
    RUNNING = auto()
    SWAPPED = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """Mutable state of one choice.

    token_ids: prompt, then output; prefill computes the first num_prefill of them.
    num_computed: tokens whose keys and values are in pages or tail. num_cached: of these, found in a prefix cache.
    retrieval_pages: page id by page index. streaming_pages: page index to page id, sink and window only.
    row: place in the tail pool and the selection state. num_forks: further choices that start from the same prompt.
    chain: chain hash per full page of the input. prefill_only: hand over after prefill. hold: stop after admission.
    num_announced: tokens whose pages the decode worker has or was told of.
    """

    request: Request
    choice: int
    token_ids: list[int]
    num_prefill: int
    num_forks: int = 0
    chain: list[bytes] = field(default_factory=list)
    prefill_only: bool = False
    hold: bool = False
    num_announced: int = 0
    state: State = State.WAITING
    num_computed: int = 0
    num_cached: int = 0
    retrieval_pages: list[int] = field(default_factory=list)
    streaming_pages: dict[int, int] = field(default_factory=dict)
    row: int | None = None
    fork_rows: list[int] = field(default_factory=list)
    fresh: bool = True

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def position(self) -> int:
        """Position of the newest token, whose keys the next decode step writes."""
        return len(self.token_ids) - 1

    @property
    def own_page(self) -> int:
        """Page index of the newest token."""
        return self.position // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, start + length) of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        """Position after the chunk."""
        return self.start + self.length

    @property
    def is_last(self) -> bool:
        """Whether the chunk ends the prefill."""
        return self.end == self.sequence.num_prefill
