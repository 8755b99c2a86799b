"""How many prefill and decode workers there should be: one policy for the whole application.

`decide` is a pure function from a `Snapshot` to a `Decision`. `scale_application` is how Ray Serve calls it; a Serve
config names it as `autoscaling_policy: {policy_function: "lserve.deployments.autoscaling:scale_application"}`. Without
that line `scale_deployment` decides for each deployment from its own numbers.

What is compared with its target:

- Prefill: the time that workers compute, and the prompt tokens that wait behind the prompt in progress. One long prompt
  cannot be shared out, so no more workers are asked for than there are prompts waiting.
- Decode: pages and batch places that requests hold or wait for, and the inter-token latency above its floor.
- A TTFT over its target grows the side at which requests wait longer.

A count grows at once, to twice what runs at most, and shrinks to the largest need of the last `shrink_after_s`, with a
margin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

PREFILL, DECODE = "PrefillWorker", "DecodeWorker"

DRAIN_TTFTS = 4.0
"""Waiting prompts should be gone within this many times the TTFT target."""

BATCH_USE = 0.9
"""How full batches should be at most; pages and ITL usually bind first."""

MAX_GROWTH = 2.0
SHRINK_MARGIN = 1.15
"""A worker is given up when the others could do this many times what is needed."""

_POLICY_STATE = "lserve_needs"

Needs = tuple[tuple[float, int], ...]
"""(time, replicas needed), oldest first, each larger than all that follow."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What the policy keeps: 90th percentile of TTFT, mean ITL, shares of pages and of computing time in use."""

    ttft_s: float
    itl_s: float
    page_use: float
    busy: float
    shrink_after_s: float


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a worker says about itself, over some time where it is no count. Zero: not known, or none.

    queued_prompts, queued_tokens: that wait for others' prefill here. busy: share of the time spent on prefill.
    tokens_per_s: prompt tokens per second of that. wait_s: mean wait for pages. ttft_s: 90th percentile. itl_s: mean;
    itl_floor_s: of the smallest batches. page_use, batch_use: held and waited for, as a share of what there is.
    """

    queued_prompts: float = 0.0
    queued_tokens: float = 0.0
    busy: float = 0.0
    tokens_per_s: float = 0.0
    wait_s: float = 0.0
    ttft_s: float = 0.0
    itl_s: float = 0.0
    itl_floor_s: float = 0.0
    page_use: float = 0.0
    batch_use: float = 0.0


@dataclass(frozen=True, slots=True)
class Role:
    """One deployment. replicas: that run now. target: that were last asked for. needs: what `decide` noted before."""

    replicas: int
    target: int
    minimum: int
    maximum: int
    workers: tuple[WorkerStats, ...] = ()
    needs: Needs = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a decision rests on. A role that is None has a fixed number of workers, or none."""

    now: float
    targets: Targets
    prefill: Role | None
    decode: Role | None


