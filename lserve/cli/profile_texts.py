"""What `lserve profile` measures on: pieces of the text, each used once, with facts planted into them."""

import os
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from lserve.engine.errors import SettingsError
from lserve.engine.profile import PlantedText
from lserve.engine.profile_gate import FactDocument, Question
from lserve.engine.tokenizer import Tokenizer
from lserve.quality.cases import Case
from lserve.quality.tasks import mixed
from lserve.quality.text import insert

MAX_FACTS = 16
FACT_TOKENS = 48
"""Room that a document leaves for each fact and its question."""

NUM_DOCUMENTS = 3


@dataclass(frozen=True, slots=True)
class ProfileTexts:
    """calibration ranks the heads; documents are the accuracy gate's."""

    calibration: tuple[PlantedText, ...]
    documents: tuple[FactDocument, ...]


def make_texts(
    tokenizer: Tokenizer, text: str, source: str, length: int, num_calibration: int, seed: int
) -> ProfileTexts:
    """Calibration texts of half the length, and documents of all of it, from parts that do not overlap.

    source: what the text came from, for the message. Raises SettingsError when there is too little of it.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    num_facts = min(MAX_FACTS, length // (4 * FACT_TOKENS))
    sizes = [length // 2] * num_calibration + [length - num_facts * FACT_TOKENS] * NUM_DOCUMENTS
    spare = len(token_ids) - sum(sizes)
    if spare < 0:
        raise SettingsError(
            f"{source}: {len(token_ids)} tokens of text are too few to profile at --length {length}, "
            f"{sum(sizes)} are needed: give more --data, fewer --texts or a smaller --length"
        )
    draw = random.Random(seed)
    pieces: dict[int, str] = {}
    at = 0
    for number in draw.sample(range(len(sizes)), len(sizes)):
        at += spare // len(sizes)
        pieces[number] = tokenizer.decode(token_ids[at : at + sizes[number]])
        at += sizes[number]
    calibration = tuple(_planted_text(tokenizer, pieces[i], num_facts, draw) for i in range(num_calibration))
    documents = (_fact_document(tokenizer, pieces[i], num_facts, draw) for i in range(num_calibration, len(sizes)))
    return ProfileTexts(calibration, tuple(documents))


def _planted_text(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> PlantedText:
    """The text with facts, which are asked for and told again after it, one after the other."""
    planted = mixed(draw, text, num_facts)
    body = insert(text, planted.items).strip()  # templates may strip what is said
    told = {case.case_id: item for case, (_, item) in zip(planted.cases, planted.items, strict=True)}
    cases = draw.sample(planted.cases, len(planted.cases))
    replies = [f"{_opening(told[case.case_id], case)} {case.answers[0]}." for case in cases]
    whole = _dialogue(tokenizer, body, [(case.question, reply) for case, reply in zip(cases, replies, strict=True)])
    starts = tokenizer.token_starts(whole, _adds_special_tokens(tokenizer))

    def tokens(first: int, end: int) -> range:
        return range(bisect_left(starts, first), bisect_left(starts, end))

    at = whole.index(body)
    running = tokens(at, at + len(body))
    at += len(body)
    answers: list[int] = []
    mentions: list[range] = []
    for case, reply in zip(cases, replies, strict=True):
        fact, end = whole.index(told[case.case_id]), whole.index(reply, at) + len(reply) - 1
        answer = tokens(end - len(case.answers[0]) - 1, end)
        answers += answer
        mentions += [tokens(fact, fact + len(told[case.case_id]))] * len(answer)
        at = end
    token_ids = tokenizer.encode(whole, _adds_special_tokens(tokenizer))
    return PlantedText(tuple(token_ids), running, tuple(answers), tuple(mentions))


def _fact_document(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> FactDocument:
    """The text with facts, and questions about them, whose replies begin as the facts do."""
    planted = mixed(draw, text, num_facts)
    body = insert(text, planted.items).strip()  # templates may strip what is said
    prompts = [
        _prompt(tokenizer, body, case, fact) for case, (_, fact) in zip(planted.cases, planted.items, strict=True)
    ]
    shared = len(os.path.commonprefix(prompts))
    answers = [tokenizer.encode(f" {case.answers[0]}", add_special_tokens=False) for case in planted.cases]
    questions = (Question(tuple(p[shared:]), tuple(a)) for p, a in zip(prompts, answers, strict=True))
    return FactDocument(tuple(prompts[0][:shared]), tuple(questions))


def _prompt(tokenizer: Tokenizer, body: str, case: Case, fact: str) -> list[int]:
    """The body, one question about it, and how the reply begins."""
    whole = _dialogue(tokenizer, body, [(case.question, "")])
    return tokenizer.encode(whole + _opening(fact, case), _adds_special_tokens(tokenizer))


def _adds_special_tokens(tokenizer: Tokenizer) -> bool:
    """Whether encoding has to add what a chat template writes itself, such as a beginning token."""
    return not tokenizer.has_chat_template


def _dialogue(tokenizer: Tokenizer, body: str, turns: Sequence[tuple[str, str]]) -> str:
    """Questions about the body and their replies, in the model's chat template: as they will be served, for heads that
    find facts from inside a running text are not those that find them for a reply. As plain text where there is no
    template. A last reply that is empty is left to be written.
    """
    if not tokenizer.has_chat_template:
        return body + "".join(f"\n\n{question} {reply}" for question, reply in turns)
    messages: list[tuple[str, str]] = []
    for question, reply in turns:
        asked = question if messages else f"{body}\n\n{question}"
        messages += [("user", asked), ("assistant", reply)]
    return tokenizer.chat_text(messages if turns[-1][1] else messages[:-1])


def _opening(fact: str, case: Case) -> str:
    """What stands before the answer: `The code of the safe is` of `The code of the safe is 4711. Remember it. ...`."""
    return fact.partition(f" {case.answers[0]}.")[0]
