"""The tasks: what is planted into a text and asked about it.

A task draws facts and questions (`plan`), and `build_document` plants the facts of one or more tasks into one passage.
Everything follows from the seed. The needle tasks are RULER's (arXiv 2404.06654) in sentences that small chat models
can follow; each fact is said twice, since a model of 135M parameters does not recall what it read once.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .cases import Case, Document
from .text import insert, passage
from .vocabulary import CITIES, COLOURS, FIRST_NAMES, GROUPS, JOBS, SURNAMES, THINGS, WORDS

RESERVED_TOKENS = 120
"""Room in the length for the chat template, the question and the reply."""

QUOTED, CONTINUED = 8, 4
"""Words of a sentence that are given, and words after them that the reply must have."""


@dataclass(frozen=True, slots=True)
class Planted:
    """What a task puts into a document: (depth, paragraph) pairs, and the questions."""

    items: tuple[tuple[float, str], ...]
    cases: tuple[Case, ...]


Plan = Callable[[random.Random, str, int], Planted]
"""(draw, passage, number of questions) to what is planted."""


class TextMeasure(Protocol):
    """The part of an asker that documents are measured with."""

    def count(self, text: str) -> int:
        """The text's length in tokens."""

    def cut(self, text: str, num_tokens: int) -> str:
        """The text's first so many tokens, as text."""


def fact(relation: str, value: str) -> str:
    """A fact to remember, said twice."""
    return f"The {relation} is {value}. Remember it. {_capital(value)} is the {relation}."


def single(draw: random.Random, text: str, questions: int) -> Planted:
    """Needles of different kinds, none of which has a distractor."""
    numbers, words = _numbers(draw, 4), draw.sample(WORDS, 3)
    relations = [
        ("phone number of Mr. Lighthouse", numbers[0]),
        ("secret word of the sailors", words[0]),
        ("pass key for the north gate", numbers[1]),
        ("hometown of the old captain", draw.choice(CITIES)),
        ("favourite fruit of Mrs. Palmer", draw.choice(("mango", "banana", "cherry", "lemon", "apricot", "coconut"))),
        ("colour of the mayor's coat", draw.choice(COLOURS)),
        ("code of the blue safe", numbers[2]),
        ("name of the miller's dog", draw.choice(FIRST_NAMES)),
        ("password of the library", words[1]),
        ("number of the lost ticket", numbers[3]),
        ("profession of Mr. Winterbottom", draw.choice(JOBS)),
        ("name of the white ship", _capital(words[2])),
    ]
    return _facts("single", draw, draw.sample(relations, min(questions, len(relations))))


def multi_key_words(draw: random.Random, text: str, questions: int) -> Planted:
    """One relation with many keys: words. All the other facts are distractors."""
    pairs = zip(draw.sample(GROUPS, questions), draw.sample(WORDS, questions), strict=True)
    return _facts("multi-key words", draw, [(f"secret word of the {key}", word) for key, word in pairs])


def multi_key_numbers(draw: random.Random, text: str, questions: int) -> Planted:
    """One relation with many keys: five-digit numbers."""
    pairs = zip(draw.sample(CITIES, questions), _numbers(draw, questions), strict=True)
    return _facts("multi-key numbers", draw, [(f"pass key for {key}", number) for key, number in pairs])


def multi_value(draw: random.Random, text: str, questions: int) -> Planted:
    """Every key has two values, in two places; the score is the share that the reply names."""
    items, cases = [], []
    words = iter(draw.sample(WORDS, 2 * questions))
    for number, (depth, key) in enumerate(zip(depths(draw, questions), draw.sample(SURNAMES, questions), strict=True)):
        values = next(words), next(words)
        items += [
            (at, fact(f"word on a card of Mr. {key}", word))
            for at, word in zip((depth, 1 - depth), values, strict=True)
        ]
        question = f"Which two words are on the cards of Mr. {key}?"
        cases.append(Case(f"multi-value-{number}", "multi-value", question, values, depth, 24))
    return Planted(tuple(items), tuple(cases))


