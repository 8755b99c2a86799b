"""Which streaming pages must be there, when: the pure rules behind prefix reuse, handoff and release.

A streaming head at position t reads token i when i <= t and (i < sink_size or t - i < local_window). Page indices here
count full pages only; a prompt's last, incomplete page is the request's tail.
"""

from dataclasses import dataclass

from .config import BLOCK_SIZE, PAGE_SIZE, RESUME_INTERVAL


def last_resume_point(prompt_length: int) -> int:
    """The last multiple of 128 that leaves at least one prompt token to compute; 0 where there is none."""
    return max(prompt_length - 1, 0) // BLOCK_SIZE * BLOCK_SIZE


def resume_points(prompt_length: int) -> list[int]:
    """Where a prefix of this prompt may be taken up, ascending: every 1,024 tokens and the last multiple of 128."""
    last = last_resume_point(prompt_length)
    points = list(range(RESUME_INTERVAL, last + 1, RESUME_INTERVAL))
    if last > 0 and (not points or points[-1] != last):
        points.append(last)
    return points


@dataclass(frozen=True, slots=True)
class Residency:
    """The rules for one sink and window; sink_size and local_window in tokens, multiples of 64."""

    sink_size: int
    local_window: int

    def sink_pages(self, length: int) -> range:
        """Full pages of the sink among the first `length` tokens."""
        return range(min(self.sink_size, length) // PAGE_SIZE)

    def window_pages(self, position: int) -> range:
        """Full pages before `position` that a query at `position` or later reads through its window.

        A page below `start` that is not the sink's may be released once every token before `position` is computed.
        """
        return range(max(position - self.local_window + 1, 0) // PAGE_SIZE, position // PAGE_SIZE)

    def streaming_pages_to_resume(self, position: int) -> list[int]:
        """What must be there to compute on from `position`: sink and window, ascending."""
        return sorted({*self.sink_pages(position), *self.window_pages(position)})

    def streaming_pages_kept(self, prompt_length: int) -> list[int]:
        """What the prefix cache keeps of a prompt: sink, windows before its resume points and its end, ascending."""
        pages = {*self.sink_pages(prompt_length), *self.window_pages(prompt_length)}
        for point in resume_points(prompt_length):
            pages.update(self.window_pages(point))
        return sorted(pages)

    def streaming_pages_for_decode(self, prompt_length: int) -> list[int]:
        """What a handoff moves: the sink, and all from a window before the last resume point to the prompt's end.

        That is enough to decode and to take the prompt up again on the decode worker.
        """
        window = self.window_pages(last_resume_point(prompt_length))
        return sorted({*self.sink_pages(prompt_length), *range(window.start, prompt_length // PAGE_SIZE)})
