"""The autoscaling policy: each need by itself, a day's traffic in virtual time, and how Ray Serve calls it."""

import time
from dataclasses import replace
from typing import Any

import pytest
from fleet import DAY_S, Report, simulate, traffic
from hypothesis import given
from hypothesis import strategies as st

from lserve.deployments.autoscaling import (
    DECODE,
    PREFILL,
    Decision,
    Role,
    Snapshot,
    Targets,
    WorkerStats,
    decide,
    reported,
)
from lserve.deployments.settings import load_settings
from lserve.deployments.worker_stats import StatsWindow
from lserve.engine.errors import SettingsError
from lserve.engine.results import EngineLoad

TARGETS = Targets(ttft_s=10.0, itl_s=0.03, page_use=0.85, busy=0.7, shrink_after_s=600.0)
IDLE = WorkerStats()


def decided(prefill: list[WorkerStats], decode: list[WorkerStats], at_most: int = 10) -> tuple[int, int]:
    """(prefill, decode) replicas for workers that have run for a long time like this."""
    roles = [Role(len(w), len(w), 1, at_most, tuple(w), needs=((0.0, 1),)) for w in (prefill, decode)]
    made = decide(Snapshot(10_000.0, TARGETS, *roles))
    assert made.prefill is not None and made.decode is not None
    return made.prefill.replicas, made.decode.replicas


def test_idle_workers_are_given_up() -> None:
    assert decided([IDLE] * 4, [IDLE] * 3) == (1, 1)


def test_busy_prefill_workers_get_help() -> None:
    assert decided([WorkerStats(busy=0.95)] * 2, [IDLE]) == (3, 1)


def test_waiting_prompts_bring_workers_but_no_more_than_there_are_prompts() -> None:
    many = WorkerStats(busy=1.0, tokens_per_s=20_000, queued_prompts=50, queued_tokens=1_600_000)
    assert decided([many] * 2, [IDLE]) == (4, 1)  # twice what runs, at most
    one = WorkerStats(busy=0.9, tokens_per_s=20_000, queued_prompts=1, queued_tokens=1_600_000)
    assert decided([one], [IDLE]) == (2, 1)


def test_pages_and_batch_places_bring_decode_workers() -> None:
    assert decided([IDLE], [WorkerStats(page_use=0.9)] * 4) == (1, 5)
    assert decided([IDLE], [WorkerStats(batch_use=1.2)] * 3) == (1, 4)


def test_slow_tokens_bring_decode_workers_unless_nothing_could_be_faster() -> None:
    assert decided([IDLE], [WorkerStats(itl_s=0.04, itl_floor_s=0.01)] * 2) == (1, 3)
    assert decided([IDLE], [WorkerStats(itl_s=0.04, itl_floor_s=0.035)] * 2) == (1, 1)


def test_a_late_first_token_grows_the_side_that_waits() -> None:
    late = WorkerStats(ttft_s=20.0, wait_s=1.0)
    assert decided([WorkerStats(wait_s=9.0)], [late]) == (2, 1)
    assert decided([WorkerStats(wait_s=1.0)], [replace(late, wait_s=12.0)]) == (1, 2)
    assert decided([WorkerStats(wait_s=1.0)], [late]) == (1, 1)  # the prompts themselves are that long


def test_a_role_shrinks_only_after_a_while() -> None:
    role = Role(3, 3, 1, 10, (WorkerStats(busy=0.65),) * 3)
    needs: Any = ()
    replicas = []
    for second in range(0, 2000, 100):
        workers = role.workers if second < 500 else (IDLE,) * 3
        made = decide(Snapshot(second, TARGETS, replace(role, workers=workers, needs=needs), None)).prefill
        assert made is not None
        needs = made.needs
        replicas.append(made.replicas)
    assert replicas[:11] == [3] * 11 and replicas[11:] == [1] * 9
    assert len(needs) == 1


def test_nothing_changes_before_anybody_has_spoken() -> None:
    made = decide(Snapshot(0.0, TARGETS, Role(0, 3, 1, 5), None))
    assert made.prefill is not None and made.prefill.replicas == 3 and made.decode is None


NUMBERS = st.floats(0, 1e6, allow_nan=False)
STATS = st.builds(WorkerStats, *[NUMBERS] * 10)


@given(st.lists(STATS, max_size=4), st.integers(0, 6), st.integers(1, 3), st.integers(0, 5))
def test_bounds_hold_whatever_workers_say(workers: list[WorkerStats], target: int, least: int, more: int) -> None:
    target = min(max(target, least), least + more)
    role = Role(len(workers), target, least, least + more, tuple(workers))
    made: Decision = decide(Snapshot(5.0, TARGETS, role, role))
    for one in (made.prefill, made.decode):
        assert one is not None and least <= one.replicas <= least + more
        assert [n for _, n in one.needs] == sorted((n for _, n in one.needs), reverse=True)


@pytest.fixture(scope="module")
def day() -> Report:
    """A day with the policy in charge of both roles."""
    return simulate(traffic(seed=1), TARGETS, (1, 12), (1, 12))


def late(report: Report) -> float:
    """The share of requests whose first token came after the target."""
    return sum(seconds > TARGETS.ttft_s for _, seconds in report.ttfts) / report.arrived


