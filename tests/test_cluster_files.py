"""The Kubernetes manifests, cluster.yaml and the settings in them are what KubeRay, Ray and LServe accept."""

import copy
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lserve.deployments.serve_environment import SERVE_ENVIRONMENT
from lserve.deployments.settings import Settings, load_settings
from lserve.engine.errors import SettingsError

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "tests" / "k8s_schemas" / "rayservice-v1.json.gz"
OVERLAYS = sorted((ROOT / "k8s" / "overlays").iterdir())


@pytest.fixture(scope="module", params=OVERLAYS, ids=lambda overlay: overlay.name)
def resources(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rendered resources of one overlay."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(request.param)]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(request.param)]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    rendered = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return list(yaml.safe_load_all(rendered))


@pytest.fixture
def ray_service(resources: list[dict[str, Any]]) -> dict[str, Any]:
    return next(resource for resource in resources if resource["kind"] == "RayService")


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


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    for name in ("apiVersion", "kind", "metadata"):
        schema["properties"][name] = True
    return jsonschema.Draft202012Validator(schema)


def test_the_ray_service_has_only_fields_that_kuberay_knows(
    ray_service: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(ray_service)] == []


def test_an_unknown_field_is_refused_at_any_depth(
    ray_service: dict[str, Any], validator: jsonschema.Draft202012Validator
) -> None:
    for path in (
        ["spec"],
        ["spec", "rayClusterConfig"],
        ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec"],
        ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0],
    ):
        changed = copy.deepcopy(ray_service)
        place: Any = changed
        for key in path:
            place = place[key]
        place["notAField"] = 1
        assert not validator.is_valid(changed), path


def test_core_resources_pass_kubernetes_own_schemas(resources: list[dict[str, Any]]) -> None:
    import kubernetes_validate

    for resource in resources:
        if resource["kind"] != "RayService":
            kubernetes_validate.validate(resource, "1.31", strict=True)


def test_head_and_workers_have_the_same_environment(ray_service: dict[str, Any]) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    environments = [group["template"]["spec"]["containers"][0]["env"] for group in groups]
    assert all(environment == environments[0] for environment in environments)


def test_ray_serve_is_set_up_as_it_was_measured(ray_service: dict[str, Any]) -> None:
    container = ray_service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    kubernetes = {variable["name"]: variable.get("value") for variable in container["env"]}
    options = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["run_options"]
    ray_up = dict(option.removeprefix("--env ").split("=") for option in options if option.startswith("--env "))
    for environment in (kubernetes, ray_up):
        assert SERVE_ENVIRONMENT.items() <= environment.items()


def test_every_worker_finds_its_node_in_the_ray_service(ray_service: dict[str, Any]) -> None:
    settings = load_settings(kubernetes_args(ray_service))
    groups = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    nodes = {group["groupName"]: {k: float(v) for k, v in group["resources"].items()} for group in groups}
    assert_fits(settings, nodes)


def test_every_worker_finds_its_node_in_cluster_yaml() -> None:
    settings = load_settings(cluster_args())
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert_fits(settings, {name: node["resources"] for name, node in types.items()})


def test_ray_accepts_cluster_yaml() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert set(config["available_node_types"]) == {"head", "prefill", "decode"}


def test_a_wrong_key_in_the_args_block_is_named(ray_service: dict[str, Any]) -> None:
    for args in (kubernetes_args(ray_service), cluster_args()):
        args["decode"]["replica"] = 2
        with pytest.raises(SettingsError, match=r"decode\.replica\b"):
            load_settings(args)


def kubernetes_args(ray_service: dict[str, Any]) -> dict[str, Any]:
    """The args block of a RayService."""
    return only_application(yaml.safe_load(ray_service["spec"]["serveConfigV2"]))


def cluster_args() -> dict[str, Any]:
    """The args block of cluster.yaml's deploy step."""
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    match = re.search(r"<<END\n(.*?)\nEND\n", "\n".join(commands), re.DOTALL)
    assert match is not None
    return only_application(yaml.safe_load(match[1]))


def only_application(config: dict[str, Any]) -> dict[str, Any]:
    """The args block of a Serve config that Ray accepts."""
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "lserve.deployments.app:build"
    return application.args


def assert_fits(settings: Settings, nodes: dict[str, dict[str, float]]) -> None:
    """Each kind of worker fits on exactly one kind of node."""
    for name, worker in (("prefill", settings.prefill), ("decode", settings.decode)):
        wanted = {"CPU": worker.num_cpus, "GPU": worker.num_gpus, **worker.resources}
        homes = [node for node, has in nodes.items() if all(has.get(key, 0) >= need for key, need in wanted.items())]
        assert homes == [name]


def containers(resources: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every container of every pod template."""
    for resource in resources:
        stack: list[Any] = [resource]
        while stack:
            node = stack.pop()
            if isinstance(node, dict):
                yield from node.get("containers", ())
                stack += node.values()
            elif isinstance(node, list):
                stack += node


def test_every_container_says_what_it_needs_and_keeps_no_secret_in_plain_text(resources: list[dict[str, Any]]) -> None:
    for container in containers(resources):
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        for variable in container["env"]:
            is_secret = re.search("SECRET|PASSWORD|KEY", variable["name"])
            assert not is_secret or "secretKeyRef" in variable["valueFrom"]
