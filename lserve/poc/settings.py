"""What is compared: full attention as everybody serves it, and a few sparse settings of the same model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from lserve.engine.checkpoint import fingerprint
from lserve.engine.config import PAGE_SIZE, EngineConfig, KvDtype, SparsityConfig
from lserve.engine.errors import FormatMismatchError, LServeError, SettingsError
from lserve.engine.head_profile import HeadProfile
from lserve.engine.page_format import PageFormat
from lserve.engine.request import AttentionOptions
from lserve.engine.weights import read_config
from lserve.kernels.slot_layout import make_slot_layout
from lserve.quality.arms import Arm, open_arms
from lserve.quality.asker import Asker
from lserve.quality.engine_asker import EngineAsker
from lserve.quality.http_asker import HttpAsker

from .probes import EngineProbe, HttpProbe, Probe
from .readers import Tell

BITS = {"float32": 32, "bf16": 16, "int8": 8, "k8v4": 6, "int4": 4}
SHARES = (8, 4)
"""Budgets that are tried: one part in so many of the longest prompt."""

CAPS = (4096, 8192)

UNKNOWN_LIMIT = 32_768
"""Tokens, where an endpoint does not say."""

ROOM = 192
"""Tokens beside a document: chat template, question, answer."""


@dataclass(frozen=True, slots=True)
class PageCosts:
    """Bytes of a request's pages, from the engine's own page format. budget: tokens that may be read; None is all."""

    page_format: PageFormat
    sparsity: SparsityConfig
    budget: int | None

    def memory(self, tokens: int) -> int:
        """Bytes that a request of so many tokens holds."""
        pages, kept = tokens // PAGE_SIZE, self._streaming_pages(tokens)
        sizes = self.page_format.retrieval_page_bytes, self.page_format.streaming_page_bytes
        return pages * sizes[0] + kept * sizes[1] + self.page_format.tail_row_bytes

    def pages_read(self, tokens: int) -> int:
        """Pages that a head which keeps its history reads per answer token."""
        pages = tokens // PAGE_SIZE
        return pages if self.budget is None else min(pages, self.budget // PAGE_SIZE - 1)

    def bytes_read(self, tokens: int) -> float:
        """Bytes read per answer token, choosing the pages included, the newest page left out."""
        layout, retrieval = self.page_format.layout, self.page_format.num_retrieval_slots
        pages, read = tokens // PAGE_SIZE, self.pages_read(tokens)
        streaming = self._streaming_pages(tokens) * self.page_format.streaming_page_bytes
        total = float(read * retrieval * layout.slot_bytes + streaming)
        if read < pages and self.budget is not None:
            candidates = min(pages, self.sparsity.candidate_factor * self.budget // PAGE_SIZE)
            keys = pages * (layout.value_codes - layout.key_min) + candidates * layout.value_codes
            total += retrieval * keys / self.sparsity.reselect_interval
        return total

    def _streaming_pages(self, tokens: int) -> int:
        return min(tokens, self.sparsity.sink_size + self.sparsity.local_window) // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to serve. reading: settings with the same value share the pages of what was read.

    block: what to put into the settings file, or into a request; empty for the baseline.
    """

    name: str
    explanation: str
    asker: Asker
    probe: Probe
    reading: str
    budget: int | None = None
    block: str = ""
    costs: PageCosts | None = None

    def close(self) -> None:
        """Gives back what it holds, pages and connections."""
        self.asker.close()
        self.probe.close()