def test_over_a_day_targets_are_met_and_every_request_ends(day: Report) -> None:
    assert day.finished == day.arrived > 30_000
    ttfts = sorted(seconds for _, seconds in day.ttfts)
    assert ttfts[int(0.9 * len(ttfts))] < TARGETS.ttft_s
    assert late(day) < 0.04
    assert all(itl <= TARGETS.itl_s for choices, itl in day.itls if choices)


def test_over_a_day_counts_do_not_flap(day: Report) -> None:
    assert 10 < len(day.changes) < 120
    grown: dict[str, float] = {}
    shrunk: dict[str, float] = {}
    regrets = 0
    for now, role, before, after in day.changes:
        if after < before:
            assert now - grown.get(role, -1e9) >= TARGETS.shrink_after_s
            shrunk[role] = now
        else:
            regrets += now - shrunk.get(role, -1e9) < TARGETS.shrink_after_s / 2
            grown[role] = now
    assert regrets <= 12  # a burst may begin at any time


def test_a_day_costs_less_than_a_fleet_that_never_changes(day: Report) -> None:
    """Four and two are the smallest such fleet that is late no more often; three and two are."""
    fixed = simulate(traffic(seed=1), TARGETS, (4, 4), (2, 2))
    assert fixed.worker_s == 6 * DAY_S and fixed.finished == fixed.arrived
    assert late(simulate(traffic(seed=1), TARGETS, (3, 3), (2, 2))) > late(day) > late(fixed)
    assert day.worker_s < 0.65 * fixed.worker_s


def test_a_worker_measures_itself() -> None:
    now = 1000.0
    window = StatsWindow(lambda: now)
    load = EngineLoad(
        3, 1, 40, 100, 5, 0, 1, 0, 0, 1, 0, waiting_pages=10, queued_prompts=2, queued_tokens=9, head_tokens=7
    )
    assert window.stats(load, None) == WorkerStats(queued_prompts=2, queued_tokens=9, page_use=0.5)
    now += 60
    for seconds in (0.5, 0.7):
        window.note_step(seconds, 1000, False)
    for seconds in (0.02, 0.03, 0.04):
        window.note_step(seconds, 0, True)
    for seconds in (1.0, 3.0):
        window.note_wait(seconds)
        window.note_first_token(seconds)
    said = window.stats(load, 8)
    assert said.busy == pytest.approx(1.2 / 60) and said.tokens_per_s == pytest.approx(2000 / 1.2)
    assert (said.wait_s, said.ttft_s, said.itl_floor_s, said.batch_use) == (2.0, 3.0, 0.02, 0.5)
    assert said.itl_s == pytest.approx(0.03)
    now += 31
    assert window.stats(load, 8).ttft_s == 0.0 and window.stats(load, 8).busy > 0
    now += 100
    assert window.stats(load, 8).busy == 0.0


def test_settings_bound_the_number_of_workers() -> None:
    model = {"path": "/models/demo"}
    fixed = load_settings({"model": model, "prefill": {"replicas": 2}})
    assert not fixed.prefill.is_autoscaled and fixed.prefill.most_replicas == 2
    scaled = load_settings({"model": model, "decode": {"replicas": 2, "min_replicas": 1, "max_replicas": 4}})
    assert scaled.decode.is_autoscaled and (scaled.decode.least_replicas, scaled.decode.most_replicas) == (1, 4)
    for wrong in ({"replicas": 2, "max_replicas": 1}, {"min_replicas": 2}, {"replicas": 0, "max_replicas": 1}):
        with pytest.raises(SettingsError, match="prefill: .*replicas"):
            load_settings({"model": model, "prefill": wrong})


def context(name: str, workers: list[dict[str, float]], state: dict[str, Any]) -> Any:
    """What Ray Serve gives a policy."""
    from ray.serve._private.common import DeploymentID, ReplicaID
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    deployment = DeploymentID(name, "lserve")
    ids = [ReplicaID(str(number), deployment) for number in range(len(workers))]
    metrics = {key: {i: said[key] for i, said in zip(ids, workers, strict=True)} for key in (workers or [{}])[0]}
    config = AutoscalingConfig(min_replicas=1, max_replicas=6, upscale_delay_s=0, downscale_delay_s=0)
    return AutoscalingContext(
        deployment, name, "lserve", len(ids), len(ids), ids, 0.0, 0.0, metrics, {}, 1, 6, state, None, None,
        time.time(), config,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on import
def test_ray_serve_can_call_it() -> None:
    """Pickled as Ray Serve does it, within Ray Serve's own wrapper."""
    from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
    from ray.serve.config import AutoscalingPolicy

    named = AutoscalingPolicy(policy_function="lserve.deployments.autoscaling:scale_application")
    policy = _apply_app_level_autoscaling_config(named.get_policy())
    prefill = [reported(WorkerStats(busy=0.95), TARGETS)] * 2
    decode = [reported(WorkerStats(page_use=0.9), TARGETS)] * 4
    contexts = {c.deployment_id: c for c in (context(PREFILL, prefill, {}), context(DECODE, decode, {}))}
    replicas, state = policy(contexts)
    assert {key.name: count for key, count in replicas.items()} == {PREFILL: 3, DECODE: 5}
    again, _ = policy(
        {
            c.deployment_id: context(c.deployment_name, prefill, state[c.deployment_id])
            for c in [contexts[next(iter(contexts))]]
        }
    )
    assert list(again.values()) == [3]
    silent = context(DECODE, [], {})
    assert policy({silent.deployment_id: silent})[0] == {silent.deployment_id: 0}
