"""The RayService is what KubeRay, Ray Serve and LServe accept, and its numbers fit together."""

import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lserve.deployments.serve_environment import SERVE_ENVIRONMENT
from lserve.deployments.settings import Settings, load_settings
from lserve.engine.errors import SettingsError

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "k8s_schemas"

Resource = dict[str, Any]


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl --validate=strict` and the API server see it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if result.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = result.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in result
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


def validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = strict(json.loads(gzip.decompress((SCHEMAS / f"{kind}-v1.json.gz").read_bytes())))
    for name in ("apiVersion", "kind", "metadata"):
        schema["properties"][name] = True
    return jsonschema.Draft202012Validator(schema)


def complaints(kind: str, resource: Resource) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator(kind).iter_errors(resource)]


def test_kuberay_knows_every_field(ray_service: Resource) -> None:
    assert complaints("rayservice", ray_service) == []
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "lserve"}}
    assert complaints("raycluster", cluster | {"spec": ray_service["spec"]["rayClusterConfig"]}) == []


def test_an_unknown_field_is_refused_at_any_depth(ray_service: Resource) -> None:
    check = validator("rayservice")
    for path in (
        ["spec"],
        ["spec", "upgradeStrategy"],
        ["spec", "rayClusterConfig", "autoscalerOptions"],
        ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec"],
        ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0],
    ):
        changed = copy.deepcopy(ray_service)
        place: Any = changed
        for key in path:
            place = place[key]
        place["notAField"] = 1
        assert not check.is_valid(changed), path


def test_a_wrong_key_in_the_settings_is_named(ray_service: Resource) -> None:
    (application,) = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"]
    application["args"]["decode"]["replica"] = 2
    with pytest.raises(SettingsError, match=r"decode\.replica\b"):
        load_settings(application["args"])


def test_head_and_workers_have_the_same_environment(ray_pods: dict[str, Resource]) -> None:
    environments = [pod["spec"]["containers"][0]["env"] for pod in ray_pods.values()]
    assert all(environment == environments[0] for environment in environments)
    plain = {variable["name"]: variable.get("value") for variable in environments[0]}
    assert SERVE_ENVIRONMENT.items() <= plain.items()


def test_the_cluster_is_locked_and_survives_its_head(ray_service: Resource) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert ray_service["spec"]["excludeHeadPodFromServeSvc"] is True
    options = cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"].startswith("rediss://lserve-ray-redis:")
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] == "ray-redis-password"


def test_every_worker_finds_its_pod(ray_service: Resource, settings: Settings) -> None:
    groups = {group["groupName"]: group for group in ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    for name, worker in (("prefill", settings.prefill), ("decode", settings.decode)):
        wanted = {"CPU": worker.num_cpus, "GPU": worker.num_gpus, **worker.resources}
        has = {key: {k: float(v) for k, v in group["resources"].items()} for key, group in groups.items()}
        homes = [key for key in has if all(has[key].get(k, 0) >= need for k, need in wanted.items())]
        assert homes == [name]
        assert groups[name]["minReplicas"] <= worker.least_replicas
        assert groups[name]["maxReplicas"] >= worker.most_replicas
        assert has[name]["CPU"] - worker.num_cpus >= settings.router.num_cpus, "a router fits beside it"
        limits = groups[name]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert float(limits.get("nvidia.com/gpu", 0)) == has[name].get("GPU", 0) == worker.num_gpus


def test_a_pod_outlives_its_drain_and_a_drain_its_requests(
    ray_service: Resource, ray_pods: dict[str, Resource], settings: Settings
) -> None:
    for name in ("prefill", "decode"):
        pod = ray_pods[name]["spec"]
        (command,) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2:]
        match = re.fullmatch(r"lserve drain --timeout-s (\d+); ray stop", command)
        assert match is not None
        longest = max(role.drain_s for role in (settings.prefill, settings.decode, settings.router))
        assert longest < int(match[1]) < pod["terminationGracePeriodSeconds"]


def test_an_upgrade_goes_by_kuberays_rules(
    render: Callable[[str], list[Resource]],
) -> None:
    spec = next(resource for resource in render("gpu") if resource["kind"] == "RayService")["spec"]
    assert spec["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    options = spec["upgradeStrategy"]["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0
    assert options["gatewayClassName"]
    assert spec["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert spec["rayClusterDeletionDelaySeconds"] >= load_settings(application["args"]).router.request_timeout_s


def test_probes_ask_what_ray_answers_without_a_token(ray_pods: dict[str, Resource]) -> None:
    for name, pod in ray_pods.items():
        container = pod["spec"]["containers"][0]
        readiness, liveness = (
            " ".join(container[f"{kind}Probe"]["exec"]["command"]) for kind in ("readiness", "liveness")
        )
        assert "localhost:52365/api/local_raylet_healthz" in readiness
        assert "localhost:52365/api/local_raylet_healthz" in liveness
        assert ("localhost:8000/-/healthz" in readiness) is (name != "head")
        assert "8000" not in liveness, "a worker that is loading or draining must not be killed"
