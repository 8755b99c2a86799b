"""Text to token ids and back, and chats to prompts, for the tokenizer that comes with a checkpoint."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import cache_folder, fingerprint, is_gguf, locate
from .errors import InvalidRequestError, UnsupportedModelError

SPACE = "\u2581"
"""How SentencePiece vocabularies write a space."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Safe on several threads at once; runs no code from the checkpoint."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: one of transformers', with a Rust backend. Most callers want `from_pretrained`."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # a tokenizer.json may ask for cut or padded prompts; a server wants them whole
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added: dict[int, str] = {
            i: token.content for i, token in self._backend.get_added_tokens_decoder().items()
        }
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self.vocab_size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        """One more than the highest token id; the model's own vocabulary may be padded beyond it."""

    @classmethod
    def from_pretrained(cls, path_or_id: str) -> "Tokenizer":
        """Loads from a local directory, a Hugging Face id or a GGUF file.

        A GGUF file's vocabulary takes seconds to convert, so the result is kept under `cache_folder()`. Raises
        UnsupportedModelError when there is no usable tokenizer, SettingsError when the path or id does not exist.
        """
        path = locate(path_or_id)
        tokenizer = _from_gguf(path) if is_gguf(path) else _from_directory(path)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UnsupportedModelError(f"{path} has no tokenizer.json, nor one that converts to it")
        return cls(tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token, if it has one. ModelConfig.eos_token_ids has those that the model names."""
        token_id = self._tokenizer.eos_token_id
        return () if token_id is None else (int(token_id),)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the model wants around one (such as a beginning token)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def token_starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """For each of `encode`'s tokens, the index of its first character in the text."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return [start for start, _ in encoding.offsets]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out, bytes that are no whole character become U+FFFD."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text (a special token: its name); none for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            table = _byte_level_table()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(SPACE, " ").encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a chat in the model's template, by default ready for the assistant's answer.

        messages, tools: as in OpenAI's API, with string contents. The template runs in a sandbox. Raises
        InvalidRequestError with the template's own words when it refuses the messages, or when there is no template.
        """
        return self.encode(self._rendered(messages, add_generation_prompt, tools), add_special_tokens=False)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequestError("the model has no chat template: use /v1/completions", param="messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRequestError(f"the chat template refused the messages: {reason}", param="messages") from error
        return text

    def chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, text) messages in the template, ready for the answer."""
        return self._rendered([{"role": role, "content": text} for role, text in messages])

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """`apply_chat_template` for (role, text) messages."""
        return self.encode(self.chat_text(messages), add_special_tokens=False)


def _from_directory(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{directory} has no usable tokenizer: {reason}") from error


def _from_gguf(path: Path) -> Any:
    import transformers

    kept = cache_folder() / "tokenizers" / f"{fingerprint(str(path))}-transformers-{transformers.__version__}"
    if kept.is_dir():
        return _from_directory(kept)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(f"{path} has no usable tokenizer: {reason}") from error
    with contextlib.suppress(OSError):  # a read-only home costs the conversion each time, nothing more
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=kept.parent)
        tokenizer.save_pretrained(made)
        try:
            os.rename(made, kept)
        except OSError:  # another process was first
            shutil.rmtree(made, ignore_errors=True)
    return tokenizer


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
