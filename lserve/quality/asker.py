"""Who is asked: the interface that the suite drives, and what comes back. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .cases import Case, Document


@dataclass(frozen=True, slots=True)
class Reply:
    """What was answered. Times are seconds from sending the question.

    prompt_tokens, cached_tokens: the prompt's length, and how much of it a prefix cache had. times_s: when each piece
    of text came (each token, in the process). A reply with `error` counts as wrong.
    """

    text: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    times_s: tuple[float, ...] = ()
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.times_s[0] if self.times_s else 0.0


class Asker(Protocol):
    """One way of answering: an engine or endpoint, with one choice of settings."""

    name: str
    """What tables call it."""

    def count(self, text: str) -> int:
        """The text's length in tokens."""

    def cut(self, text: str, num_tokens: int) -> str:
        """The text's first so many tokens, as text."""

    def overhang(self, text: str) -> int:
        """Tokens at the end of a document that each of its questions would compute anew; 0 where nobody knows."""

    def prime(self, document: Document) -> Reply:
        """Reads the document alone, so that its questions find it in the prefix cache; a reply of one token."""

    def ask(self, document: Document, cases: Sequence[Case]) -> list[Reply]:
        """Asks the questions, several at once, greedily; one reply per case, in order."""

    def close(self) -> None:
        """Gives back what it holds."""
