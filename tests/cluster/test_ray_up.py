"""The files for `ray up` are what Ray and LServe accept, and their parts agree."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendered import deployed_args

from lserve.deployments.redis_node import RESOURCE, self_signed
from lserve.deployments.serve_environment import SERVE_ENVIRONMENT
from lserve.deployments.settings import load_settings
from lserve.engine.errors import SettingsError

ROOT = Path(__file__).parents[2]

Resource = dict[str, Any]
REDIS = json.dumps({"url": "rediss://10.0.0.2:6380/0", "ca": self_signed("10.0.0.2")[0]})
"""As `lserve redis` prints it."""


@pytest.fixture
def cloud() -> Resource:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def local() -> Resource:
    return yaml.safe_load((ROOT / "cluster-local.yaml").read_text())


def test_ray_accepts_it(ray_up: Resource) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(ray_up))


def test_the_settings_that_it_deploys_are_valid(ray_up: Resource) -> None:
    settings = load_settings(deployed_args(ray_up, REDIS))
    assert settings.redis.url == "rediss://10.0.0.2:6380/0"
    assert settings.redis.ca is not None and settings.redis.ca.startswith("-----BEGIN CERTIFICATE-----\n")
    managed = load_settings(deployed_args(ray_up, '{url: "rediss://redis.example.com:6379/0"}'))
    assert managed.redis.ca is None
    args = deployed_args(ray_up, REDIS)
    args["decode"]["replica"] = 2
    with pytest.raises(SettingsError, match=r"decode\.replica\b"):
        load_settings(args)


def test_every_worker_finds_its_node(cloud: Resource) -> None:
    settings = load_settings(deployed_args(cloud, REDIS))
    types = cloud["available_node_types"]
    for name, worker in (("prefill", settings.prefill), ("decode", settings.decode)):
        wanted = {"CPU": worker.num_cpus, "GPU": worker.num_gpus, **worker.resources}
        homes = [key for key, node in types.items() if all(node["resources"].get(k, 0) >= v for k, v in wanted.items())]
        assert homes == [name]
        assert types[name]["max_workers"] >= worker.most_replicas
        assert types[name]["min_workers"] <= worker.least_replicas
    assert types["redis"]["resources"] == {"CPU": 0, RESOURCE: 1}
    assert cloud["max_workers"] == sum(node.get("max_workers", 0) for node in types.values())


def test_a_node_type_with_its_own_setup_installs_lserve_too(cloud: Resource) -> None:
    """Ray runs a type's worker_setup_commands in place of the common ones."""
    for node in cloud["available_node_types"].values():
        commands = node.get("worker_setup_commands", cloud["setup_commands"])
        assert set(cloud["setup_commands"]) <= set(commands)


def environment(ray_up: Resource) -> dict[str, str]:
    """What the containers, or the shells of machines without containers, get."""
    options = ray_up.get("docker", {}).get("run_options", ())
    text = "\n".join([*options, *ray_up["setup_commands"]])
    return dict(re.findall(r"\b((?:RAY|UCX)_\w+)=(\S+)", text))


def test_ray_is_locked_and_set_up_as_it_was_measured(ray_up: Resource) -> None:
    assert environment(ray_up)["RAY_AUTH_MODE"] == "token"
    assert SERVE_ENVIRONMENT.items() <= environment(ray_up).items()
    mounts = ray_up["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["~/.lserve/secrets"] == "~/.lserve/secrets"


def test_no_block_of_transports_is_half_uncommented(cloud: Resource) -> None:
    """The blocks are comments; each, with its comment signs taken away, is a list of options."""
    text = (ROOT / "cluster.yaml").read_text()
    options = re.findall(r"^  # (- --.*)$", text, re.MULTILINE)
    parsed = [yaml.safe_load(option)[0] for option in options]
    chosen = [dict(re.findall(r"(UCX_\w+)=(\S+)", option)) for option in parsed]
    transports = [variables["UCX_TLS"].split(",") for variables in chosen if "UCX_TLS" in variables]
    assert [names[0] for names in transports] == ["rc", "srd", "tcp"]
    assert all({"cuda_copy", "cuda_ipc", "self"} <= set(names) for names in transports)
    assert not [name for name in environment(cloud) if name.startswith("UCX_")]


def test_the_local_file_names_each_machine_once(local: Resource) -> None:
    workers = local["provider"]["worker_ips"]
    command = local["worker_start_ray_commands"][1]
    prefill = re.findall(r"^ *([\d.|]+)\)", command, re.MULTILINE)[0].split("|")
    assert set(prefill) < set(workers), "one is left for decode"
    assert local["provider"]["head_ip"] not in workers
    assert RESOURCE in "\n".join(local["head_start_ray_commands"])
    assert "available_node_types" not in local, "the local provider refuses them"


def preparation(name: str) -> str:
    """The commands before `ray up` in a file's first lines."""
    head = (ROOT / name).read_text().split("cluster_name:")[0]
    lines = [line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("#   ")]
    return "\n".join(lines[: lines.index(next(line for line in lines if line.startswith("ray up")))])


def test_the_preparation_makes_secrets_that_only_their_owner_reads(tmp_path: Path) -> None:
    assert preparation("cluster.yaml") == preparation("cluster-local.yaml")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path}
    commands = preparation("cluster.yaml") + "\n. ~/.lserve/secrets; echo $LSERVE_CLUSTER_SECRET $LSERVE_REDIS_PASSWORD"
    done = subprocess.run(["bash", "-ec", commands], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    secrets = done.stdout.split()[-2:]
    assert len(set(secrets)) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in secrets)
    for file in (".lserve/secrets", ".ray/auth_token"):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o600
