"""The text that documents are made of: the user's files, or what is found on the machine."""

import pydoc_data.topics
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lserve.engine.errors import SettingsError

MIN_CHARACTERS = 2000

Cut = Callable[[str, int], str]
"""(text, tokens): the text's first so many tokens, as text."""


def load_text(paths: Sequence[str] = ()) -> str:
    """The files' texts, one after the other; without any, Python's language reference (465,000 characters), which
    comes with every interpreter.

    Raises SettingsError for a file that cannot be read as text, and when there is too little text.
    """
    if not paths:
        return _joined(pydoc_data.topics.topics.values())
    text = _joined(_read(Path(path)) for path in paths)
    if len(text) < MIN_CHARACTERS:
        names = ", ".join(paths)
        raise SettingsError(f"{names}: {len(text)} characters of text are too few, {MIN_CHARACTERS} are needed")
    return text


def passage(text: str, number: int, of: int, num_tokens: int, cut: Cut) -> str:
    """About num_tokens tokens of the text, the number-th of so many evenly spaced places. Wraps around at the end."""
    start = len(text) * number // of
    wanted = num_tokens * 8  # characters; no tokenizer makes more of a token on prose
    source = text[start : start + wanted]
    while len(source) < wanted:
        source += "\n\n" + text[: wanted - len(source)]
    return cut(source, num_tokens)


def insert(text: str, items: Iterable[tuple[float, str]]) -> str:
    """Puts each (depth, paragraph) between the text's own paragraphs or sentences, near its depth (0 start, 1 end)."""
    ends = [0, *(match.end() for match in re.finditer(r"\n\s*\n|(?<=[.!?])\s+", text)), len(text)]
    pieces, done = [], 0
    for depth, item in sorted(items):
        wanted = int(len(text) * depth)
        at = max(min(ends, key=lambda end: abs(end - wanted)), done)
        pieces += [text[done:at].rstrip(), item]
        done = at
    return "\n\n".join(piece for piece in [*pieces, text[done:]] if piece)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text.replace("\r\n", "\n").strip() for text in texts)
