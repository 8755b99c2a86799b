"""Settings without a model: they answer out of the document, at a given pace, and forget as they are told to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lserve.poc.probes import Timing, Traced
from lserve.poc.settings import Setting
from lserve.quality.asker import Reply
from lserve.quality.cases import Case, Document


@dataclass
class StubAsker:
    """Knows every answer, but for one question in `forgets` (0: none). One token is one word."""

    name: str
    forgets: int = 0
    fails: str | None = None
    asked: list[Case] = field(default_factory=list)

    def count(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def cut(self, text: str, num_tokens: int) -> str:
        """The first words, and the spaces between them."""
        match = re.match(rf"(?:\s*\S+){{0,{num_tokens}}}", text)
        return match[0] if match else ""

    def overhang(self, text: str) -> int:
        """None: it computes nothing."""
        return 0

    def prime(self, document: Document) -> Reply:
        """At once, or with the error."""
        return Reply("", document.length, 0, (document.length * 1e-4,), 1, self.fails)

    def ask(self, document: Document, cases: Sequence[Case]) -> list[Reply]:
        """Right answers; position questions are beyond everybody."""
        replies = []
        for case in cases:
            self.asked.append(case)
            lost = case.task == "position" or (self.forgets and len(self.asked) % self.forgets == 0)
            replies.append(Reply("I do not know." if lost else f"It is {' and '.join(case.answers)}."))
        return replies

    def close(self) -> None:
        """Nothing."""


@dataclass
class StubProbe:
    """gap_s per 1,000 tokens of the message's length."""

    gap_s: float

    def time(self, message: str, num_tokens: int, batch: int) -> list[Timing]:
        """Steady gaps."""
        gap = self.gap_s * len(message.split()) / 1000 * (0.5 + batch / 2)
        return [Timing(0.05, (gap,) * (num_tokens - 1), 0)] * batch

    def trace(self, message: str, num_tokens: int) -> Traced:
        """Every page has 400 characters; two of twenty are read by every head, and the one in the middle by half."""
        pages = [[[0, at, min(at + 400, len(message))]] for at in range(0, len(message), 400)]
        middle = len(pages) // 2
        read = [[0, 6], [len(pages) - 2, 6], [middle, 3]]
        mass = {"kept": 0.9, "num_heads_sampled": 2, "attended": [[middle, 0.4], [0, 0.2]]}
        choice = {"num_pages": len(pages) - 1, "everything": False, "read": read, "num_pages_left_out": 0, "mass": mass}
        choices = [{"token": 1, **choice}, {"token": 3, **choice}]
        return Traced(
            ("It", " is", " <this>", "."), {"page_size": 64, "num_heads": 6, "pages": pages, "choices": choices}
        )

    def close(self) -> None:
        """Nothing."""


def stub_settings(forgets: int = 0, fails: str | None = None) -> list[Setting]:
    """Full attention, and two that read less: the smaller budget forgets one question in `forgets`."""
    full = Setting("Full", "reads everything", StubAsker("Full"), StubProbe(0.010), "a")
    block = "sparsity:\n  token_budget: "
    small = Setting("Sparse 512", "reads 512", StubAsker("Sparse 512", forgets, fails), StubProbe(0.004), "b", 512)
    large = Setting("Sparse 1,024", "reads 1,024", StubAsker("Sparse 1,024"), StubProbe(0.006), "b", 1024)
    settings = [full]
    for setting in (small, large):
        settings.append(
            Setting(
                setting.name,
                setting.explanation,
                setting.asker,
                setting.probe,
                setting.reading,
                setting.budget,
                f"{block}{setting.budget}",
            )
        )
    return settings
