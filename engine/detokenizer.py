"""From tokens to text, one choice at a time: whole characters only, cut at stop strings, ended by the right reason."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from .request import FinishReason, SampledToken, SamplingParams

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 16
_MAX_HELD_TOKENS = 8
_BYTES_PER_CHARACTER = 4


class Decoder(Protocol):
    """Anything that turns token ids into text, special tokens left out, without tidying up spaces."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text; bytes that are no whole character become U+FFFD."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to a choice's text, and why the choice ended with it, if it did.

    stop_reason: the stop string, or the id out of stop_token_ids, that was met; None for eos and length.
    """

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Decodes token by token. The pieces make up what decoding all tokens at once gives, the prompt's text cut off.

    A character's bytes can lie in several tokens, and a token's text can depend on the one before it. So a window of
    recent tokens is decoded each time, and what it has more than before is new, unless it ends in half a character.
    """

    def __init__(self, decoder: Decoder, prompt_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._known = ""
        for size in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _BYTES_PER_CHARACTER):
            self._window = list(prompt_token_ids[-size:])
            self._known = decoder.decode(self._window) if self._window else ""
            if not self._known.startswith(_INCOMPLETE):
                break  # else the window begins within a character: begin earlier
        self._unit_start = len(self._window)
        self._num_held = 0

    def push(self, token_id: int) -> str:
        """The text that is whole now; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decoder.decode(self._window)
        if not text.endswith(_INCOMPLETE):
            return self._advance(text)
        self._num_held += 1
        if self._num_held < _MAX_HELD_TOKENS:
            return ""
        # No character is that long, so these bytes are no text. Only the last of them can still become one.
        new = self._new(text[:-1])
        del self._window[:-_BYTES_PER_CHARACTER]
        self._known = self._decoder.decode(self._window)[:-1]
        self._unit_start = 0
        return new

    def flush(self) -> str:
        """What is left of an incomplete character, as U+FFFD."""
        return self._advance(self._decoder.decode(self._window)) if self._num_held else ""

    def _new(self, text: str) -> str:
        if text.startswith(self._known):
            return text[len(self._known) :]
        return text[len(os.path.commonprefix((text, self._known))) :]  # the prompt ended within a character

    def _advance(self, text: str) -> str:
        new = self._new(text)
        self._known = text
        self._num_held = 0
        if len(self._window) > _WINDOW_TOKENS:
            del self._window[: self._unit_start]
            self._known = self._decoder.decode(self._window)
        self._unit_start = len(self._window)
        return new


class StopFinder:
    """Finds stop strings in text that comes in pieces; how it is cut into pieces makes no difference.

    The stop whose last character comes first wins, of two with the same end the longer one. Text that may be a stop's
    beginning is held back. One Knuth-Morris-Pratt automaton a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string met in it, if any; the text ends before that."""
        whole = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            for index, stop in enumerate(self._stops):
                matched, borders = self._matched[index], self._borders[index]
                while matched > 0 and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    self._held = ""
                    return whole[: end - len(stop)], stop
                self._matched[index] = matched
        safe = len(whole) - max(self._matched, default=0)
        self._held = whole[safe:]
        return whole[:safe], None

    def flush(self) -> str:
        """What was held back; no stop came of it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


class Detokenizer:
    """Text and end of one choice. Feed it every token; once a piece has a finish_reason, the choice is over.

    Eos and stop tokens add no text. Checked in this order: eos (unless ignore_eos), stop_token_ids, stop, max_tokens.

    emitted: output tokens that another worker already reported. They count, and text held back in them comes out with
        the next piece, but what the client has seen is not repeated.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: SamplingParams,
        eos_token_ids: Collection[int],
        prompt_token_ids: Sequence[int],
        emitted: Sequence[int] = (),
    ) -> None:
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._max_tokens = params.max_tokens
        self._num_tokens = 0
        self._stream = TextStream(decoder, prompt_token_ids)
        self._stops = StopFinder(params.stop)
        self._end: Piece | None = None
        for token_id in emitted:
            self._push(token_id)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the choice ended, if it did; set after construction when `emitted` was complete already."""
        return None if self._end is None else self._end.finish_reason

    def push(self, token: SampledToken) -> Piece:
        """Take the next token in. After the end it changes nothing and repeats the reason without text."""
        return self._push(token.token_id)

    def flush(self) -> str:
        """All text that is still held back, for a choice that is ended from outside."""
        text, stop = self._stops.push(self._stream.flush())
        return text if stop is not None else text + self._stops.flush()

    def _push(self, token_id: int) -> Piece:
        if self._end is not None:
            return self._end
        self._num_tokens += 1
        if token_id in self._eos:
            return self._finish("", FinishReason.STOP, None)
        if token_id in self._stop_token_ids:
            return self._finish("", FinishReason.STOP, token_id)
        text, stop = self._stops.push(self._stream.push(token_id))
        if stop is not None:
            self._end = Piece("", FinishReason.STOP, stop)
            return Piece(text, FinishReason.STOP, stop)
        if self._num_tokens >= self._max_tokens:
            return self._finish(text, FinishReason.LENGTH, None)
        return Piece(text)

    def _finish(self, text: str, reason: FinishReason, stop_reason: int | None) -> Piece:
        self._end = Piece("", reason, stop_reason)
        return Piece(text + self.flush(), reason, stop_reason)


def _borders(text: str) -> list[int]:
    """For every prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length > 0 and text[index] != text[length]:
            length = borders[length - 1]
        length += text[index] == text[length]
        borders[index] = length
    return borders
