"""The user's own questions: read from a file, and each put to a stretch of the documents that should answer it."""

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lserve.engine.errors import SettingsError
from lserve.quality.asker import Asker
from lserve.quality.cases import Case, Document
from lserve.quality.tasks import RESERVED_TOKENS

from .readers import SourceDocument, Tell

TASK = "your questions"
MAX_LINE = 4_000
MAX_QUESTIONS = 200
NEIGHBOURHOOD = 1_500
"""Characters before and after a place that are compared with a question's words."""

DEPTHS = (0.5, 0.2, 0.8)
"""Where in the prompt the place of a group of questions stands."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and what a right answer must contain."""

    text: str
    answer: str


def read_questions(path: Path, tell: Tell) -> list[Question]:
    """`question, expected answer` per line, as CSV; quotes allow commas inside. tell gets one line per bad line.

    Raises SettingsError when the file cannot be read, or has no usable line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SettingsError(f"cannot read questions from {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"questions in {path} are not UTF-8") from None
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            tell(f"{path.name}, line {number}: left out, {len(line):,} characters are more than {MAX_LINE:,}")
            continue
        fields = [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
        if len(fields) != 2 or not all(fields):
            tell(f"{path.name}, line {number}: left out, it is not `question, expected answer`: {line[:60]!r}")
        elif number > 1 or fields[0].casefold() != "question":
            questions.append(Question(*fields))
    if not questions:
        raise SettingsError(f"no line of {path} is `question, expected answer`")
    if len(questions) > MAX_QUESTIONS:
        tell(f"{path.name}: the first {MAX_QUESTIONS} of {len(questions)} questions are asked")
    return questions[:MAX_QUESTIONS]


class Places:
    """Where in the documents a question's answer stands, most likely."""

    def __init__(self, documents: Sequence[SourceDocument]) -> None:
        self.text = "\n\n".join(document.text for document in documents)
        self._folded = self.text.casefold() if len(self.text.casefold()) == len(self.text) else self.text.lower()
        step = NEIGHBOURHOOD
        self._counts = Counter(
            word
            for at in range(0, len(self._folded), step)
            for word in set(re.findall(r"\w+", self._folded[at : at + step]))
        )
        self._pieces = max(len(self._folded) // step, 1)

    def find(self, question: Question) -> int:
        """The character about which to read: where the answer stands near the question's rarest words."""
        wanted = set(re.findall(r"\w+", question.text.casefold()))
        answer = question.answer.casefold()
        spots = [match.start() for match in re.finditer(re.escape(answer), self._folded)][:500]
        spots = spots or list(range(0, len(self._folded), NEIGHBOURHOOD))

        def likeness(spot: int) -> float:
            near = self._folded[max(spot - NEIGHBOURHOOD, 0) : spot + NEIGHBOURHOOD]
            return sum(math.log(1 + self._pieces / (1 + self._counts[w])) for w in wanted & {*re.findall(r"\w+", near)})

        return max(spots, key=likeness)


def question_documents(
    questions: Sequence[Question], places: Places, length: int, asker: Asker, max_tokens: int = 40
) -> list[Document]:
    """Prompts of about `length` tokens around the places of the questions; neighbours share one."""
    sample = places.text[: 8 * length]
    per_token = len(sample) / max(asker.count(sample), 1)
    width = int((length - RESERVED_TOKENS) * per_token)
    found = sorted(((places.find(question), number) for number, question in enumerate(questions)))
    groups: list[list[tuple[int, int]]] = []
    for place, number in found:
        if not groups or place - groups[-1][0][0] > width // 4:
            groups.append([])
        groups[-1].append((place, number))
    documents = []
    for index, group in enumerate(groups):
        first, last = group[0][0], group[-1][0]
        start = int((first + last) / 2 - width * DEPTHS[index % len(DEPTHS)])
        start = max(0, min(start, len(places.text) - width))
        text = asker.cut(places.text[start : start + 2 * width], length - RESERVED_TOKENS)
        cases = tuple(
            Case(
                f"yours-{number}",
                TASK,
                questions[number].text,
                (questions[number].answer,),
                min(max((place - start) / max(len(text), 1), 0.0), 1.0),
                max_tokens,
            )
            for place, number in group
        )
        documents.append(Document(f"yours.{index}.{length}", length, text, cases))
    return documents
