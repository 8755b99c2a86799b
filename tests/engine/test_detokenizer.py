from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from lserve.engine.detokenizer import Detokenizer, Piece, StopFinder, TextStream
from lserve.engine.request import FinishReason, SampledToken, SamplingParams
from lserve.engine.tokenizer import Tokenizer

HARD_TEXTS = [
    "Hello, world!",
    "你好，世界。今天天气怎么样？",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 naïve café Ångström",
    "नमस्ते दुनिया, こんにちは世界, 안녕하세요",
    "\u200b\u0301zero width, \ufffd a real replacement character \ufffd",
    "def f(x):\n    return x ** 2\n\n\n```",
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["🎉", "好", "é", " ", "a", "the", "\n", "\ufffd", "👩‍👧"]), max_size=30).map("".join),
)
NO_EOS: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(str(demo_model_path))


@dataclass
class Run:
    """What a client got of one choice."""

    text: str
    num_tokens: int
    last: Piece


def stream(detokenizer: Detokenizer, token_ids: Sequence[int]) -> Run:
    """Feeds tokens until the choice ends or there are no more."""
    text, piece, num_tokens = "", Piece(""), 0
    for token_id in token_ids:
        piece = detokenizer.push(SampledToken(token_id))
        text += piece.text
        num_tokens += 1
        if piece.finish_reason is not None:
            break
    return Run(text, num_tokens, piece)


def long(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=10_000, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = TextStream(tokenizer, tokenizer.encode("Say:"))
    parts = [pieces.push(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(parts) + pieces.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
        assert pieces.flush() == ""


def test_a_character_comes_with_its_last_token_not_later(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("好🎉", add_special_tokens=False)
    pieces = TextStream(tokenizer, [])
    parts = [pieces.push(token_id) for token_id in token_ids]
    assert [part for part in parts if part] == ["好", "🎉"]
    assert parts[-1] == "🎉"


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, prompt=TEXTS)
def test_any_text_after_any_prompt(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    pieces = TextStream(tokenizer, tokenizer.encode(prompt))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces.push(token_id) for token_id in token_ids) + pieces.flush() == tokenizer.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_text_come_out_as_decoding_all_at_once_gives_them(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    fragments = tokenizer.encode("你好🎉é€", add_special_tokens=False)
    token = st.one_of(st.sampled_from(fragments), st.integers(17, 49_151))
    token_ids = data.draw(st.lists(token, max_size=80))
    pieces = TextStream(tokenizer, [])
    assert "".join(pieces.push(token_id) for token_id in token_ids) + pieces.flush() == tokenizer.decode(token_ids)


def test_endless_garbage_neither_grows_nor_stalls(tokenizer: Tokenizer) -> None:
    (lead_byte, *_) = tokenizer.encode("🎉", add_special_tokens=False)
    longest = 0

    class Counting:
        def decode(self, token_ids: Sequence[int]) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return tokenizer.decode(token_ids)

    pieces = TextStream(Counting(), [])
    parts = [pieces.push(lead_byte) for _ in range(500)]
    assert "".join(parts) + pieces.flush() == tokenizer.decode([lead_byte] * 500)
    assert len("".join(parts)) >= 490
    assert longest <= 20


def test_a_prompt_that_ends_within_a_character_is_completed(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("ok 🎉 done", add_special_tokens=False)
    for cut in range(len(token_ids)):
        whole = tokenizer.decode(token_ids[:cut]).rstrip("\ufffd")
        pieces = TextStream(tokenizer, token_ids[:cut])
        assert whole + "".join(pieces.push(token_id) for token_id in token_ids[cut:]) == "ok 🎉 done"


class SentencePiece:
    """A vocabulary like Llama 2's: words that carry their space, and a token per byte for everything else."""

    def __init__(self) -> None:
        words = ["▁the", "▁cat", "s", "▁", ",", "好"]
        self.vocab = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
        self.backend = RustTokenizer(models.WordLevel(self.vocab, unk_token="▁"))
        self.backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(token_ids)))

    def bytes_of(self, text: str) -> list[int]:
        return [self.vocab[f"<0x{byte:02X}>"] for byte in text.encode()]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["▁the", "▁cat", "s", ",", "好", "世界", "é", "🎉🎊"]), min_size=1, max_size=40), st.data()
)
def test_byte_tokens_and_leading_spaces_of_sentencepiece(words: list[str], data: st.DataObject) -> None:
    vocabulary = SentencePiece()
    units = [[vocabulary.vocab[word]] if word in vocabulary.vocab else vocabulary.bytes_of(word) for word in words]
    cut = data.draw(st.integers(0, len(units)))
    prompt = [token for unit in units[:cut] for token in unit]
    output = [token for unit in units[cut:] for token in unit]
    pieces = TextStream(vocabulary, prompt)
    text = "".join(pieces.push(token) for token in output) + pieces.flush()
    assert vocabulary.decode(prompt) + text == vocabulary.decode(prompt + output)


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the first end of any stop, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@example(["xa", "b"], ["b", "ab", "cab"])
@given(st.lists(st.text("ab\n", max_size=6), max_size=12), STOPS)
def test_stops_are_found_however_the_text_is_cut(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown, met = "", None
    for part in parts:
        text, met = finder.push(part)
        shown += text
        if met is not None:
            break
    else:
        shown += finder.flush()
    assert (shown, met) == naive_stop("".join(parts), stops)


@given(st.text("ab", max_size=20), STOPS)
def test_only_a_possible_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    assume(naive_stop(text, stops)[1] is None)
    shown, _ = StopFinder(stops).push(text)
    held = text[len(shown) :]
    beginnings = [stop[:length] for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
    assert held == max(beginnings, key=len, default="")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("\n\n",), "One.\nTwo."),
        (("Two",), "One.\n"),
        (("ne.\nTw", "Three"), "O"),
        (("🎉",), "One.\nTwo.\n\nThree "),
        (("absent",), "One.\nTwo.\n\nThree 🎉 four."),
    ],
)
def test_stop_strings_over_token_boundaries(tokenizer: Tokenizer, stop: tuple[str, ...], expected: str) -> None:
    token_ids = tokenizer.encode("One.\nTwo.\n\nThree 🎉 four.", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, long(stop=stop), NO_EOS, [])
    run = stream(detokenizer, token_ids)
    assert run.text + detokenizer.flush() == expected
    assert run.last.stop_reason == (None if stop == ("absent",) else stop[0])
    assert run.last.finish_reason == (None if stop == ("absent",) else FinishReason.STOP)


