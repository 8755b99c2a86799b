"""All tasks by name, and which of them share documents."""

from collections.abc import Sequence

from lserve.engine.errors import SettingsError

from .ruler import common_words, frequent_words, variable_tracking
from .tasks import (
    Plan,
    multi_key_numbers,
    multi_key_words,
    multi_value,
    names,
    numbers,
    pairs,
    people,
    quote,
    single,
    words,
)

TASKS: dict[str, Plan] = {
    "single": single,
    "numbers": numbers,
    "words": words,
    "names": names,
    "pairs": pairs,
    "multi-key words": multi_key_words,
    "multi-key numbers": multi_key_numbers,
    "multi-value": multi_value,
    "people": people,
    "quote": quote,
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
}

LAYOUTS = (
    ("numbers", "words"),
    ("names", "single"),
    ("pairs", "quote"),
    ("multi-key words", "people", "variable tracking"),
    ("multi-key numbers", "multi-value"),
    ("common words", "frequent words"),
)
"""Tasks that share documents. Needles share one with needles alone, and of a relation each is told one value: among
lists of words SmolLM2 finds 3 of 10, without them 7; of names 5 of 10 beside twenty other needles, 7 alone.
"""

NEEDLES = ("single", "numbers", "words", "names", "pairs", "multi-key words", "multi-key numbers", "multi-value")
"""The tasks of the heat map."""


def layouts(chosen: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The layouts, reduced to these tasks. Raises SettingsError for an unknown one."""
    for name in chosen:
        if name not in TASKS:
            raise SettingsError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    kept = (tuple(task for task in layout if task in chosen) for layout in LAYOUTS)
    return tuple(layout for layout in kept if layout)
