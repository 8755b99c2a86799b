"""A cluster in virtual time: requests, prefill and decode workers, and the autoscaling policy in charge of both.

Times follow an 8B model on H100s at 4-bit pages: 20,000 prompt tokens/s, decode steps of 8 ms and 0.35 ms more per
choice, room for 1.5 million tokens. A new worker takes two minutes; one that is taken away ends what it has begun.
"""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field

from lserve.deployments.autoscaling import Needs, Role, Snapshot, Targets, WorkerStats, decide

PREFILL_TOKENS_PER_S = 20_000.0
STEP_FLOOR_S, STEP_PER_CHOICE_S = 0.008, 0.00035
POOL_TOKENS, MAX_BATCH = 1_500_000, 64
START_S, TICK_S, LOOK_BACK_S, BUSY_LOOK_BACK_S, DECIDE_EVERY_S = 120.0, 1.0, 30.0, 120.0, 10.0
DAY_S = 86_400

Bounds = tuple[int, int]


@dataclass(eq=False, slots=True)
class Request:
    """A prompt and how much of it is left; when it came, got pages, got its first token."""

    arrived: float
    prompt: int
    output: int
    left: float = 0.0
    admitted: float = math.nan
    first: float = math.nan

    @property
    def tokens(self) -> int:
        """That it reserves pages for."""
        return self.prompt + self.output


@dataclass(eq=False)
class Worker:
    """What both kinds share. ready: when it can begin. waits: (time, seconds until its turn), lately."""

    ready: float
    waits: deque[tuple[float, float]] = field(default_factory=deque)
    leaving: bool = False

    def note(self, kept: deque[tuple[float, float]], now: float, seconds: float) -> None:
        """Keeps a measurement for a while."""
        kept.append((now, seconds))
        while kept[0][0] < now - BUSY_LOOK_BACK_S:
            kept.popleft()

    def mean(self, kept: deque[tuple[float, float]], now: float, span_s: float = LOOK_BACK_S) -> float:
        """Of the last seconds."""
        recent = [seconds for time, seconds in kept if time >= now - span_s]
        return sum(recent) / len(recent) if recent else 0.0


@dataclass(eq=False)
class PrefillWorker(Worker):
    """Computes prompts one after the other."""

    queue: deque[Request] = field(default_factory=deque)
    busy: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def tokens(self) -> float:
        """That are left to compute."""
        return sum(request.left for request in self.queue)

    def run(self, now: float) -> list[tuple[Request, float]]:
        """One tick; prompts that were finished, and when."""
        room, done = PREFILL_TOKENS_PER_S * TICK_S, []
        while self.queue and room > 0:
            request = self.queue[0]
            if request.left == request.prompt:
                self.note(self.waits, now, now - request.admitted)
            taken = min(request.left, room)
            request.left, room = request.left - taken, room - taken
            if request.left <= 0:
                done.append((self.queue.popleft(), now + TICK_S - room / PREFILL_TOKENS_PER_S))
        self.note(self.busy, now, 1 - room / (PREFILL_TOKENS_PER_S * TICK_S))
        return done

    def stats(self, now: float) -> WorkerStats:
        """As a real worker would say."""
        waiting = list(self.queue)[1:]
        return WorkerStats(
            queued_prompts=len(waiting),
            queued_tokens=sum(request.left for request in waiting),
            busy=self.mean(self.busy, now, BUSY_LOOK_BACK_S),
            tokens_per_s=PREFILL_TOKENS_PER_S,
            wait_s=self.mean(self.waits, now),
            page_use=min(1.0, self.tokens / POOL_TOKENS),
        )


@dataclass(eq=False)
class DecodeWorker(Worker):
    """Steps all its choices together; `position` counts its steps, `ends` says at which a choice is done."""

    waiting: deque[Request] = field(default_factory=deque)
    ends: list[tuple[float, int, Request]] = field(default_factory=list)
    firsts: deque[tuple[float, float]] = field(default_factory=deque)
    held_tokens: int = 0
    held: int = 0
    position: float = 0.0
    step_s: float = STEP_FLOOR_S

    def admit(self, now: float) -> list[Request]:
        """Those that pages are there for now."""
        admitted = []
        while self.waiting and self.held < MAX_BATCH and self.held_tokens + self.waiting[0].tokens <= POOL_TOKENS:
            request = self.waiting.popleft()
            request.admitted = now
            self.held_tokens, self.held = self.held_tokens + request.tokens, self.held + 1
            self.note(self.waits, now, now - request.arrived)
            admitted.append(request)
        return admitted

    def begin(self, request: Request, now: float) -> None:
        """Its prompt has been computed."""
        request.first = now
        self.note(self.firsts, now, now - request.arrived)
        heapq.heappush(self.ends, (self.position + request.output, id(request), request))

    def run(self) -> list[Request]:
        """One tick; those that are done."""
        self.step_s = STEP_FLOOR_S + STEP_PER_CHOICE_S * len(self.ends)
        self.position += TICK_S / self.step_s
        done = []
        while self.ends and self.ends[0][0] <= self.position:
            request = heapq.heappop(self.ends)[2]
            self.held_tokens, self.held = self.held_tokens - request.tokens, self.held - 1
            done.append(request)
        return done

    def stats(self, now: float) -> WorkerStats:
        """As a real worker would say."""
        firsts = sorted(seconds for time, seconds in self.firsts if time >= now - LOOK_BACK_S)
        wanted = self.held_tokens + sum(request.tokens for request in self.waiting)
        return WorkerStats(
            wait_s=self.mean(self.waits, now),
            ttft_s=firsts[math.ceil(0.9 * len(firsts)) - 1] if firsts else 0.0,
            itl_s=self.step_s if self.ends else 0.0,
            itl_floor_s=STEP_FLOOR_S + STEP_PER_CHOICE_S,
            page_use=wanted / POOL_TOKENS,
            batch_use=(self.held + len(self.waiting)) / MAX_BATCH,
        )


