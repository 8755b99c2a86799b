"""Engines over one tiny random model, what passes through them, and what attention must have computed."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lserve.engine.attention import DecodeStep, PrefillStep
from lserve.engine.config import PAGE_SIZE, CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import LoadedModel
from lserve.engine.model import Model
from lserve.engine.page_format import make_page_format
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import AttentionOptions, FinishReason, Request, SampledToken, SamplingParams
from lserve.engine.results import StepResult
from lserve.engine.sampling import SamplingRow, sample
from lserve.kernels.cpu.codec import decode_keys, decode_values, encode_slots

VOCABULARY = 512
KV_DTYPES = ("float32", "bf16", "int8", "k8v4", "int4")
RETRIEVAL = ((False, False),) * 3
MIXED = ((False, True), (True, True), (False, False))
"""Per layer and KV head, whether it streams: a mixed layer, one that only streams, one that only retrieves."""

SPARSITY = SparsityConfig(token_budget=None, sink_size=64, local_window=128)
"""Everything read; a short sink and window, so that 200 tokens already leave them."""

SPARSE = replace(SPARSITY, token_budget=384, reselect_interval=16)
"""Six pages of eleven are read, and a choice is used for 16 steps: a lost choice would show."""

MANY = PoolSizes(retrieval_pages=128, streaming_pages=128, rows=24)


class Letters:
    """A tokenizer of one letter a token."""

    eos_token_ids: tuple[int, ...] = ()

    def decode(self, token_ids: Sequence[int]) -> str:
        """One letter per id."""
        return "".join(chr(0x4E00 + token_id) for token_id in token_ids)

    def encode(self, text: str) -> list[int]:
        """One id per letter."""
        return [ord(letter) - 0x4E00 for letter in text]


@dataclass
class AttendCall:
    """One call of attention: tensors [T, heads, D], and whose token each row is: (sequence, position)."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    owners: list[tuple[Any, int]]
    is_decode: bool


