"""What a request is, and what the engine says about it. No torch: routers and tests import this alone."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a choice ended. The values are the OpenAI API's, plus `abort`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Defaults are the OpenAI API's; ranges are checked in `engine.sampling.validate`.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: 1 and 0 keep all.
    seed: draws depend only on (seed, choice, position); the router fixes one when the client gives none.
    logprobs: how many alternatives to report beside the chosen token; None reports nothing, 0 the chosen one alone.
    logit_bias: (token id, bias added to its logit) pairs.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """The `lserve` object beside the OpenAI fields.

    token_budget: tokens that a retrieval head may read in a decode step; None takes the engine's.
    dense: lifts the budget and the prefill estimator (streaming heads stay streaming).
    trace: report which pages the answer's tokens read (`PageChoice`).
    """

    token_budget: int | None = None
    dense: bool = False
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted of it; immutable, and the same object in every room.

    emitted: tokens that another worker already sent to the client (replay); they count as output for penalties,
        max_tokens and stops, and only what comes after them is reported.
    choice: index of the first choice (a replay asks for one choice at a time).
    tenant: root of the prefix chain; prefixes are shared inside one tenant only.
    deadline: UNIX time in seconds after which the request is failed, wherever it is.
    traceparent: the router's span for this request (W3C Trace Context); empty when traces are off.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    tenant: str = ""
    emitted: tuple[int, ...] = ()
    choice: int = 0
    deadline: float = float("inf")
    traceparent: str = ""

    @property
    def input_token_ids(self) -> tuple[int, ...]:
        """What prefill computes: the prompt, then what was emitted elsewhere."""
        return self.prompt_token_ids + self.emitted


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token and its best alternatives, before any penalty or temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One drawn token: what sampling returns, and what a handoff carries as first token of a choice."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PageChoice:
    """What the retrieval heads of all layers read from one page choice on, for one answer.

    token: number of the first answer token that came of it (token 0 comes of the prefill, which reads everything);
        it holds until the next choice.
    num_pages: whole pages before the newest one, which is always read and not listed.
    num_heads: retrieval heads in all layers. everything: whether all pages fit the budget; then `read` is empty.
    read: (page index, heads that read it), most read first; num_left_out further pages were read by fewer heads.
    mass_kept: share of the heads' true attention that falls on what they read, the mean over `num_sampled` heads;
        None where none was sampled. attended: (page index, share) of the pages with most of that attention.
    """

    token: int
    num_pages: int
    num_heads: int
    everything: bool = False
    read: tuple[tuple[int, int], ...] = ()
    num_left_out: int = 0
    mass_kept: float | None = None
    num_sampled: int = 0
    attended: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What a step adds to one choice of one request.

    text: newly finished text (stop strings cut off, incomplete UTF-8 held back); may be empty.
    token_ids: new tokens, in order. finish_reason: set on the choice's last output.
    num_cached_tokens: prompt tokens taken from a prefix cache. trace: page choices made for these tokens, if asked for.
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    trace: tuple[PageChoice, ...] = ()