@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS, stops=st.lists(st.sampled_from(["好", "🎉", "the", "a ", "\n\n", "é🎉"]), max_size=3), data=st.data()
)
def test_a_replay_goes_on_where_the_lost_worker_stopped(
    tokenizer: Tokenizer, text: str, stops: list[str], data: st.DataObject
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    params = SamplingParams(max_tokens=data.draw(st.integers(1, 40)), stop=tuple(stops))
    unbroken = stream(Detokenizer(tokenizer, params, NO_EOS, []), token_ids)
    sent = data.draw(st.integers(0, max(unbroken.num_tokens - 1, 0)))
    before = stream(Detokenizer(tokenizer, params, NO_EOS, []), token_ids[:sent])
    after = stream(Detokenizer(tokenizer, params, NO_EOS, [], token_ids[:sent]), token_ids[sent:])
    assert before.text + after.text == unbroken.text
    assert before.num_tokens + after.num_tokens == unbroken.num_tokens
    if after.num_tokens:
        assert after.last == unbroken.last


def test_eos_ends_the_choice_and_adds_no_text(tokenizer: Tokenizer) -> None:
    token_ids = [*tokenizer.encode("Yes 🎉", add_special_tokens=False)[:-1], 2]
    run = stream(Detokenizer(tokenizer, long(), {2}, []), token_ids)
    assert run.text == "Yes \ufffd"
    assert (run.last.finish_reason, run.last.stop_reason) == (FinishReason.STOP, None)


def test_ignored_eos_does_not_end_the_choice_but_a_stop_token_does(tokenizer: Tokenizer) -> None:
    yes = tokenizer.encode("Yes", add_special_tokens=False)
    run = stream(Detokenizer(tokenizer, long(ignore_eos=True), {2}, []), [*yes, 2, *yes])
    assert (run.text, run.last.finish_reason) == ("YesYes", None)
    run = stream(Detokenizer(tokenizer, long(ignore_eos=True, stop_token_ids=(2,)), {2}, []), [*yes, 2, *yes])
    assert (run.text, run.num_tokens) == ("Yes", len(yes) + 1)
    assert run.last == Piece("", FinishReason.STOP, 2)


def test_text_held_for_a_stop_comes_out_when_the_choice_ends_otherwise(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("The end", add_special_tokens=False)
    params = SamplingParams(max_tokens=len(token_ids), stop=(" end of it",))
    detokenizer = Detokenizer(tokenizer, params, NO_EOS, [])
    run = stream(detokenizer, token_ids)
    assert (run.text, run.last.finish_reason) == ("The end", FinishReason.LENGTH)
    outside = Detokenizer(tokenizer, long(stop=(" end of it",)), NO_EOS, [])
    assert stream(outside, token_ids).text == "The"
    assert outside.flush() == " end"
    assert outside.flush() == ""


def test_a_stop_in_the_last_allowed_token_counts_as_stop(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("The end", add_special_tokens=False)
    run = stream(
        Detokenizer(tokenizer, SamplingParams(max_tokens=len(token_ids), stop=("end",)), NO_EOS, []), token_ids
    )
    assert run.last == Piece(run.last.text, FinishReason.STOP, "end")
    assert run.text == "The "


def test_emitted_tokens_count_towards_max_tokens_and_a_complete_choice_is_complete(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two three four", add_special_tokens=False)
    params = SamplingParams(max_tokens=3)
    run = stream(Detokenizer(tokenizer, params, NO_EOS, [], token_ids[:2]), token_ids[2:])
    assert (run.text, run.num_tokens, run.last.finish_reason) == (" three", 1, FinishReason.LENGTH)
    complete = Detokenizer(tokenizer, params, NO_EOS, [], token_ids[:3])
    assert complete.finish_reason is FinishReason.LENGTH
    assert complete.push(SampledToken(token_ids[3])) == Piece("", FinishReason.LENGTH)
