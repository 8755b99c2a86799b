"""Prefill and decode workers without engines, in virtual time: minutes pass in a second, and always in the same way.

Their times follow an 8B model with 4-bit pages on an H100: 20,000 prompt tokens/s and 5 ms for each chunk of 8,192;
decode steps of 8 ms and 0.35 ms more for each choice. A prefill worker's prefix cache holds 400,000 tokens (7 GB of
pages), and the least recently used prompt goes first. The router's and the decode workers' choices, chain hashes and
resume points are LServe's own.
"""

import asyncio
import random
import selectors
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lserve.deployments.choices import DecodeChoice, PrefillChoice
from lserve.deployments.messages import PrefillLoad, WorkerLoad
from lserve.deployments.prefix_lookup import candidate_points
from lserve.engine.chain import chain_hashes, chain_root
from lserve.engine.config import PAGE_SIZE, RESUME_INTERVAL
from lserve.engine.residency import resume_points

PREFILL_TOKENS_PER_S, CHUNK_TOKENS, CHUNK_S = 20_000.0, 8192, 0.005
STEP_S, STEP_PER_CHOICE_S, STEPS_AT_ONCE = 0.008, 0.00035, 16
CACHE_TOKENS, DECODE_PAGES, MAX_BATCH = 400_000, 1_500_000 // PAGE_SIZE, 64
REDIS_TOKENS_PER_S = 120_000.0
"""2 GB/s of pages of 17 KB a token, for all workers together."""
POLL_S = 0.25
ROOT = chain_root(b"", "", "stub")

Policy = Literal["prefix-aware", "random", "round-robin"]


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time: its clock jumps to whatever is due next."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_InstantSelector(self._pass))

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds


class _InstantSelector(selectors.SelectSelector):
    def __init__(self, wait: Callable[[float], None]) -> None:
        super().__init__()
        self._wait = wait

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits for something that will not come"
        self._wait(max(timeout, 0.0))
        return []


def now() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class Prompt:
    """tokens: its length. chain: hash of each page. points: its resume points."""

    arrival: float
    tokens: int
    output: int
    chain: Sequence[bytes]