def people(draw: random.Random, text: str, questions: int) -> Planted:
    """Question answering over distractors: short lives of people, one question about each."""
    items, cases = [], []
    places = draw.sample(CITIES, questions)
    names = zip(draw.sample(FIRST_NAMES, questions), draw.sample(SURNAMES, questions), strict=True)
    for number, (depth, (first, last)) in enumerate(zip(depths(draw, questions), names, strict=True)):
        name, job, place = f"{first} {last}", draw.choice(JOBS), places[number]
        thing, colour = draw.choice(THINGS), draw.choice(COLOURS)
        items.append(
            (
                depth,
                f"{name} was born in {place}. {name} works as a {job}. The {thing} of {name} is {colour}, and people in"
                f" {place} know {first} by it.",
            )
        )
        question, answer = [
            (f"Where was {name} born?", place),
            (f"What does {name} work as?", job),
            (f"What colour is the {thing} of {name}?", colour),
        ][number % 3]
        cases.append(Case(f"people-{number}", "people", question, (answer,), depth))
    return Planted(tuple(items), tuple(cases))


def quote(draw: random.Random, text: str, questions: int) -> Planted:
    """The text's own sentences: how one goes on whose first words are given. Nothing is planted."""
    words = list(re.finditer(r"\S+", text))
    cases: list[Case] = []
    for number, depth in enumerate(depths(draw, questions)):
        for at in range(int(depth * len(words)), len(words) - QUOTED - CONTINUED):
            chosen = [word.group() for word in words[at : at + QUOTED + CONTINUED]]
            start = text[words[at].start() : words[at + QUOTED - 1].end()]
            if all(word.isalpha() for word in chosen) and "\n\n" not in start and text.count(start) == 1:
                question = f'Continue this sentence from the text, word for word: "{" ".join(chosen[:QUOTED])}'
                answer = " ".join(chosen[QUOTED:])
                cases.append(Case(f"quote-{number}", "quote", question, (answer,), words[at].start() / len(text)))
                break
    return Planted((), tuple(cases))


def build_document(
    document_id: str,
    length: int,
    plans: Sequence[Plan],
    questions: int,
    source: str,
    place: tuple[int, int],
    measure: TextMeasure,
) -> Document:
    """A document of about `length` tokens out of the source, with what the plans put into it.

    place: (number, of): which of so many evenly spaced passages. Same arguments, same document.
    """
    room = length - RESERVED_TOKENS
    text = passage(source, *place, room, measure.cut)

    def planted() -> list[Planted]:
        draw = random.Random(f"{document_id} {length}")
        return [plan(draw, text, questions) for plan in plans]

    paragraphs = [paragraph for part in planted() for _, paragraph in part.items]
    text = measure.cut(text, max(room - measure.count("\n\n".join(paragraphs)), 0))
    parts = planted()  # the same facts again, now that the text is as short as it will be
    body = insert(text, [item for part in parts for item in part.items])
    return Document(document_id, length, body, tuple(case for part in parts for case in part.cases))


def _facts(task: str, draw: random.Random, pairs: Sequence[tuple[str, str]]) -> Planted:
    """(relation, value) pairs at depths that cover the document, each asked for."""
    items, cases = [], []
    for number, (depth, (relation, value)) in enumerate(zip(depths(draw, len(pairs)), pairs, strict=True)):
        items.append((depth, fact(relation, value)))
        cases.append(Case(f"{task}-{number}", task, f"What is the {relation}?", (value,), depth))
    return Planted(tuple(items), tuple(cases))


def depths(draw: random.Random, count: int) -> list[float]:
    """Evenly spread over the document, in any order."""
    spread = [(i + 0.5) / count for i in range(count)]
    draw.shuffle(spread)
    return spread


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
