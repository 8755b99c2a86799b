"""Reads passages of real text with every arm: bits per character, and agreement with the baseline's next tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lserve.engine.errors import CapacityError

from .engine_asker import EngineAsker
from .likelihood import TextScore, read_text
from .suite import State, Tell
from .summary import TextRow
from .text import passage


def read_passages(
    askers: Sequence[EngineAsker],
    source: str,
    num_passages: int,
    num_tokens: int,
    state: State,
    tell: Tell,
    done: Callable[[], None],
) -> tuple[TextRow, ...]:
    """Scores the second half of each passage. done is called after each arm's share of one."""
    scores: dict[str, list[TextScore]] = {asker.name: [] for asker in askers}
    for number in range(num_passages):
        text = passage(source, number, num_passages, num_tokens, askers[0].cut)
        read: list[TextScore | None] = []
        for asker in askers:
            key = f"text.{number}/{asker.name}"
            if state.get(key) is None:
                state.put(key, _read(asker, text, tell))
            kept = state.get(key)
            read.append(TextScore(**{**kept, "top_tokens": tuple(kept["top_tokens"])}) if kept else None)
            done()
        for asker, score in zip(askers, read, strict=True):
            if score is not None and None not in read:
                scores[asker.name].append(score)
    if not scores[askers[0].name]:
        return ()
    return tuple(_row(asker.name, scores[asker.name], scores[askers[0].name]) for asker in askers)


def _read(asker: EngineAsker, text: str, tell: Tell) -> dict[str, object]:
    tokens = asker.engine.tokenizer.encode(text, add_special_tokens=False)
    asker.select()
    try:
        return asdict(read_text(asker.engine, tokens, len(tokens) // 2, attention=asker.attention))
    except CapacityError as error:
        tell(f"{asker.name}: a passage of {len(tokens)} tokens is left out: {error.message}")
        return {}


def _row(arm: str, scores: Sequence[TextScore], base: Sequence[TextScore]) -> TextRow:
    prompt, decode = _bits_per_character(scores)
    base_prompt, base_decode = _bits_per_character(base)
    ours, theirs = ([token for score in part for token in score.top_tokens] for part in (scores, base))
    agreement = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours) if ours else math.nan
    return TextRow(arm, prompt, decode, prompt / base_prompt - 1, decode / base_decode - 1, agreement)


def _bits_per_character(scores: Sequence[TextScore]) -> tuple[float, float]:
    prompt = sum(s.prompt_bits for s in scores) / sum(s.prompt_characters for s in scores)
    characters = sum(s.decode_characters for s in scores)
    return prompt, sum(s.decode_bits for s in scores) / characters if characters else math.nan
