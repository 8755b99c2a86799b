"""Who reaches what: the rendered network policies, evaluated as Kubernetes does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

Resource = dict[str, Any]
PART = {"app.kubernetes.io/part-of": "lserve"}
RAY_PORTS = (6379, 8265, 10001, 52365, 8080, 23456)


@dataclass(frozen=True)
class Peer:
    """Where traffic comes from or goes to. namespace: None is outside of the Kubernetes cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = "lserve"


HEAD, PREFILL, DECODE = (
    Peer({**PART, "app.kubernetes.io/component": component}) for component in ("head", "prefill", "decode")
)
PAGES, STATE = (Peer({**PART, "app.kubernetes.io/name": name}) for name in ("lserve-redis", "lserve-ray-redis"))
OUTSIDE = Peer(namespace=None)
NEIGHBOUR = Peer({"app": "another"})
OTHER_NAMESPACE = Peer({"app": "another"}, "default")
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, "monitoring")


def selects(selector: Resource, labels: Mapping[str, str]) -> bool:
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def rule_allows(rule: Resource, peer: Peer, port: int, direction: str) -> bool:
    ports = rule.get("ports")
    if ports is not None and port not in {entry["port"] for entry in ports}:
        return False
    peers = rule.get(direction)
    if peers is None:
        return True
    for entry in peers:
        assert entry.keys() <= {"podSelector", "namespaceSelector"}
        same_namespace = peer.namespace == "lserve"
        in_reach = peer.namespace is not None if entry.get("namespaceSelector") == {} else same_namespace
        if in_reach and selects(entry.get("podSelector", {}), peer.labels):
            return True
    return False


def side_allows(policies: list[Resource], subject: Peer, other: Peer, port: int, kind: str, direction: str) -> bool:
    """Whether one end lets the connection pass: always, unless a policy selects it; then one rule must allow it."""
    if subject.namespace != "lserve":
        return True
    applying = [
        policy["spec"]
        for policy in policies
        if kind in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], subject.labels)
    ]
    rules = [rule for spec in applying for rule in spec.get(kind.lower(), ())]
    return not applying or any(rule_allows(rule, other, port, direction) for rule in rules)


def reaches(policies: list[Resource], source: Peer, target: Peer, port: int) -> bool:
    return side_allows(policies, source, target, port, "Egress", "to") and side_allows(
        policies, target, source, port, "Ingress", "from"
    )


@pytest.fixture
def policies(render: Callable[[str], list[Resource]]) -> list[Resource]:
    return [r for overlay in ("gpu", "monitoring") for r in render(overlay) if r["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("source", [OUTSIDE, NEIGHBOUR, OTHER_NAMESPACE])
def test_from_outside_only_the_routers_port_is_reached(policies: list[Resource], source: Peer) -> None:
    for worker in (PREFILL, DECODE):
        assert reaches(policies, source, worker, 8000)
    assert not reaches(policies, source, HEAD, 8000)
    for target in (HEAD, PREFILL, DECODE, PAGES, STATE):
        for port in RAY_PORTS:
            assert not reaches(policies, source, target, port), (target, port)


def test_ray_and_the_pages_pass_between_the_clusters_pods(policies: list[Resource]) -> None:
    for source in (HEAD, PREFILL, DECODE):
        for target in (HEAD, PREFILL, DECODE):
            for port in RAY_PORTS:
                assert reaches(policies, source, target, port)


def test_each_redis_serves_its_own_clients(policies: list[Resource]) -> None:
    assert reaches(policies, PREFILL, PAGES, 6379)
    assert reaches(policies, DECODE, PAGES, 6379)
    assert not reaches(policies, HEAD, PAGES, 6379)
    assert reaches(policies, HEAD, STATE, 6379)
    assert not reaches(policies, DECODE, STATE, 6379)
    assert not reaches(policies, PAGES, STATE, 6379)


def test_operator_and_prometheus_reach_what_they_need_and_no_more(policies: list[Resource]) -> None:
    assert reaches(policies, OPERATOR, HEAD, 8265)
    assert not reaches(policies, OPERATOR, HEAD, 6379)
    assert not reaches(policies, OPERATOR, DECODE, 8265)
    for target in (HEAD, PREFILL, DECODE):
        assert reaches(policies, PROMETHEUS, target, 8080)
        assert not reaches(policies, PROMETHEUS, target, 8265)


def test_what_goes_out(policies: list[Resource]) -> None:
    for source in (HEAD, PREFILL, DECODE):
        for port in (53, 443, 6443):
            assert reaches(policies, source, OUTSIDE, port)
        assert not reaches(policies, source, OUTSIDE, 22)
    assert not reaches(policies, PAGES, OUTSIDE, 443)
    assert not reaches(policies, STATE, OUTSIDE, 443)
