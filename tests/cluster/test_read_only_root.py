"""A pod's circumstances on this machine: user 1000, a read-only root, writable /tmp and /dev/shm, Ray's token."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rendered import ROOT, Resource

from lserve.cli.demo_model import SERVED_NAME, demo_model

pytestmark = [pytest.mark.proof, pytest.mark.timeout(300)]

# $1: an empty folder for the new root. Then what must be seen under /tmp, too. Stands for the container runtime.
CONTAINER = r"""
set -eu
root=$1; shift
ip link set lo up
mount --rbind / "$root"; mount --make-rprivate "$root"
mount -t tmpfs tmpfs "$root/tmp"; chmod 1777 "$root/tmp"
mount -t tmpfs tmpfs "$root/dev/shm"; chmod 1777 "$root/dev/shm"
mount -t proc proc "$root/proc"
for path in "$@"; do
  case $path in /tmp/*)
    mkdir -p "$root$path"; mount --bind "$path" "$root$path"; mount -o remount,bind,ro "$root$path" ;;
  esac
done
mount -o remount,bind,ro "$root"
# It may read what belongs to whoever runs the tests, and nothing more than that.
may=-all,+dac_read_search
exec chroot "$root" setpriv --reuid 1000 --regid 100 --clear-groups --no-new-privs \
  --inh-caps=$may --ambient-caps=$may --bounding-set=$may bash -c "$SCRIPT"
"""

POD = r"""
set -eu
! touch /x 2>/dev/null; ! touch "$HOME/x" 2>/dev/null; touch /tmp/x
ray start --head --num-cpus=4 --resources='{"lserve_prefill": 1, "lserve_decode": 1}' --dashboard-host=0.0.0.0
echo "$SETTINGS" > /tmp/serve.yaml
serve deploy /tmp/serve.yaml
until curl -sf -m 2 -o /dev/null http://127.0.0.1:8000/health; do sleep 0.5; done
echo "answer: $(curl -s -H 'Content-Type: application/json' http://127.0.0.1:8000/v1/completions -d "$REQUEST")"
echo "readiness:"; sh -c "$READINESS"
echo "liveness:"; sh -c "$LIVENESS"
"""


def why_not() -> str | None:
    """What is missing here."""
    if os.geteuid():
        return "wants root, to make namespaces"
    missing = [name for name in ("unshare", "setpriv", "chroot", "ip", "curl", "wget") if shutil.which(name) is None]
    return f"{missing[0]} is not installed" if missing else None


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_pod_needs_to_write_nowhere_else(ray_pods: dict[str, Resource], tmp_path: Path) -> None:
    container = ray_pods["decode"]["spec"]["containers"][0]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp", "/dev/shm", "/models"}
    model = demo_model()
    worker = {"replicas": 1, "num_cpus": 1}
    args = {
        "model": {"path": str(model), "served_name": SERVED_NAME},
        "cache": {"retrieval_pool_bytes": 256 << 20},
        "prefill": {**worker, "resources": {"lserve_prefill": 1}},
        "decode": {**worker, "resources": {"lserve_decode": 1}},
    }
    application = {"name": "lserve", "import_path": "lserve.deployments.app:build", "route_prefix": "/", "args": args}
    http = {"host": "0.0.0.0", "port": 8000}
    settings = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
    environment = {
        **{variable["name"]: variable["value"] for variable in container["env"] if "value" in variable},
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "HOME": "/home/ray",
        "HF_HOME": "/tmp/models",
        "XDG_CACHE_HOME": "/tmp/models/cache",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "SCRIPT": POD,
        "SETTINGS": yaml.safe_dump(settings),
        "REQUEST": json.dumps(
            {"model": SERVED_NAME, "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        ),
        "READINESS": container["readinessProbe"]["exec"]["command"][2],
        "LIVENESS": container["livenessProbe"]["exec"]["command"][2],
    }
    environment.pop("RAY_REDIS_CA_CERT")
    root = tmp_path / "root"
    root.mkdir()
    seen = [sys.prefix, sys.base_prefix, str(ROOT), str(model)]
    alone = ["unshare", "--fork", "--pid", "--mount", "--net", "--kill-child"]
    command = [*alone, "bash", "-c", CONTAINER, "container", str(root)]
    done = subprocess.run([*command, *seen], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"text":" Paris' in done.stdout
    assert done.stdout.split("readiness:")[1].split() == ["success", "success", "liveness:", "success"]
