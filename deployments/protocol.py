"""HTTP bodies in: the OpenAI schemas, and their translation into what the engine understands.

Everything that a client can get wrong ends here as an InvalidRequestError (400) that names the field. Fields that
OpenAI defines and that change no token are accepted and ignored; fields that ask for something that LServe does not do
are refused rather than ignored, unless their value asks for nothing (null, an empty list, `{"type": "text"}`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lserve.engine.errors import InvalidRequestError
from lserve.engine.request import AttentionOptions, SamplingParams
from lserve.engine.sampling_limits import MAX_LOGPROBS, MAX_STOPS

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""OpenAI fields that change no token here."""

NEUTRAL: dict[str, Sequence[object]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields for what LServe does not do, each with the values (besides null) that ask for nothing."""

MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Prompt = str | tuple[int, ...]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """A string, a token list, or a list of either, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(_is_int(item) for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    prompts: list[Prompt] = []
    for item in value:
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list) and all(_is_int(token) and 0 <= token < 1 << 31 for token in item):
            prompts.append(tuple(item))
        else:
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    return tuple(prompts)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text_of_parts(value: object) -> object:
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"only parts of type 'text' are supported, got {str(kind)[:64]!r}")
        texts.append(part["text"])
    return "".join(texts)


def _without_nulls(value: object) -> object:
    """Clients send back their own response objects, with null or empty fields of other features in them."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if key in ("role", "content") or item not in (None, [])}
    return value


class _MessageFields(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of_parts)]
    name: str | None = None


Message = Annotated[_MessageFields, BeforeValidator(_without_nulls)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class StreamOptions(_Body):
    """What a stream carries besides the tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class LServeOptions(_Body):
    """The `lserve` object: how much attention this request pays for, and whether to say what was read."""

    token_budget: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    dense: bool = False
    trace: bool = False


class _Generation(_Body):
    """Fields that chat and plain completions share. None means the default, as in OpenAI's own schema."""

    model: str = Field(max_length=512)
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: int | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    stop: Annotated[list[StopString], BeforeValidator(_one_or_many), Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    lserve: LServeOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "is only allowed with stream: true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _wrong("best_of", f"is not supported other than equal to n, got {self.best_of}")
        return self

    def sampling(self) -> SamplingParams:
        """Without seed, max_tokens and logprobs, which the router and the subclasses fill in."""
        given: dict[str, Any] = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "ignore_eos": self.ignore_eos,
            "stop": None if self.stop is None else tuple(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
        }
        return replace(SamplingParams(), **{name: value for name, value in given.items() if value is not None})

    def attention(self) -> AttentionOptions:
        """The `lserve` object as the engine takes it."""
        options = self.lserve or LServeOptions()
        return AttentionOptions(options.token_budget, options.dense, options.trace)


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "is only allowed with logprobs: true")
        return self


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeBody(_Body):
    """POST /tokenize: of a text, or of messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise _wrong("prompt", "or messages is needed, and not both")
        return self


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


@dataclass(frozen=True, slots=True)
class Generation:
    """A checked request for tokens, of either kind, before tokenization.

    prompts: texts or token ids, or None for a chat; messages: (role, text) pairs of a chat.
    max_tokens: None when the client set no limit. seed: None when the router may pick one.
    sampling: without these two.
    """

    model: str
    prompts: tuple[Prompt, ...] | None
    messages: tuple[tuple[str, str], ...]
    sampling: SamplingParams
    attention: AttentionOptions
    max_tokens: int | None
    seed: int | None
    stream: bool
    include_usage: bool

    @property
    def num_choices(self) -> int:
        """Choices of all prompts together."""
        return self.sampling.n * (1 if self.prompts is None else len(self.prompts))


def parse_chat(body: bytes) -> Generation:
    """A chat completion from its HTTP body. Raises InvalidRequestError."""
    chat = parse(ChatBody, body)
    logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
    max_tokens = chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens
    return _generation(chat, None, message_pairs(chat.messages), logprobs, max_tokens)


def parse_completion(body: bytes) -> Generation:
    """A plain completion from its HTTP body. Raises InvalidRequestError."""
    completion = parse(CompletionBody, body)
    max_tokens = 16 if completion.max_tokens is None else completion.max_tokens
    return _generation(completion, completion.prompt, (), completion.logprobs, max_tokens)


def message_pairs(messages: Sequence[_MessageFields]) -> tuple[tuple[str, str], ...]:
    """(role, text) pairs for the chat template, where a developer is a system."""
    return tuple(("system" if m.role == "developer" else m.role, m.content) for m in messages)


AnyBody = TypeVar("AnyBody", bound=_Body)


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """A body of this kind from JSON. Raises InvalidRequestError, which names the field as `param`."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"the body must be a JSON object, got {type(fields).__name__}")
    try:
        return kind.model_validate({key: value for key, value in fields.items() if not _is_ignorable(key, value, kind)})
    except ValidationError as error:
        raise _named(error) from None


def _generation(
    body: _Generation,
    prompts: tuple[Prompt, ...] | None,
    messages: tuple[tuple[str, str], ...],
    logprobs: int | None,
    max_tokens: int | None,
) -> Generation:
    return Generation(
        model=body.model,
        prompts=prompts,
        messages=messages,
        sampling=replace(body.sampling(), logprobs=logprobs),
        attention=body.attention(),
        max_tokens=max_tokens,
        seed=None if body.seed is None else body.seed % (1 << 63),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _is_ignorable(name: str, value: object, kind: type[_Body]) -> bool:
    if name in kind.model_fields:
        return False
    if name in IGNORED or (name in NEUTRAL and (value is None or value in NEUTRAL[name])):
        return True
    if name in NEUTRAL:
        raise InvalidRequestError(f"{name} is not supported", param=name)
    return False


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(f"logit_bias keys must be token ids, got {key[:64]!r}", param="logit_bias")
    return tuple((int(key), bias) for key, bias in given.items())


def _wrong(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {problem}", param=name)


def _named(error: ValidationError) -> InvalidRequestError:
    """The first problem in one line, its field as OpenAI writes it (`messages[0].content`)."""
    first = error.errors(include_url=False)[0]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field {name!r}", param=name)
    if first["type"] == "missing":
        return InvalidRequestError(f"{name} is missing", param=name)
    problem = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{name}: {problem[:1].lower()}{problem[1:]}{_quoted(first['input'])}", param=name)


def _quoted(value: Any) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a very large number"
        return f", got {text if len(text) <= 80 else text[:77] + '...'}"
    return ""
