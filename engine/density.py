"""How much of dense attention's work a step does, counted on the host. No torch."""

from .config import PAGE_SIZE
from .sequence import PrefillChunk, Sequence


class AttentionDensity:
    """Keys that all heads read, as a fraction of the keys that they would read if nothing were skipped.

    num_retrieval, num_streaming: heads of each class in all layers. What the page selector reads to choose is not
    counted, nor what prefill's block estimator leaves out, which only the device knows.
    """

    def __init__(self, num_retrieval: int, num_streaming: int, sink_size: int, local_window: int) -> None:
        total = num_retrieval + num_streaming
        self._retrieval, self._streaming = num_retrieval / total, num_streaming / total
        self._kept = sink_size + local_window

    def decode(self, budgets: list[tuple[Sequence, int]]) -> float:
        """Of a decode step over sequences with their budgets in pages."""
        read = dense = 0.0
        for sequence, budget in budgets:
            tokens = sequence.num_tokens
            left_out = max(sequence.own_page + 1 - budget, 0) * PAGE_SIZE
            read += self._retrieval * (tokens - left_out) + self._streaming * min(tokens, self._kept)
            dense += tokens
        return read / dense

    def prefill(self, chunks: list[PrefillChunk]) -> float:
        """Of a step over chunks."""
        dense = sum(_causal(c.end) - _causal(c.start) for c in chunks)
        windowed = sum(self._windowed(c.end) - self._windowed(c.start) for c in chunks)
        return self._retrieval + self._streaming * windowed / dense

    def _windowed(self, length: int) -> int:
        """Keys that a streaming head reads for the first `length` tokens."""
        whole = min(length, self._kept)
        return _causal(whole) + (length - whole) * self._kept


def _causal(length: int) -> int:
    return length * (length + 1) // 2
