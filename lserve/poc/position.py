"""Position questions: what stood first, and what last, of several notes that differ only in where they are."""

import random

from lserve.quality.cases import Case
from lserve.quality.tasks import Planted
from lserve.quality.vocabulary import SURNAMES, WORDS

NOTES = 3
ORDINALS = ("first", "last")


def position(draw: random.Random, text: str, questions: int) -> Planted:
    """For each question, three notes by one person in three parts of the text; asked for the first or the last one."""
    items: list[tuple[float, str]] = []
    cases = []
    words = iter(draw.sample(WORDS, NOTES * questions))
    for number, name in enumerate(draw.sample(SURNAMES, questions)):
        notes = [next(words) for _ in range(NOTES)]
        places = [(part + draw.random()) / NOTES for part in range(NOTES)]
        items += [
            (place, f"A note by {name}: the word here is {word}.") for place, word in zip(places, notes, strict=True)
        ]
        ordinal = ORDINALS[number % len(ORDINALS)]
        place = 0 if ordinal == "first" else -1
        question = f"{name} wrote several notes in this text. Which word is in the {ordinal} note by {name}?"
        cases.append(Case(f"position-{number}", "position", question, (notes[place],), places[place]))
    return Planted(tuple(items), tuple(cases))