@dataclass
class Report:
    """What a day brought. ttfts: (arrival, seconds). itls: (tokens, seconds per token) of each worker's ticks.

    changes: (time, role, replicas before, after). worker_s: seconds of all workers, those that start or leave too.
    """

    ttfts: list[tuple[float, float]] = field(default_factory=list)
    itls: list[tuple[float, float]] = field(default_factory=list)
    changes: list[tuple[float, str, int, int]] = field(default_factory=list)
    worker_s: float = 0.0
    most: dict[str, int] = field(default_factory=dict)
    arrived: int = 0
    finished: int = 0


def traffic(seed: int, seconds: int = DAY_S) -> list[Request]:
    """A day of long prompts: three times as many at two in the afternoon as at two at night, and six bursts."""
    draw = random.Random(seed)
    bursts = [draw.randrange(seconds) for _ in range(6 * seconds // DAY_S)]
    requests: list[Request] = []
    now = 0.0
    while now < seconds:
        rate = 0.45 - 0.3 * math.cos(2 * math.pi * (now / DAY_S - 2 / 24))
        rate *= 2.5 if any(start <= now < start + 600 for start in bursts) else 1.0
        now += draw.expovariate(rate)
        prompt = int(min(250_000, draw.lognormvariate(math.log(30_000), 0.8)))
        requests.append(Request(now, prompt, 1 + int(draw.expovariate(1 / 1200)), left=prompt))
    return requests


def simulate(
    requests: list[Request], targets: Targets, prefill: Bounds, decode: Bounds, seconds: int = DAY_S
) -> Report:
    """Plays the requests; the policy moves both roles within their bounds."""
    report = Report(arrived=len(requests))
    prefills = [PrefillWorker(0.0) for _ in range(prefill[0])]
    decodes = [DecodeWorker(0.0) for _ in range(decode[0])]
    needs: dict[str, Needs] = {"prefill": (), "decode": ()}
    at: dict[Request, DecodeWorker] = {}
    ahead = deque(requests)
    now = 0.0
    while now < seconds or any(worker.held or worker.waiting for worker in decodes):
        while ahead and ahead[0].arrived <= now:
            request = ahead.popleft()
            choice = [worker for worker in decodes if worker.ready <= now and not worker.leaving]
            least = min(choice, key=lambda worker: worker.held_tokens + sum(r.tokens for r in worker.waiting))
            least.waiting.append(request)
        for holder in decodes:
            for request in holder.admit(now):
                at[request] = holder
                ready = [worker for worker in prefills if worker.ready <= now and not worker.leaving]
                min(ready, key=lambda worker: worker.tokens).queue.append(request)
        for computer in prefills:
            for request, finished in computer.run(now):
                at.pop(request).begin(request, finished)
                report.ttfts.append((request.arrived, finished - request.arrived))
        for holder in decodes:
            report.itls.append((len(holder.ends), STEP_FLOOR_S + STEP_PER_CHOICE_S * len(holder.ends)))
            report.finished += len(holder.run())
        prefills = [worker for worker in prefills if not (worker.leaving and not worker.queue)]
        decodes = [worker for worker in decodes if not (worker.leaving and not (worker.held or worker.waiting))]
        report.worker_s += TICK_S * (len(prefills) + len(decodes)) * (now < seconds)
        if now % DECIDE_EVERY_S == 0:
            roles = _role(prefills, needs["prefill"], prefill, now), _role(decodes, needs["decode"], decode, now)
            decision = decide(Snapshot(now, targets, *roles))
            assert decision.prefill is not None and decision.decode is not None
            needs = {"prefill": decision.prefill.needs, "decode": decision.decode.needs}
            _change(report, "prefill", prefills, decision.prefill.replicas, now)
            _change(report, "decode", decodes, decision.decode.replicas, now)
        now += TICK_S
    return report


def _role(workers: "list[PrefillWorker] | list[DecodeWorker]", needs: Needs, bounds: Bounds, now: float) -> Role:
    running = [worker for worker in workers if worker.ready <= now and not worker.leaving]
    target = sum(not worker.leaving for worker in workers)
    stats = tuple(worker.stats(now) for worker in running)
    return Role(len(running), target, *bounds, workers=stats, needs=needs)


def _change(
    report: Report, name: str, workers: "list[PrefillWorker] | list[DecodeWorker]", target: int, now: float
) -> None:
    staying = [worker for worker in workers if not worker.leaving]
    report.most[name] = max(report.most.get(name, 0), target, len(staying))
    if target != len(staying):
        report.changes.append((now, name, len(staying), target))
    for worker in sorted(staying, key=lambda worker: -worker.ready)[: max(len(staying) - target, 0)]:
        worker.leaving = True
    for _ in range(target - len(staying)):
        workers.append(type(staying[0])(now + START_S))  # type: ignore[arg-type]
