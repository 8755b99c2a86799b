"""RULER's tasks beside needles (arXiv 2404.06654), in small forms of which one document holds many.

Variable tracking asks for what a chain of assignments comes to; common and frequent words ask for what a list that is
scattered over the document repeats. Small models fail most of them densely: then they are reported, not compared.
"""

import random

from .cases import Case
from .tasks import Planted, depths
from .vocabulary import CITIES, WORDS

COMMON_TIMES, RARE_TIMES, RARE_WORDS = 6, 1, 8


def variable_tracking(draw: random.Random, text: str, questions: int) -> Planted:
    """Chains of three assignments in ascending order of place; asked for the number that the last variable has."""
    letters = draw.sample([a + b + c for a in "BDFKM" for b in "AEOU" for c in "LNRSX"], 3 * questions)
    numbers = draw.sample(range(10_000, 100_000), questions)
    items, cases = [], []
    for number, depth in enumerate(depths(draw, questions)):
        first, second, third = letters[3 * number : 3 * number + 3]
        steps = (f"VAR {first} = {numbers[number]}.", f"VAR {second} = VAR {first}.", f"VAR {third} = VAR {second}.")
        items += [(depth + (1 - depth) * part, step) for part, step in zip((0, 0.3, 0.6), steps, strict=True)]
        question = f"Follow the VAR assignments in the text. Which number does VAR {third} have?"
        cases.append(Case(f"variables-{number}", "variable tracking", question, (str(numbers[number]),), depth))
    return Planted(tuple(items), tuple(cases))


def common_words(draw: random.Random, text: str, questions: int) -> Planted:
    """Lists in pieces; in each, two words stand often and the others once."""
    return _lists("common words", draw, questions, (COMMON_TIMES, COMMON_TIMES))


def frequent_words(draw: random.Random, text: str, questions: int) -> Planted:
    """Lists in pieces, whose words get rarer as in real text; asked for the two most frequent ones."""
    return _lists("frequent words", draw, questions, (9, 5, 3, 2))


def _lists(task: str, draw: random.Random, questions: int, often: tuple[int, ...]) -> Planted:
    items, cases = [], []
    for number, name in enumerate(draw.sample(CITIES, questions)):
        words = draw.sample(WORDS, len(often) + RARE_WORDS)
        times = [*often, *[RARE_TIMES] * RARE_WORDS]
        listed = [word for word, count in zip(words, times, strict=True) for _ in range(count)]
        draw.shuffle(listed)
        pieces = [listed[i::4] for i in range(4)]
        title = f"The {task} list of {name}"
        items += [((i + draw.random()) / 4, f"{title}: {', '.join(piece)}.") for i, piece in enumerate(pieces)]
        question = f"Which two words stand most often in the {task} list of {name}?"
        cases.append(Case(f"{task}-{number}", task, question, tuple(words[:2]), None, 24))
    return Planted(tuple(items), tuple(cases))
