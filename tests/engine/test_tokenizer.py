"""The tokenizer gives transformers' ids, whole text back, and a typed error for a chat that its template refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from lserve.engine.errors import InvalidRequestError, SettingsError, UnsupportedModelError
from lserve.engine.tokenizer import Tokenizer

TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}"
    "{{ raise_exception('the first\nmessage must be a user\\'s') }}"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] + ': ' + m['content'] }}<|im_end|>{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def save_tokenizer(path: Path, backend: Any, template: str | None = TEMPLATE) -> None:
    """Saves as transformers does, with the special tokens of ChatML."""
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=template
    )
    tokenizer.save_pretrained(path)


def byte_level() -> Any:
    """A byte-level tokenizer of 300 tokens."""
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox and the lazy dog " * 4], trainer)
    return backend


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = tmp_path_factory.mktemp("byte-level")
    backend = byte_level()
    backend.enable_truncation(4)
    save_tokenizer(path, backend)
    yield Tokenizer.from_pretrained(str(path))


@given(st.text())
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    """Whatever the tokenizer.json says of cutting prompts, which this one does after four tokens."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_tokens_are_single_ids_and_leave_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the<|im_end|>fox")
    (end,) = tokenizer.eos_token_ids
    assert end in ids
    assert tokenizer.decode(ids) == "thefox"
    assert tokenizer.token_bytes(end) == b"<|im_end|>"
    assert tokenizer.vocab_size == end + 1
    assert tokenizer.token_bytes(end + 1) == b""


def test_chat_template_is_rendered_once_and_its_special_tokens_are_seen(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([("user", "the fox"), ("assistant", "the dog"), ("user", "why")])
    start, end = (tokenizer.encode(t)[0] for t in ("<|im_start|>", "<|im_end|>"))
    assert ids.count(start) == 4
    assert ids.count(end) == 3
    assert ids[-1] == start
    assert b"".join(tokenizer.token_bytes(i) for i in ids[:-1]) == (
        b"<|im_start|>user: the fox<|im_end|><|im_start|>assistant: the dog<|im_end|><|im_start|>user: why<|im_end|>"
    )
    message = [{"role": "user", "content": "the fox"}]
    assert tokenizer.apply_chat_template(message, add_generation_prompt=False)[-1] == end
    tools = [{"type": "function", "function": {"name": "fox", "parameters": {}}}]
    assert "1 tools" in tokenizer.decode(tokenizer.apply_chat_template(message, tools=tools))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "no"}], "the first message must be a user's"),
        ([{"role": "user", "content": None}], "the chat template refused the messages"),
        ([{"content": "no role"}], "the chat template refused the messages"),
        ([], "the chat template refused the messages"),
    ],
)
def test_a_chat_that_the_template_refuses_is_the_callers_mistake(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.apply_chat_template(messages)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "messages"


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level(), "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError, match="unsafe"):
        Tokenizer.from_pretrained(str(tmp_path)).encode_chat([("user", "hello")])


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level(), None)
    tokenizer = Tokenizer.from_pretrained(str(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat([("user", "hello")])


def test_bytes_of_sentencepiece_tokens(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "\u2581": 1, "f": 2, "\u2581f": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    backend = RustTokenizer(models.BPE(vocabulary, [("\u2581", "f")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    save_tokenizer(tmp_path, backend)
    tokenizer = Tokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer.encode("f fé")
    assert [tokenizer.token_bytes(i) for i in ids] == [b"f", b" f", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "f fé"


def test_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has no usable tokenizer"):
        Tokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(SettingsError, match="nowhere"):
        Tokenizer.from_pretrained(str(tmp_path / "nowhere"))


def test_the_demo_models_tokenizer_is_converted_once(
    demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Tokenizer.from_pretrained(str(demo_model_path))
    assert [p.name.partition("-")[2].split("-")[0] for p in (tmp_path / "lserve" / "tokenizers").iterdir()] == [
        "transformers"
    ]

    def no_conversion(*args: object, gguf_file: str | None = None, **rest: object) -> Any:
        assert gguf_file is None, "converted again"
        return original(*args, **rest)

    import transformers

    original = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_conversion)
    second = Tokenizer.from_pretrained(str(demo_model_path))
    chat = [("user", "Where did the naïve café 🎉 go?")]
    ids = first.encode_chat(chat)
    assert ids == second.encode_chat(chat)
    assert ids[:3] == [1, 9690, 198]
    assert first.eos_token_ids == second.eos_token_ids == (2,)
    assert first.vocab_size == 49152
    assert chat[0][1] in first.decode(ids)