class Probe:
    """Stands between the engine and a model, and keeps what passed: attention calls and hidden states.

    hidden: [hidden_size] by (request id, choice, position). batch_sizes: of the decode steps.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config, self.dtype = model.config, model.dtype
        self.engine: Engine | None = None
        self.calls: list[AttendCall] = []
        self.keeps_calls = False
        self.hidden: dict[tuple[str, int, int], Tensor] = {}
        self.batch_sizes: list[int] = []

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """Runs the model's own, listening."""
        is_decode = isinstance(attend, DecodeStep)
        assert self.engine is not None
        if is_decode:
            owners = [(s, s.position) for s in self.engine.scheduler.running]
            self.batch_sizes.append(len(owners))
        else:
            assert isinstance(attend, PrefillStep)
            owners = [(c.sequence, position) for c in attend._chunks for position in range(c.start, c.end)]
        assert [position for _, position in owners] == positions.tolist()

        def watched(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = attend(layer, query, key, value)
            if self.keeps_calls:
                tensors = (x.clone() for x in (query, key, value, out))
                self.calls.append(AttendCall(layer, *tensors, owners, is_decode))
            return out

        hidden = self._model.forward(token_ids, positions, watched)
        for (sequence, position), row in zip(owners, hidden, strict=True):
            self.hidden[sequence.request_id, sequence.choice, position] = row
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own."""
        return self._model.logits(hidden)


class Draws:
    """Takes the place of the engine's sampler and keeps all logits. Requests are told apart by their unique seeds."""

    def __init__(self) -> None:
        self._logits: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draws as `sample` does."""
        for row, values in zip(rows, logits, strict=True):
            self._logits[row.params.seed, row.choice, row.position] = values.clone()
        return sample(logits, rows)

    def of(self, request: Request, choice: int = 0) -> dict[int, Tensor]:
        """Logits [vocabulary] by position of the token drawn, ascending."""
        seed = request.sampling.seed
        return {p: x for (s, c, p), x in sorted(self._logits.items(), key=lambda i: i[0]) if (s, c) == (seed, choice)}


def make_engine(
    model: Model,
    *,
    kv_dtype: str = "float32",
    streaming: tuple[tuple[bool, ...], ...] = RETRIEVAL,
    sparsity: SparsityConfig = SPARSITY,
    sizes: PoolSizes = MANY,
    chunk_size: int = 256,
    max_batch_size: int = 16,
    max_waiting: int = 256,
    prefix_cache: bool = False,
    host_swap_bytes: int = 1 << 30,
    lease_ttl_s: float = 30.0,
    poison: bool = True,
) -> tuple[Engine, Probe]:
    """An engine whose pools read as NaN until written, and the probe around its model."""
    cache = CacheConfig(kv_dtype=kv_dtype, prefix_cache=prefix_cache, host_swap_bytes=host_swap_bytes)
    scheduler = SchedulerConfig(chunk_size=chunk_size, max_batch_size=max_batch_size, max_waiting=max_waiting)
    config = EngineConfig("tiny", cache=cache, sparsity=sparsity, scheduler=scheduler)
    page_format = make_page_format(model.config, cache, sparsity, streaming, "tiny", "native", "float32")
    probe = Probe(model)
    loaded = LoadedModel(probe, Letters(), page_format, sparsity)  # type: ignore[arg-type]
    engine = Engine(config, loaded, sizes=sizes, lease_ttl_s=lease_ttl_s)
    probe.engine = engine
    if poison:
        poison_pools(engine)
    return engine, probe


def fresh(tiny: tuple[Model, Any], **settings: Any) -> Engine:
    """A new engine over our half of the `tiny` fixture."""
    return make_engine(tiny[0], **settings)[0]


def poison_pools(engine: Engine) -> None:
    """Makes every page and row read as NaN."""
    for pool in (engine.cache.retrieval, engine.cache.streaming):
        pool.fill_(0xFF)
    engine.cache.tail.fill_(torch.nan)
    engine.cache.selected.fill_(-1)


def tokens(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCABULARY, (num_tokens,), generator=generator).tolist())


_seeds = iter(range(1, 1 << 30))


def request(prompt: Sequence[int], max_tokens: int = 4, *, attention: Any = None, **fields: Any) -> Request:
    """A greedy request under a new id and seed; sampling fields by name."""
    seed = next(_seeds)
    ours = {name: fields.pop(name) for name in ("tenant", "emitted", "choice", "deadline") if name in fields}
    sampling = SamplingParams(
        **{"temperature": 0.0, "seed": seed, "max_tokens": max_tokens, "ignore_eos": True} | fields
    )
    return Request(f"request-{seed}", tuple(prompt), sampling, attention or AttentionOptions(), **ours)


def again(original: Request, **fields: Any) -> Request:
    """The same request under another id and seed."""
    seed = next(_seeds)
    sampling = replace(original.sampling, seed=seed)
    return replace(original, request_id=f"request-{seed}", sampling=sampling, **fields)


@dataclass
class Answer:
    """What one choice gave."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


def run(engine: Engine, requests: Iterable[Request] = (), max_steps: int = 2000) -> dict[tuple[str, int], Answer]:
    """Adds the requests and steps until nothing is left to do; answers by (request id, choice)."""
    for item in requests:
        engine.add_request(item)
    answers: dict[tuple[str, int], Answer] = defaultdict(Answer)
    for _ in range(max_steps):
        if not engine.has_work:
            return answers
        collect(engine.step(), answers)
    raise AssertionError(f"not done after {max_steps} steps")


def collect(result: StepResult, answers: dict[tuple[str, int], Answer]) -> None:
    """Adds a step's outputs to the answers; nothing comes after a choice's end."""
    assert not result.errors, result.errors
    for output in result.outputs:
        answer = answers[output.request_id, output.choice]
        assert answer.finish_reason is None
        answer.token_ids += output.token_ids
        answer.text += output.text
        answer.finish_reason = output.finish_reason
        answer.num_cached_tokens = output.num_cached_tokens


def assert_idle(engine: Engine) -> None:
    """Nothing is held by anybody but the prefix index."""
    engine.leases.end_all()
    pools = (engine.retrieval_pool, engine.streaming_pool, engine.row_pool)
    assert [pool.num_held for pool in pools] == [0, 0, 0]
    assert engine._swap.used_bytes == 0 and not engine.has_work
    assert not any((engine._live, engine._detokenizers, engine._histories, engine.scheduler.held))


def attended(
    query: Tensor, positions: Tensor, key: Tensor, value: Tensor, seen: Tensor, layout: Any, scale: float
) -> Tensor:
    """Attention of M queries [M, Hq, D] over a sequence's keys and values as written, [N, Hkv, D], float64 [M, Hq, D].

    seen: bool [Hkv, M, N]. A query's own page is read as written, earlier ones as they decode.
    """
    num_tokens, num_heads, head_dim = key.shape
    whole = num_tokens // PAGE_SIZE * PAGE_SIZE
    slots = encode_slots(*(x[:whole].unflatten(0, (-1, PAGE_SIZE)).transpose(1, 2) for x in (key, value)), layout)
    decoded = []
    for written, decode in ((key, decode_keys), (value, decode_values)):
        pages = decode(slots.flatten(0, 1), layout).unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(0, 1)
        decoded.append(torch.cat((pages, written[whole:])).double().transpose(0, 1))
    own = (torch.arange(num_tokens) // PAGE_SIZE == positions[:, None] // PAGE_SIZE)[None, None]
    grouped = query.double().unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3) * scale
    key, value = key.double().transpose(0, 1), value.double().transpose(0, 1)
    logits = torch.where(own, grouped @ key[:, None].mT, grouped @ decoded[0][:, None].mT)
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.where(own, weights, 0) @ value[:, None] + torch.where(own, 0, weights) @ decoded[1][:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def in_reach(positions: Tensor, num_tokens: int, sink_size: int, local_window: int) -> Tensor:
    """What a streaming head reads, bool [M, N]."""
    token = torch.arange(num_tokens)
    distance = positions[:, None] - token
    return (distance >= 0) & ((token < sink_size) | (distance < local_window))


def assert_equal(ours: dict[int, Tensor], theirs: dict[int, Tensor], atol: float = 0.0) -> None:
    """The same logits at the same positions."""
    assert list(ours) == list(theirs) and ours
    for position, logits in ours.items():
        torch.testing.assert_close(logits, theirs[position], atol=atol, rtol=0, msg=lambda m, p=position: f"{p}: {m}")