@dataclass(eq=False)
class StubPrefill:
    """Computes one prompt after the other; its cache keeps whole prompts by their resume points' hashes."""

    worker_id: str
    fleet: "Fleet"
    cache: "OrderedDict[bytes, int]" = field(default_factory=OrderedDict)
    queued_tokens: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def prefill(self, prompt: Prompt, known_tokens: int) -> int:
        """Returns the tokens that were cached."""
        self.queued_tokens += prompt.tokens
        cached = self._cached(prompt)
        if self.fleet.redis is not None and known_tokens > cached:
            async with self.fleet.redis:
                await asyncio.sleep((known_tokens - cached) / REDIS_TOKENS_PER_S)
            cached = known_tokens
        self.queued_tokens -= cached
        async with self.turn:
            came = max(self._cached(prompt) - cached, 0)
            self.queued_tokens, cached = self.queued_tokens - came, cached + came
            left = prompt.tokens - cached
            while left > 0:
                chunk = min(left, CHUNK_TOKENS)
                await asyncio.sleep(CHUNK_S + chunk / PREFILL_TOKENS_PER_S)
                self.queued_tokens, left = self.queued_tokens - chunk, left - chunk
            self._keep(prompt)
        return cached

    def _cached(self, prompt: Prompt) -> int:
        for point in reversed(candidate_points(prompt.tokens)):
            if prompt.chain[point // PAGE_SIZE - 1] in self.cache:
                return point
        return 0

    def _keep(self, prompt: Prompt) -> None:
        """Each resume point stands for the tokens since the one before."""
        before = 0
        for point in resume_points(prompt.tokens):
            chain_hash = prompt.chain[point // PAGE_SIZE - 1]
            self.cache[chain_hash] = point - before
            self.fleet.directory.setdefault(chain_hash, {})[self.worker_id] = now()
            before = point
        for point in reversed(resume_points(prompt.tokens)):
            self.cache.move_to_end(prompt.chain[point // PAGE_SIZE - 1])
        self.fleet.trim(self)


@dataclass(eq=False)
class StubDecode:
    """Owns requests; asks a prefill worker by the fleet's policy."""

    worker_id: str
    fleet: "Fleet"
    choice: PrefillChoice = field(default_factory=PrefillChoice)
    reserved_pages: int = 0
    running: int = 0

    async def answer(self, prompt: Prompt, known_tokens: int, holders: tuple[str, ...]) -> float:
        """Returns the time of the first token."""
        pages = (prompt.tokens + prompt.output) // PAGE_SIZE + 1
        self.reserved_pages += pages
        chosen = self.fleet.choose_prefill(self, prompt, known_tokens, holders)
        cached = await chosen.prefill(prompt, known_tokens)
        self.fleet.cached_tokens += cached
        first = now()
        self.running += 1
        left = prompt.output
        while left > 0:
            steps = min(left, STEPS_AT_ONCE)
            await asyncio.sleep(steps * (STEP_S + STEP_PER_CHOICE_S * self.running))
            left -= steps
        self.running, self.reserved_pages = self.running - 1, self.reserved_pages - pages
        return first


class Fleet:
    """Four of each, a directory, and a policy. has_redis: whether pages can be fetched that a worker lacks."""

    def __init__(self, policy: Policy, has_redis: bool, seed: int = 0, size: int = 4) -> None:
        self.policy, self._draw, self._turn = policy, random.Random(seed), 0
        self.redis = asyncio.Lock() if has_redis else None
        self.directory: dict[bytes, dict[str, float]] = {}
        self.prefills = [StubPrefill(f"prefill-{number}", self) for number in range(size)]
        elsewhere = {} if has_redis else {"elsewhere": 1.0}
        self.decodes = [StubDecode(f"decode-{number}", self, PrefillChoice(**elsewhere)) for number in range(size)]
        self.router = DecodeChoice()
        self.prompt_tokens = self.cached_tokens = 0
        self.ttfts: list[float] = []

    async def play(self, prompts: Sequence[Prompt]) -> None:
        """All prompts, each at its time, to the last token."""
        polling = asyncio.ensure_future(self._poll())
        requests = []
        for prompt in prompts:
            await asyncio.sleep(prompt.arrival - now())
            requests.append(asyncio.ensure_future(self._request(prompt)))
        await asyncio.gather(*requests)
        polling.cancel()

    async def _request(self, prompt: Prompt) -> None:
        known, holders = self._lookup(prompt)
        name = self.router.rank(prompt.tokens // PAGE_SIZE + 1)[0]
        decode = next(decode for decode in self.decodes if decode.worker_id == name)
        self.prompt_tokens += prompt.tokens
        self.ttfts.append(await decode.answer(prompt, known, holders) - prompt.arrival)

    def choose_prefill(
        self, decode: StubDecode, prompt: Prompt, known_tokens: int, holders: tuple[str, ...]
    ) -> StubPrefill:
        """By the policy."""
        if self.policy == "random":
            return self._draw.choice(self.prefills)
        if self.policy == "round-robin":
            self._turn += 1
            return self.prefills[self._turn % len(self.prefills)]
        start = prompt.chain[RESUME_INTERVAL // PAGE_SIZE - 1]
        name = decode.choice.rank(prompt.tokens, known_tokens, holders, start)[0]
        return next(prefill for prefill in self.prefills if prefill.worker_id == name)

    def trim(self, prefill: StubPrefill) -> None:
        """Forgets what its pool has no room for, the deepest pages of the oldest prompts first."""
        total = sum(prefill.cache.values())
        while total > CACHE_TOKENS:
            _, tokens = prefill.cache.popitem(last=False)
            total -= tokens

    def _lookup(self, prompt: Prompt) -> tuple[int, tuple[str, ...]]:
        """The longest published prefix, and who published it, the most recent first; also who forgot it since."""
        for point in reversed(candidate_points(prompt.tokens)):
            workers = self.directory.get(prompt.chain[point // PAGE_SIZE - 1])
            if workers:
                return point, tuple(sorted(workers, key=lambda worker: -workers[worker]))
        return 0, ()

    async def _poll(self) -> None:
        while True:
            self.router.told([WorkerLoad(d.worker_id, d.reserved_pages, DECODE_PAGES, 0, 0) for d in self.decodes])
            for decode in self.decodes:
                decode.choice.told([PrefillLoad(p.worker_id, p.queued_tokens) for p in self.prefills])
            await asyncio.sleep(POLL_S)


def shared_prefixes(requests: int, rate: float, seed: int, documents: int = 64, length: int = 16_384) -> list[Prompt]:
    """Questions about documents, some more popular than others: 16,384 tokens in common, some hundreds of their own."""
    draw = random.Random(seed)
    texts = [[draw.randrange(50_000) for _ in range(length)] for _ in range(documents)]
    chains = [chain_hashes(ROOT, text) for text in texts]
    weights = [1 / (rank + 1) ** 0.6 for rank in range(documents)]
    prompts, arrival = [], 0.0
    for _ in range(requests):
        arrival += draw.expovariate(rate)
        chain = chains[draw.choices(range(documents), weights)[0]]
        own = [draw.randrange(50_000) for _ in range(draw.randrange(256, 1024))]
        prompts.append(Prompt(arrival, length + len(own), 128, [*chain, *chain_hashes(chain[-1], own)]))
    return prompts


def single_prompts(requests: int, rate: float, seed: int) -> list[Prompt]:
    """Prompts that have nothing in common, of 2,000 to 30,000 tokens."""
    draw = random.Random(seed)
    prompts, arrival = [], 0.0
    for _ in range(requests):
        arrival += draw.expovariate(rate)
        tokens = draw.randrange(2_000, 30_000)
        prompts.append(Prompt(arrival, tokens, 128, [draw.randbytes(32) for _ in range(tokens // PAGE_SIZE)]))
    return prompts


@dataclass(frozen=True, slots=True)
class Outcome:
    """hit_rate: the share of prompt tokens that a prefill worker had, or got from Redis."""

    hit_rate: float
    ttft_p50_s: float
    ttft_p90_s: float


def play(policy: Policy, prompts: Sequence[Prompt], has_redis: bool) -> Outcome:
    """One policy over these prompts."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def run() -> Fleet:
            fleet = Fleet(policy, has_redis)
            await fleet.play(prompts)
            return fleet

        fleet = runner.run(run())
    ttfts = sorted(fleet.ttfts)
    p50, p90 = ttfts[len(ttfts) // 2], ttfts[len(ttfts) * 9 // 10]
    return Outcome(fleet.cached_tokens / fleet.prompt_tokens, p50, p90)
