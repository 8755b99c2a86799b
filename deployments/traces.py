"""The trace of an answer as clients get it: the engine's page choices, and where in their text each page lies.

Spans are counted in characters of what the client sent: a message's content, or a prompt given as text. The template's
own words belong to no message. A prompt of token ids has no spans: page i holds its tokens 64 i to 64 i + 63.
"""

import asyncio
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from lserve.engine.config import PAGE_SIZE
from lserve.engine.request import Output, PageChoice

from .protocol import Generation, Prompt

Json = dict[str, Any]
Span = tuple[int, int, int]
"""(index of the message or prompt, first character, end)."""

MAX_CHOICES = 256
"""Page choices of one answer that are written; with the default interval they cover its first 1,024 tokens."""


class Offsets(Protocol):
    """What the router's tokenizer must tell for a trace."""

    def chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text that `encode_chat` encodes."""

    def token_starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """For each of `encode`'s tokens, the index of its first character in the text."""


class Traces:
    """The traces of one answer, choice by choice."""

    def __init__(self) -> None:
        self._pages: list[list[list[Span]] | None] = []
        self._num_choices = 1
        self._choices: defaultdict[int, list[PageChoice]] = defaultdict(list)
        self._counts: Counter[int] = Counter()

    async def locate(self, generation: Generation, tokenizer: Offsets) -> None:
        """Finds where the prompts' pages lie in their texts; call before `field`. Tokenizes once more, on a thread."""
        self._num_choices = generation.sampling.n
        if generation.prompts is None:
            self._pages = [await asyncio.to_thread(chat_pages, generation.messages, tokenizer)]
        else:
            self._pages = [await asyncio.to_thread(_pages, *item, tokenizer) for item in enumerate(generation.prompts)]

    def field(self, output: Output) -> Json:
        """Takes an output's page choices; with a choice's last output, the field that carries its trace."""
        kept = self._choices[output.choice]
        kept += output.trace[: MAX_CHOICES - len(kept)]
        self._counts[output.choice] += len(output.trace)
        if output.finish_reason is None:
            return {}
        pages = self._pages[output.choice // self._num_choices]
        trace: Json = {"page_size": PAGE_SIZE, "num_heads": kept[0].num_heads if kept else 0}
        trace |= {} if pages is None else {"pages": pages}
        trace |= {"choices": [choice_body(choice) for choice in kept]}
        return {"lserve": {"trace": {**trace, "num_choices_left_out": self._counts[output.choice] - len(kept)}}}


def choice_body(choice: PageChoice) -> Json:
    """A page choice as the API writes it."""
    body: Json = {"token": choice.token, "num_pages": choice.num_pages, "everything": choice.everything}
    if not choice.everything:
        body |= {"read": choice.read, "num_pages_left_out": choice.num_left_out}
    if choice.mass_kept is not None:
        attended = [(page, round(share, 4)) for page, share in choice.attended]
        mass = {"kept": round(choice.mass_kept, 4), "num_heads_sampled": choice.num_sampled, "attended": attended}
        body["mass"] = mass
    return body


def chat_pages(messages: Sequence[tuple[str, str]], tokenizer: Offsets) -> list[list[Span]]:
    """The spans of each page of (role, content) messages in the chat template."""
    text = tokenizer.chat_text(messages)
    starts = tokenizer.token_starts(text, add_special_tokens=False)
    return page_spans(starts, len(text), _find([content for _, content in messages], text))


def _pages(index: int, prompt: Prompt, tokenizer: Offsets) -> list[list[Span]] | None:
    if not isinstance(prompt, str):
        return None
    return page_spans(tokenizer.token_starts(prompt), len(prompt), [(index, 0, len(prompt), 0)])


def _find(contents: Sequence[str], text: str) -> list[tuple[int, int, int, int]]:
    """Where messages lie in the rendered chat: (index, start, end, characters of the content that were stripped)."""
    parts, cursor = [], 0
    for index, content in enumerate(contents):
        for wanted in (content, content.strip()):
            at = text.find(wanted, cursor) if wanted else -1
            if at >= 0:
                cursor = at + len(wanted)
                parts.append((index, at, cursor, content.find(wanted)))
                break
    return parts


def page_spans(starts: Sequence[int], length: int, parts: Sequence[tuple[int, int, int, int]]) -> list[list[Span]]:
    """Spans of each page. starts: first character of each token, of a text of `length` characters.

    parts: (index, start, end, offset) of the messages in it, in order; a span counts from its message's start, plus
    offset. Pages follow each other without gaps, so what a tokenizer drops belongs to the page before it.
    """
    edges = [0]
    for start in starts[PAGE_SIZE::PAGE_SIZE]:
        edges.append(max(start, edges[-1]))
    edges.append(max(length, edges[-1]))
    ends = [end for _, _, end, _ in parts]
    pages: list[list[Span]] = []
    for first, last in zip(edges, edges[1:], strict=False):
        spans: list[Span] = []
        for index, start, end, offset in parts[bisect_left(ends, first + 1) :]:
            if start >= last:
                break
            spans.append((index, max(first, start) - start + offset, min(last, end) - start + offset))
        pages.append(spans)
    return pages
