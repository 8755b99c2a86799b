"""All tasks by name, and which of them share documents."""

from collections.abc import Sequence

from lserve.engine.errors import SettingsError

from .ruler import common_words, frequent_words, variable_tracking
from .tasks import Plan, multi_key_numbers, multi_key_words, multi_value, people, quote, single

TASKS: dict[str, Plan] = {
    "single": single,
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
    ("single", "multi-key words", "quote"),
    ("multi-key numbers", "people", "variable tracking"),
    ("multi-value", "common words", "frequent words"),
)
"""Tasks that share documents: no two of them ask alike, and together they take a quarter of 7,500 tokens at most."""

NEEDLES = ("single", "multi-key words", "multi-key numbers", "multi-value")
"""The tasks of the heat map."""


def layouts(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The layouts, reduced to these tasks. Raises SettingsError for an unknown one."""
    for name in names:
        if name not in TASKS:
            raise SettingsError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    chosen = (tuple(task for task in layout if task in names) for layout in LAYOUTS)
    return tuple(layout for layout in chosen if layout)