@dataclass(frozen=True, slots=True)
class RoleDecision:
    """replicas: wanted from now on. needs: for the next snapshot."""

    replicas: int
    needs: Needs


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision per role that the snapshot has."""

    prefill: RoleDecision | None
    decode: RoleDecision | None


def decide(snapshot: Snapshot) -> Decision:
    """The replicas that each role should have."""
    targets, prefill, decode = snapshot.targets, snapshot.prefill, snapshot.decode
    prefill_wait, decode_wait = _longest_wait(prefill), _longest_wait(decode)
    is_late = max((worker.ttft_s for worker in _workers(decode)), default=0.0) > targets.ttft_s
    shares = max(prefill_wait, decode_wait) > targets.ttft_s / 4  # a long prompt alone is late, too
    decisions: list[RoleDecision | None] = []
    for role, wait, other in ((prefill, prefill_wait, decode_wait), (decode, decode_wait, prefill_wait)):
        if role is None:
            decisions.append(None)
            continue
        need = max(_compute_need(role, targets), _memory_need(role, targets), _itl_need(role, targets))
        if is_late and shares and wait >= other:
            need = max(need, role.replicas + 1.0)
        decisions.append(_settled(role, need, snapshot))
    return Decision(*decisions)


def _compute_need(role: Role, targets: Targets) -> float:
    """Workers for the prefill that is done here, and for the prompts that wait for it."""
    busy = sum(worker.busy for worker in role.workers)
    rates = [worker.tokens_per_s for worker in role.workers if worker.tokens_per_s]
    backlog = 0.0
    if rates:
        queued = sum(worker.queued_tokens for worker in role.workers)
        backlog = queued * len(rates) / sum(rates) / (DRAIN_TTFTS * targets.ttft_s)
        backlog = min(backlog, sum(worker.queued_prompts for worker in role.workers))
    return max(busy / targets.busy, busy + backlog)


def _memory_need(role: Role, targets: Targets) -> float:
    """Workers whose pages and batches hold what is held and waited for."""
    pages = sum(worker.page_use for worker in role.workers) / targets.page_use
    return max(pages, sum(worker.batch_use for worker in role.workers) / BATCH_USE)


def _itl_need(role: Role, targets: Targets) -> float:
    """Workers that bring the mean gap between tokens to its target; what a step takes anyway cannot be shared out."""
    need = 0.0
    for worker in role.workers:
        above = targets.itl_s - worker.itl_floor_s
        if worker.itl_s and above > 0:
            need += max(worker.itl_s - worker.itl_floor_s, 0.0) / above
    return need


def _settled(role: Role, need: float, snapshot: Snapshot) -> RoleDecision:
    if not role.workers:  # nobody has said anything yet
        return RoleDecision(role.target, role.needs)
    limit = min(role.maximum, ceil(role.replicas * MAX_GROWTH))
    wanted, enough = (max(role.minimum, min(ceil(n - 1e-6), limit)) for n in (need, need * SHRINK_MARGIN))
    start = snapshot.now - snapshot.targets.shrink_after_s
    # A role that has just started had its target's need until now.
    earlier = role.needs or ((snapshot.now, role.target),)
    needs = (*((time, n) for time, n in earlier if time >= start and n > enough), (snapshot.now, enough))
    return RoleDecision(max(wanted, min(role.target, needs[0][1])), needs)


def _workers(role: Role | None) -> tuple[WorkerStats, ...]:
    return () if role is None else role.workers


def _longest_wait(role: Role | None) -> float:
    return max((worker.wait_s for worker in _workers(role)), default=0.0)


def reported(stats: WorkerStats, targets: Targets) -> dict[str, float]:
    """What a worker's `record_autoscaling_stats` returns. Targets go along: they stand in the settings only."""
    return {**asdict(stats), **{f"target_{name}": value for name, value in asdict(targets).items()}}


def scale_application(contexts: "Mapping[Any, AutoscalingContext]") -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
    """The application-level policy for Ray Serve: all autoscaled deployments at once."""
    by_name = {context.deployment_name: context for context in contexts.values()}
    targets = next((found for context in by_name.values() if (found := _targets(context))), None)
    if targets is None:  # no worker has reported yet
        kept = {key: context.target_num_replicas for key, context in contexts.items()}
        return kept, {key: dict(context.policy_state) for key, context in contexts.items()}
    prefill, decode = by_name.get(PREFILL), by_name.get(DECODE)
    now = next(context.current_time for context in by_name.values())
    assert now is not None
    decision = decide(Snapshot(now, targets, _role(prefill), _role(decode)))
    replicas, state = {}, {}
    for context, made in ((prefill, decision.prefill), (decode, decision.decode)):
        if context is not None and made is not None:
            replicas[context.deployment_id] = made.replicas
            state[context.deployment_id] = {_POLICY_STATE: made.needs}
    return replicas, state


def scale_deployment(context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
    """The same for one deployment alone, where the Serve config names no policy for the application."""
    replicas, state = scale_application({context.deployment_id: context})
    return replicas[context.deployment_id], state[context.deployment_id]


def _role(context: "AutoscalingContext | None") -> Role | None:
    if context is None:
        return None
    names = [field.name for field in fields(WorkerStats)]
    workers = [WorkerStats(**{name: said.get(name, 0.0) for name in names}) for said in _said(context)]
    return Role(
        replicas=context.current_num_replicas,
        target=context.target_num_replicas,
        minimum=context.capacity_adjusted_min_replicas,
        maximum=context.capacity_adjusted_max_replicas,
        workers=tuple(workers),
        needs=context.policy_state.get(_POLICY_STATE, ()),
    )


def _targets(context: "AutoscalingContext") -> Targets | None:
    names = [field.name for field in fields(Targets)]
    for said in _said(context):
        if all(f"target_{name}" in said for name in names):
            return Targets(**{name: said[f"target_{name}"] for name in names})
    return None


def _said(context: "AutoscalingContext") -> Sequence[Mapping[str, float]]:
    """Each running replica's own numbers, averaged over the time that the deployment looks back."""
    by_replica: dict[Any, dict[str, float]] = {}
    for name, values in (context.aggregated_metrics or {}).items():
        for replica, value in values.items():
            by_replica.setdefault(replica, {})[name] = value
    return list(by_replica.values())
