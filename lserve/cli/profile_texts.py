"""What `lserve profile` measures on: pieces of the text, each used once, with facts planted into them."""

import random
from bisect import bisect_left
from dataclasses import dataclass

from lserve.engine.errors import SettingsError
from lserve.engine.profile import PlantedText
from lserve.engine.profile_gate import FactDocument, Question
from lserve.engine.tokenizer import Tokenizer
from lserve.quality.cases import Case
from lserve.quality.tasks import single
from lserve.quality.text import insert

MAX_FACTS = 12
FACT_TOKENS = 48
"""Room that a document leaves for each fact and its question."""


NUM_CALIBRATION, NUM_DOCUMENTS = 2, 3


@dataclass(frozen=True, slots=True)
class ProfileTexts:
    """calibration ranks the heads; documents are the accuracy gate's."""

    calibration: tuple[PlantedText, ...]
    documents: tuple[FactDocument, ...]


def make_texts(tokenizer: Tokenizer, text: str, source: str, length: int, seed: int) -> ProfileTexts:
    """Calibration texts of half the length, and documents of all of it, from parts that do not overlap.

    source: what the text came from, for the message. Raises SettingsError when there is too little of it.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    num_facts = min(MAX_FACTS, length // (4 * FACT_TOKENS))
    sizes = [length // 2] * NUM_CALIBRATION + [length - num_facts * FACT_TOKENS] * NUM_DOCUMENTS
    spare = len(token_ids) - sum(sizes)
    if spare < 0:
        raise SettingsError(
            f"{source}: {len(token_ids)} tokens of text are too few to profile at --length {length}, "
            f"{sum(sizes)} are needed: give more --data, or a smaller --length"
        )
    draw = random.Random(seed)
    pieces: dict[int, str] = {}
    at = 0
    for number in draw.sample(range(len(sizes)), len(sizes)):
        at += spare // len(sizes)
        pieces[number] = tokenizer.decode(token_ids[at : at + sizes[number]])
        at += sizes[number]
    calibration = tuple(_planted_text(tokenizer, pieces[i], num_facts, draw) for i in range(NUM_CALIBRATION))
    documents = (_fact_document(tokenizer, pieces[i], num_facts, draw) for i in range(NUM_CALIBRATION, len(sizes)))
    return ProfileTexts(calibration, tuple(documents))


def _planted_text(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> PlantedText:
    """The text with facts, half of which are asked for and told again after it, one after the other."""
    planted = single(draw, text, num_facts)
    body = insert(text, planted.items)
    token_ids = tokenizer.encode(body)
    starts = tokenizer.token_starts(body)
    running = range(len(token_ids))
    answers: list[int] = []
    mentions: list[range] = []
    told = {case.case_id: item for case, (_, item) in zip(planted.cases, planted.items, strict=True)}
    for case in draw.sample(planted.cases, (len(planted.cases) + 1) // 2):
        first = body.index(told[case.case_id])
        mention = range(bisect_left(starts, first), bisect_left(starts, first + len(told[case.case_id])))
        asked = f"\n\n{case.question} {_opening(told[case.case_id], case)}"
        token_ids += tokenizer.encode(asked, add_special_tokens=False)
        answer = tokenizer.encode(f" {case.answers[0]}", add_special_tokens=False)
        answers += range(len(token_ids), len(token_ids) + len(answer))
        mentions += [mention] * len(answer)
        token_ids += answer
    return PlantedText(tuple(token_ids), running, tuple(answers), tuple(mentions))


def _fact_document(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> FactDocument:
    """The text with facts, and questions about them, whose replies begin as the facts do."""
    planted = single(draw, text, num_facts)
    questions = tuple(
        Question(
            tuple(tokenizer.encode(f"\n\n{case.question} {_opening(fact, case)}", add_special_tokens=False)),
            tuple(tokenizer.encode(f" {case.answers[0]}", add_special_tokens=False)),
        )
        for case, (_, fact) in zip(planted.cases, planted.items, strict=True)
    )
    return FactDocument(tuple(tokenizer.encode(insert(text, planted.items))), questions)


def _opening(fact: str, case: Case) -> str:
    """What stands before the answer: `The code of the safe is` of `The code of the safe is 4711. Remember it. ...`."""
    return fact.partition(f" {case.answers[0]}.")[0]
