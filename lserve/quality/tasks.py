"""The tasks: what is planted into a text and asked about it.

A task draws facts and questions (`plan`), and `build_document` plants the facts of one or more tasks into one passage.
Everything follows from the seed. The needle tasks are RULER's (arXiv 2404.06654) in sentences that small chat models
can follow; each fact is said three times, since a model of 135M parameters does not recall what it read once.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .cases import Case, Document
from .relations import NAME_RELATIONS, NUMBER_RELATIONS, PAIRED_RELATIONS, PERSONS, WORD_RELATIONS
from .text import insert, passage
from .vocabulary import CITIES, COLOURS, FIRST_NAMES, GROUPS, JOBS, SURNAMES, THINGS, WORDS

MAX_QUESTIONS = 10
"""Of one task in one document: there are only so many relations."""

RESERVED_TOKENS = 120
"""Room in the length for the chat template, the question and the reply."""

SPARE_TOKENS = 8
"""How far past a resume point a document may end: cutting text moves its length by a token or two."""

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

    def overhang(self, text: str) -> int:
        """Tokens at the end of a document that each of its questions would compute anew; 0 where nobody knows."""


def fact(relation: str, value: str) -> str:
    """A fact to remember, said three times."""
    told = f"The {relation} is {value}. Remember it. {_capital(value)} is the {relation}."
    return f"{told} Once more: the {relation} is {value}."


def numbers(draw: random.Random, text: str, questions: int) -> Planted:
    """Single needles: different relations, five-digit numbers."""
    relations = draw.sample(NUMBER_RELATIONS, min(questions, len(NUMBER_RELATIONS)))
    return _facts("numbers", draw, list(zip(relations, _numbers(draw, len(relations)), strict=True)))


def words(draw: random.Random, text: str, questions: int) -> Planted:
    """Single needles: different relations, everyday words."""
    return _single("words", draw, WORD_RELATIONS, questions)


def names(draw: random.Random, text: str, questions: int) -> Planted:
    """Single needles: different relations, names of people and places."""
    return _single("names", draw, NAME_RELATIONS, questions)


def single(draw: random.Random, text: str, questions: int) -> Planted:
    """Single needles of two kinds, numbers and words, mixed."""
    return _mixed(draw, questions, WORD_RELATIONS)


def mixed(draw: random.Random, text: str, questions: int) -> Planted:
    """Single needles of all three kinds, mixed: for documents that hold no names beside them."""
    return _mixed(draw, questions, WORD_RELATIONS, NAME_RELATIONS)


def pairs(draw: random.Random, text: str, questions: int) -> Planted:
    """Multi-key needles with one distractor each: every relation has two keys."""
    chosen = draw.sample(PAIRED_RELATIONS, min((questions + 1) // 2, len(PAIRED_RELATIONS)))
    facts = []
    for relation, keys, values in chosen:
        drawn = _numbers(draw, 2) if values is None else draw.sample(values, 2)
        facts += [(relation.format(key), value) for key, value in zip(keys, drawn, strict=True)]
    return _facts("pairs", draw, facts[:questions])


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
    drawn = iter(draw.sample(WORDS, 2 * questions))
    for number, (depth, key) in enumerate(zip(depths(draw, questions), draw.sample(SURNAMES, questions), strict=True)):
        values = next(drawn), next(drawn)
        items += [
            (at, fact(f"word on a card of Mr. {key}", word))
            for at, word in zip((depth, 1 - depth), values, strict=True)
        ]
        question = f"Which two words are on the cards of Mr. {key}?"
        cases.append(Case(f"multi-value-{number}", "multi-value", question, values, depth, 24))
    return Planted(tuple(items), tuple(cases))


def people(draw: random.Random, text: str, questions: int) -> Planted:
    """Question answering over distractors: short lives of a few people, three questions about each."""
    count = -(-questions // 3)
    items: list[tuple[float, str]] = []
    cases: list[Case] = []
    places, jobs, colours = draw.sample(CITIES, count), draw.sample(JOBS, count), draw.sample(COLOURS, count)
    full_names = zip(draw.sample(FIRST_NAMES, count), draw.sample(SURNAMES, count), strict=True)
    for number, (depth, (first, last)) in enumerate(zip(depths(draw, count), full_names, strict=True)):
        name, place, job, colour = f"{first} {last}", places[number], jobs[number], colours[number]
        thing = draw.choice(THINGS)
        life = f"{name} was born in {place}. {name} works as a {job}. The {thing} of {name} is {colour}."
        items.append((depth, f"{life} Everyone in {place} knows {name}, the {job} with the {colour} {thing}."))
        asked = (
            (f"Where was {name} born?", place),
            (f"What does {name} work as?", job),
            (f"What colour is the {thing} of {name}?", colour),
        )
        for question, answer in asked:
            cases.append(Case(f"people-{len(cases)}", "people", question, (answer,), depth))
    return Planted(tuple(items), tuple(cases[:questions]))


def quote(draw: random.Random, text: str, questions: int) -> Planted:
    """The text's own sentences: how one goes on whose first words are given. Nothing is planted."""
    found = list(re.finditer(r"\S+", text))
    cases: list[Case] = []
    for number, depth in enumerate(depths(draw, questions)):
        for at in range(int(depth * len(found)), len(found) - QUOTED - CONTINUED):
            chosen = [word.group() for word in found[at : at + QUOTED + CONTINUED]]
            start = text[found[at].start() : found[at + QUOTED - 1].end()]
            if all(word.isalpha() for word in chosen) and "\n\n" not in start and text.count(start) == 1:
                question = f'Continue this sentence from the text, word for word: "{" ".join(chosen[:QUOTED])}'
                answer = " ".join(chosen[QUOTED:])
                cases.append(Case(f"quote-{number}", "quote", question, (answer,), found[at].start() / len(text)))
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
    left = max(room - measure.count("\n\n".join(paragraphs)), 0)
    whole, body = text, ""
    for _ in range(2):  # the second time a little shorter, so that prefix caching takes it up at its very end
        text = measure.cut(whole, left)
        parts = planted()  # the same facts again, now that the text is as short as it will be
        body = insert(text, [item for part in parts for item in part.items])
        overhang = measure.overhang(body)
        if overhang <= SPARE_TOKENS:
            break
        left = max(left - overhang + SPARE_TOKENS // 2, 0)
    return Document(document_id, length, body, tuple(case for part in parts for case in part.cases))


def _mixed(draw: random.Random, questions: int, *others: Sequence[tuple[str, Sequence[str]]]) -> Planted:
    """Facts about numbers and of the other kinds of relation, as many of each."""
    kinds = ([*zip(NUMBER_RELATIONS, [_numbers(draw, 1) for _ in NUMBER_RELATIONS], strict=True)], *others)
    each = -(-questions // len(kinds))
    return _single("single", draw, [relation for kind in kinds for relation in draw.sample(kind, each)], questions)


def _single(task: str, draw: random.Random, relations: Sequence[tuple[str, Sequence[str]]], questions: int) -> Planted:
    """Facts of different relations with values that no other of them has."""
    taken: set[str] = set()
    facts = []
    for relation, values in draw.sample(relations, min(questions, len(relations))):
        value = draw.choice([value for value in values if value not in taken])
        taken.add(value)
        facts.append((relation, value))
    return _facts(task, draw, facts)


def _facts(task: str, draw: random.Random, pairs: Sequence[tuple[str, str]]) -> Planted:
    """(relation, value) pairs at depths that cover the document, each asked for."""
    items, cases = [], []
    for number, (depth, (relation, value)) in enumerate(zip(depths(draw, len(pairs)), pairs, strict=True)):
        items.append((depth, fact(relation, value)))
        cases.append(Case(f"{task}-{number}", task, _question(relation), (value,), depth))
    return Planted(tuple(items), tuple(cases))


def depths(draw: random.Random, count: int) -> list[float]:
    """Evenly spread over the document, in any order."""
    spread = [(i + 0.5) / count for i in range(count)]
    draw.shuffle(spread)
    return spread


def _question(relation: str) -> str:
    asked = "Who" if relation.startswith(PERSONS) else "What"
    return f"{asked} is the {relation}?"


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10_000, 100_000), count)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
