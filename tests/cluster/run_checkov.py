"""`make check-k8s`: checkov over all manifests and the Dockerfile; keeps what it found, for `test_checkov.py`.

checkov pins its dependencies, so it lives in an environment of its own; its path is the only argument. It knows no
RayService, so the pods in there are shown to it as Deployments.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rendered import ROOT, build

RESULT = Path(__file__).with_name("checkov.json")

Resource = dict[str, Any]


def inputs() -> Iterator[tuple[str, str]]:
    """(name, text) of each file that checkov reads."""
    for overlay in sorted((ROOT / "k8s" / "overlays").iterdir()):
        resources = [shown for resource in build(overlay) for shown in as_core_kinds(resource)]
        resources.sort(key=lambda resource: (resource["kind"], resource["metadata"]["name"]))
        yield f"{overlay.name}.yaml", yaml.safe_dump_all(resources)
    for component in ("ingress/ingress", "gateway/gateway"):
        yield f"{component.split('/')[0]}.yaml", (ROOT / "k8s" / "components" / f"{component}.yaml").read_text()
    yield "Dockerfile", (ROOT / "Dockerfile").read_text()


def as_core_kinds(resource: Resource) -> Iterator[Resource]:
    """The resource itself, without data; a RayService as one Deployment per kind of pod; nothing of what it ignores."""
    if resource["apiVersion"].startswith("monitoring.coreos.com/"):
        return
    if resource["kind"] != "RayService":
        yield {key: value for key, value in resource.items() if key != "data"}
        return
    cluster = resource["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        labels = group["template"]["metadata"]["labels"]
        name = f"lserve-{labels['app.kubernetes.io/component']}"
        metadata = {"name": name, "namespace": resource["metadata"]["namespace"], "annotations": exceptions(name)}
        spec = {"selector": {"matchLabels": labels}, "template": group["template"]}
        yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}


EXCEPTIONS = {
    "CKV_K8S_11": "a CPU limit would throttle engine steps; requests keep the share",
    "CKV_K8S_15": "tags are never reused, and a pod must restart while the registry is away",
    "CKV_K8S_35": "Ray's processes and ours read secrets from the environment, as Ray passes its token",
    "CKV_K8S_38": "the autoscaler in the head's pod talks to the API server",
    "CKV_K8S_40": "user 1000 owns the home directory of Ray's image",
    "CKV_K8S_43": "the image is the user's own build, whose digest only the user knows",
}
"""What checkov finds in a RayService's pods and stays, and why."""


def exceptions(name: str) -> dict[str, str]:
    """As annotations, which is how checkov takes them."""
    chosen = [f"{check}={why}" for check, why in EXCEPTIONS.items() if check != "CKV_K8S_38" or name == "lserve-head"]
    return {f"checkov.io/skip{number}": text for number, text in enumerate(chosen, 1)}


def fingerprint() -> str:
    """Of everything that checkov reads."""
    return hashlib.sha256(json.dumps(list(inputs())).encode()).hexdigest()


def main(checkov: str) -> int:
    """Runs checkov and writes RESULT; 1 when anything failed that is no explained exception."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in inputs():
            (Path(folder) / name).write_text(text)
        command = [checkov, "-d", folder, "--framework", "kubernetes", "dockerfile", "--skip-download", "-o", "json"]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    reports = json.loads(output)
    checks = [(report["check_type"], report["results"]) for report in reports]
    found: dict[str, Any] = {
        "input_sha256": fingerprint(),
        "checkov": reports[0]["summary"]["checkov_version"],
        "passed": {kind: len(results["passed_checks"]) for kind, results in checks},
        "failed": sorted(
            f"{check['check_id']} {check['resource']}" for _, results in checks for check in results["failed_checks"]
        ),
        "skipped": sorted(
            {
                f"{check['check_id']} {check['resource']}: {check['check_result']['suppress_comment']}"
                for _, results in checks
                for check in results["skipped_checks"]
            }
        ),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(RESULT.read_text())
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
