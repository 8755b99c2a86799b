"""The blocks of the guides, for tests that run or check them. `<!-- run -->` before a block says that a test runs it.

`<!-- run: served -->` wants a cluster that serves the demo model; its address stands in for 127.0.0.1:8000.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^(?: *<!-- (run(?:: served)?) -->\n)?( *)```(\w+)\n(.*?)^\2```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """place: page and line. run: run, run: served, or nothing. language: sh, python, yaml, text, mermaid."""

    place: str
    run: str
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    """All blocks of these languages, in all guides."""
    for page in PAGES:
        content = page.read_text()
        for match in _BLOCK.finditer(content):
            if match[3] in languages:
                line = content[: match.start(3)].count("\n") + 1
                yield Block(f"{page.name}:{line}", match[1] or "", match[3], textwrap.dedent(match[4]))


def commands(block: Block) -> Iterator[str]:
    """The command lines of a shell block: comments gone, continued lines joined, pipelines and lists cut up."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for line in joined.splitlines():
        for part in re.split(r"\s(?:&&|\|\|?)\s", re.sub(r"(^|\s)#.*", "", line)):
            if part.strip(" ()"):
                yield part.strip(" ()")
