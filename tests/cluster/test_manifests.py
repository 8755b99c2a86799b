"""Everything beside the RayService: Kubernetes' own schemas, and how safe and how big each pod is."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from rendered import build

from lserve.deployments.settings import Settings

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (ROOT / "k8s" / "components").iterdir())
FOREIGN = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/")
"""Kinds that Kubernetes itself does not know."""

Resource = dict[str, Any]
Render = Callable[[str], list[Resource]]


def validate_core(resources: list[Resource]) -> None:
    for resource in resources:
        if not resource["apiVersion"].startswith(FOREIGN):
            for version in ("1.31", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_pass_kubernetes_own_schemas(overlay: str, render: Render) -> None:
    validate_core(render(overlay))


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_fits_the_gpu_overlay(component: str, tmp_path: Path, render: Render) -> None:
    before = {(resource["kind"], resource["metadata"]["name"]) for resource in render("gpu")}
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "k8s").symlink_to(ROOT / "k8s")
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../k8s/overlays/gpu"], "components": [f"../k8s/components/{component}"]})
    )
    after = list(build(folder))
    validate_core(after)
    assert {(resource["kind"], resource["metadata"]["name"]) for resource in after} >= before
    assert after != render("gpu")


def pod_specs(resources: list[Resource]) -> Iterator[Resource]:
    """The spec of every pod template, at any depth."""
    stack: list[Any] = list(resources)
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if "containers" in node:
                yield node
            stack += node.values()
        elif isinstance(node, list):
            stack += node


def test_every_pod_is_unprivileged_with_a_read_only_root(resources: list[Resource]) -> None:
    pods = list(pod_specs(resources))
    assert len(pods) == 5  # head, prefill, decode, two kinds of Redis
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_only_the_head_may_talk_to_the_api_server(resources: list[Resource], ray_pods: dict[str, Resource]) -> None:
    for pod in pod_specs(resources):
        assert pod.get("automountServiceAccountToken") is False or pod == ray_pods["head"]["spec"]


def test_every_container_says_what_it_needs(resources: list[Resource]) -> None:
    for pod in pod_specs(resources):
        for container in pod["containers"]:
            wants = container["resources"]
            assert wants["requests"]["cpu"]
            assert wants["requests"]["memory"] == wants["limits"]["memory"]
            assert container["readinessProbe"]
            assert container["livenessProbe"]


def test_secrets_come_by_reference(resources: list[Resource]) -> None:
    keys = set()
    for pod in pod_specs(resources):
        for container in pod["containers"]:
            for variable in container.get("env", ()):
                if re.search("SECRET|PASSWORD|KEYS", variable["name"]):
                    keys.add(variable["valueFrom"]["secretKeyRef"]["key"])
    assert keys == {"redis-password", "cluster-secret", "api-keys"}
    assert not [resource for resource in resources if resource["kind"] == "Secret"]


def redis(resources: list[Resource], name: str) -> tuple[Resource, str]:
    """The container and the configuration of one of the two kinds."""
    workload = next(
        r for r in resources if r["kind"] in ("Deployment", "StatefulSet") and r["metadata"]["name"] == name
    )
    configuration = next(r for r in resources if r["kind"] == "ConfigMap" and r["metadata"]["name"] == name)
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container, configuration["data"]["valkey.conf"]


def in_bytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([a-zA-Z]+)", size).groups()  # type: ignore[union-attr]
    return int(number) * {"mb": 1 << 20, "gb": 1 << 30, "Mi": 1 << 20, "Gi": 1 << 30}[unit]


def test_redis_for_pages_is_a_cache(resources: list[Resource], settings: Settings) -> None:
    container, configuration = redis(resources, "lserve-redis")
    lines = set(configuration.splitlines())
    assert {"port 0", "tls-port 6379", 'save ""', "appendonly no", "maxmemory-policy allkeys-lru"} <= lines
    (maximum,) = [variable["value"] for variable in container["env"] if variable["name"] == "MAX_MEMORY"]
    assert in_bytes(maximum) <= 0.8 * in_bytes(container["resources"]["limits"]["memory"])
    assert settings.redis.url == "rediss://lserve-redis:6379/0"


def test_redis_for_ray_keeps_everything(resources: list[Resource]) -> None:
    container, configuration = redis(resources, "lserve-ray-redis")
    assert {"port 0", "tls-port 6379", "appendonly yes", "maxmemory-policy noeviction"} <= set(
        configuration.splitlines()
    )
    (maximum,) = re.findall(r"^maxmemory (\w+)$", configuration, re.MULTILINE)
    assert in_bytes(maximum) <= 0.8 * in_bytes(container["resources"]["limits"]["memory"])
    assert any(mount["mountPath"] == "/data" for mount in container["volumeMounts"])


def test_every_redis_password_stays_off_the_disk_and_the_environment(resources: list[Resource]) -> None:
    for name in ("lserve-redis", "lserve-ray-redis"):
        container, configuration = redis(resources, name)
        assert "requirepass" not in configuration
        assert '--requirepass "$(cat /secrets/password)"' in container["args"][0]


def test_certificate_and_settings_name_the_same_authority(ray_pods: dict[str, Resource], settings: Settings) -> None:
    for pod in ray_pods.values():
        (volume,) = [v for v in pod["spec"]["volumes"] if v.get("secret", {}).get("secretName") == "lserve-redis-tls"]
        assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}], "the private key stays with Redis"
        (mount,) = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
        assert settings.redis.ca == f"{mount['mountPath']}/ca.crt"


def test_budgets_and_spread_select_the_pods(render: Render) -> None:
    resources = render("gpu")
    groups = next(r for r in resources if r["kind"] == "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    budgets = [resource for resource in resources if resource["kind"] == "PodDisruptionBudget"]
    for group in groups:
        labels = group["template"]["metadata"]["labels"].items()
        (budget,) = [b for b in budgets if b["spec"]["selector"]["matchLabels"].items() <= labels]
        assert budget["spec"]["minAvailable"] == 1
        (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
        (expression,) = spread["labelSelector"]["matchExpressions"]
        assert dict(labels)[expression["key"]] in expression["values"]
        assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert group["template"]["spec"]["nodeSelector"]


def test_traffic_from_outside_may_take_as_long_as_a_request(settings: Settings) -> None:
    ingress = yaml.safe_load((ROOT / "k8s/components/ingress/ingress.yaml").read_text())
    notes = {key.rsplit("/", 1)[1]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert notes["proxy-buffering"] == "off"
    assert int(notes["proxy-read-timeout"]) >= settings.router.request_timeout_s
    assert int(notes["proxy-body-size"].removesuffix("m")) << 20 >= settings.router.max_body_bytes
    gateway, route = yaml.safe_load_all((ROOT / "k8s/components/gateway/gateway.yaml").read_text())
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert route["spec"]["parentRefs"][0]["name"] == gateway["metadata"]["name"]
