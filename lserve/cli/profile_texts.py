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
FACT_TOKENS = 60
"""Room that a document leaves for each fact and its question."""


@dataclass(frozen=True, slots=True)
class ProfileTexts:
    """calibration ranks the heads; passages (token ids) and documents are the gate's."""

    calibration: tuple[PlantedText, ...]
    passages: tuple[tuple[int, ...], ...]
    documents: tuple[FactDocument, ...]


def make_texts(tokenizer: Tokenizer, text: str, source: str, length: int, seed: int) -> ProfileTexts:
    """Two calibration texts of a third of the length, two passages of two thirds, two documents of all of it.

    source: what the text came from, for the message. Raises SettingsError when there is too little of it.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    num_facts = min(MAX_FACTS, length // (4 * FACT_TOKENS))
    sizes = [length // 3] * 2 + [length * 2 // 3] * 2 + [length - num_facts * FACT_TOKENS] * 2
    spare = len(token_ids) - sum(sizes)
    if spare < 0:
        raise SettingsError(
            f"{source}: {len(token_ids)} tokens of text are too few to profile at --length {length}, "
            f"{sum(sizes)} are needed: give more --data, or a smaller --length"
        )
    draw = random.Random(seed)
    order = draw.sample(range(len(sizes)), len(sizes))
    pieces: dict[int, list[int]] = {}
    at = 0
    for number in order:
        at += spare // len(sizes)
        pieces[number] = token_ids[at : at + sizes[number]]
        at += sizes[number]
    texts = [tokenizer.decode(pieces[number]) for number in range(len(sizes))]
    return ProfileTexts(
        calibration=tuple(_planted_text(tokenizer, text, num_facts, draw) for text in texts[:2]),
        passages=tuple(tuple(tokenizer.encode(tokenizer.decode(pieces[number]))) for number in (2, 3)),
        documents=tuple(_fact_document(tokenizer, text, num_facts, draw) for text in texts[4:]),
    )


def _planted_text(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> PlantedText:
    """The text with facts, which are asked for and told again after it, one after the other."""
    planted = single(draw, text, num_facts)
    body = insert(text, planted.items)
    token_ids = tokenizer.encode(body)
    starts = tokenizer.token_starts(body)
    running = range(len(token_ids))
    answers: list[int] = []
    mentions: list[range] = []
    told = {case.case_id: item for case, (_, item) in zip(planted.cases, planted.items, strict=True)}
    for case in draw.sample(planted.cases, len(planted.cases)):
        first = body.index(told[case.case_id])
        mention = range(bisect_left(starts, first), bisect_left(starts, first + len(told[case.case_id])))
        token_ids += tokenizer.encode(f"\n\n{case.question} {_opening(case)}", add_special_tokens=False)
        answer = tokenizer.encode(f" {case.answers[0]}", add_special_tokens=False)
        answers += range(len(token_ids), len(token_ids) + len(answer))
        mentions += [mention] * len(answer)
        token_ids += answer
    return PlantedText(tuple(token_ids), running, tuple(answers), tuple(mentions))


def _fact_document(tokenizer: Tokenizer, text: str, num_facts: int, draw: random.Random) -> FactDocument:
    """The text with facts, and a chat's questions about them, whose replies begin as the facts do."""
    planted = single(draw, text, num_facts)
    body = insert(text, planted.items)
    prompts = [chat(tokenizer, f"{body}\n\n{case.question}") for case in planted.cases]
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    questions = [
        Question(
            (*prompt[shared:], *tokenizer.encode(_opening(case), add_special_tokens=False)),
            tuple(tokenizer.encode(f" {case.answers[0]}", add_special_tokens=False)),
        )
        for prompt, case in zip(prompts, planted.cases, strict=True)
    ]
    return FactDocument(tuple(prompts[0][:shared]), tuple(questions))


def chat(tokenizer: Tokenizer, message: str) -> list[int]:
    """A user's message in the model's chat template; as plain text where it has none."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([("user", message)])
    return tokenizer.encode(f"{message}\n")


def _opening(case: Case) -> str:
    """What comes before the answer: `What is the code of the safe?` is answered by `The code of the safe is ...`."""
    return f"The {case.question.removeprefix('What is the ').removesuffix('?')} is"
