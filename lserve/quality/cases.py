"""What is asked: documents, the questions about them, and how a reply is scored. No torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One question about a document, with what a right reply contains.

    case_id: unique in its document. answers: every one that the reply should contain. depth: where in the document the
    answer stands, 0 is its start, None where that means nothing. max_tokens: length of the reply.
    """

    case_id: str
    task: str
    question: str
    answers: tuple[str, ...]
    depth: float | None = None
    max_tokens: int = 20


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the questions about it. The prompt of a case is the text, then the question (`prompt`).

    length: tokens that the text was made for, about.
    """

    document_id: str
    length: int
    text: str
    cases: tuple[Case, ...]

    def prompt(self, question: str) -> str:
        """The user's message: document first, so that all questions share it as a prefix."""
        return f"{self.text}\n\n{question}"


def score(case: Case, reply: str) -> float:
    """The share of the case's answers that stand in the reply as whole words; case and spacing do not matter."""
    return sum(contains(reply, answer) for answer in case.answers) / len(case.answers)


def contains(reply: str, answer: str) -> bool:
    """Whether the answer stands in the reply as whole words; case and spacing do not matter.

    Commas inside numbers do not matter either: models like to write 90,417.
    """
    wanted = r"\s+".join(re.escape(word) for word in answer.casefold().split())
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", reply.casefold())
    return re.search(rf"(?<!\w){wanted}(?!\w)", text) is not None
