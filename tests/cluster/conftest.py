"""The rendered manifests of each overlay, and the files of `ray up`."""

from collections.abc import Callable

import pytest
import yaml
from rendered import ROOT, Resource, build, only_application

from lserve.deployments.settings import Settings, load_settings

APPLICATIONS = ("cpu", "gpu")
"""The overlays with a RayService."""


@pytest.fixture
def render() -> Callable[[str], list[Resource]]:
    """Renders an overlay by name; each call gives objects of its own."""

    def render(overlay: str) -> list[Resource]:
        return yaml.safe_load(yaml.safe_dump(list(build(ROOT / "k8s" / "overlays" / overlay))))

    return render


@pytest.fixture(params=APPLICATIONS)
def resources(request: pytest.FixtureRequest, render: Callable[[str], list[Resource]]) -> list[Resource]:
    """The resources of one overlay that serves."""
    return render(request.param)


@pytest.fixture
def ray_service(resources: list[Resource]) -> Resource:
    """The RayService among them."""
    return next(resource for resource in resources if resource["kind"] == "RayService")


@pytest.fixture
def ray_pods(ray_service: Resource) -> dict[str, Resource]:
    """The pod templates of head, prefill and decode."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"] for name, group in groups.items()}


@pytest.fixture
def settings(ray_service: Resource) -> Settings:
    """Ours, out of the RayService."""
    return load_settings(only_application(yaml.safe_load(ray_service["spec"]["serveConfigV2"])))


@pytest.fixture(params=["cluster.yaml", "cluster-local.yaml"])
def ray_up(request: pytest.FixtureRequest) -> Resource:
    """A file for `ray up`, as it stands."""
    return yaml.safe_load((ROOT / request.param).read_text())