def budgets_for(length: int, sparsity: SparsityConfig) -> list[int]:
    """An eighth and a quarter of the length in powers of two, within CAPS and the settings' limits, smaller first."""
    found = []
    for share, cap in zip(SHARES, CAPS, strict=True):
        budget = 2 ** round(math.log2(length / share))
        budget = max(min(budget, cap), -(-sparsity.min_token_budget // 256) * 256)
        found.append(min(budget, sparsity.max_token_budget))
    return sorted({budget for budget in found if budget < length})


def usable_profile(path: str | None, model: str, tell: Tell) -> HeadProfile | None:
    """The head profile in a file, if it is this model's; tell gets one line when it is not, or when there is none."""
    if path is None:
        tell("no head profile: streaming heads are not tried; `lserve profile` makes one")
        return None
    shape = read_config(model)
    try:
        profile = HeadProfile.load(Path(path))
        profile.check(fingerprint(model), shape.num_layers, shape.num_kv_heads)
    except (SettingsError, FormatMismatchError) as error:
        tell(f"{path}: {error.message}; streaming heads are not tried")
        return None
    return profile


@dataclass(frozen=True, slots=True)
class Engines:
    """Engines over one model's weights. full: 16-bit pages; low: the user's pages; streaming: these with a profile."""

    full: EngineAsker
    low: EngineAsker
    streaming: EngineAsker | None
    profile: str | None


def open_engines(config: EngineConfig, profile: str | None, length: int) -> Engines:
    """Engines for prompts of at most so many tokens. config: the user's. Raises LServeError."""
    plain = replace(config.sparsity, head_profile=None, token_budget=None, prefill_sparse_from=None)
    arms = [Arm("full", _sized(config, "bf16", plain, length)), Arm("low", _sized(config, None, plain, length))]
    if profile is not None:
        arms.append(Arm("streaming", _sized(config, None, replace(plain, head_profile=profile), length)))
    full, low, *streaming = open_arms(arms, length + ROOM)
    return Engines(full, low, streaming[0] if streaming else None, profile)


def engine_settings(engines: Engines, budgets: Sequence[int]) -> list[Setting]:
    """Settings of engines in this process, the baseline first."""
    kv_dtype = engines.low.engine.config.cache.kv_dtype
    block, bits = f"cache:\n  kv_dtype: {kv_dtype}\nsparsity:\n  token_budget: ", BITS[kv_dtype]
    words = (
        "the usual way: every token of the prompt is read for every word of the answer; numbers are kept with 16 bits"
    )
    settings = [_of_engine("Full", words, engines.full, AttentionOptions(dense=True), "")]
    if kv_dtype != "bf16":
        words = f"reads everything too, but keeps its numbers with {bits} bits"
        settings.append(_of_engine("Compact", words, engines.low, AttentionOptions(dense=True), f"{block}null"))
    for budget in budgets:
        words = f"reads at most {budget:,} tokens for every word of the answer, those that matter; {bits} bits"
        options = AttentionOptions(token_budget=budget)
        settings.append(_of_engine(f"Sparse {budget:,}", words, engines.low, options, f"{block}{budget}"))
    for budget in budgets[:1] if engines.streaming is not None else ():
        assert engines.streaming is not None
        words = f"as Sparse {budget:,}; and the heads that need no history, as the head profile says, keep none"
        lines = f"{block}{budget}\n  head_profile: {engines.profile}"
        options = AttentionOptions(token_budget=budget)
        settings.append(_of_engine(f"Sparse {budget:,} + profile", words, engines.streaming, options, lines))
    return settings


def _of_engine(name: str, words: str, base: EngineAsker, attention: AttentionOptions, block: str) -> Setting:
    engine, budget = base.engine, attention.token_budget
    asker = EngineAsker(name, engine, attention)
    costs = PageCosts(engine.page_format, engine.config.sparsity, budget)
    return Setting(name, words, asker, EngineProbe(asker), engine.page_format.format_id, budget, block, costs)


def endpoint_settings(url: str, baseline_url: str | None, budgets: Sequence[int], api_key: str | None) -> list[Setting]:
    """Settings of running endpoints, the baseline first. Raises LServeError when one does not answer."""
    rows: list[tuple[str, str, str, dict[str, int | bool] | None]] = []
    if baseline_url:
        rows.append(("Full", f"the endpoint {baseline_url}, as it is", baseline_url, None))
    else:
        rows.append(("Full", "every token of the prompt is read for every word of the answer", url, {"dense": True}))
    for budget in budgets:
        words = f"reads at most {budget:,} tokens for every word of the answer, those that matter"
        rows.append((f"Sparse {budget:,}", words, url, {"token_budget": budget}))
    settings = []
    for name, words, address, options in rows:
        asker = HttpAsker(name, address, options, api_key=api_key)
        if options is not None and not asker.is_lserve:
            raise LServeError(f"{address} is not LServe, so it cannot be asked to read less or more")
        probe = HttpProbe(asker.url, asker.model, options, api_key)
        limit = options.get("token_budget") if options else None
        block = "" if limit is None else f"sparsity:\n  token_budget: {limit}"
        settings.append(Setting(name, words, asker, probe, asker.url, limit, block))
    return settings


def endpoint_limit(url: str, api_key: str | None) -> tuple[str, int]:
    """An endpoint's model and the tokens that fit into a request. Raises LServeError."""
    asker = HttpAsker("limit", url, api_key=api_key)
    try:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        answer = httpx.get(f"{asker.url}/v1/models", headers=headers, timeout=10.0, trust_env=False)
        return asker.model, int(answer.json()["data"][0].get("max_model_len") or UNKNOWN_LIMIT)
    finally:
        asker.close()


def _sized(config: EngineConfig, kv_dtype: KvDtype | None, sparsity: SparsityConfig, length: int) -> EngineConfig:
    """The settings with other pages; on a CPU with a pool for a few requests of this length."""
    cache = config.cache if kv_dtype is None else replace(config.cache, kv_dtype=kv_dtype)
    if config.device == "cpu":
        model = read_config(config.model)
        slot = make_slot_layout(cache.kv_dtype, model.head_dim, cache.logical_page_size).slot_bytes
        pages = 3 * (length // PAGE_SIZE) + 64 * 4
        cache = replace(cache, retrieval_pool_bytes=pages * slot * model.num_layers * model.num_kv_heads)
    return replace(config, cache=cache, sparsity=sparsity)
