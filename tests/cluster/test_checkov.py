"""What checkov found in the manifests as they are now; `make check-k8s` asks it again."""

import json

from run_checkov import RESULT, fingerprint


def test_checkov_saw_these_manifests_and_every_exception_is_explained() -> None:
    result = json.loads(RESULT.read_text())
    assert result["input_sha256"] == fingerprint(), "the manifests have changed since: make check-k8s"
    assert result["failed"] == []
    assert result["passed"]["kubernetes"] > 300
    assert result["passed"]["dockerfile"] > 50
    assert all(len(line.partition(": ")[2]) > 20 for line in result["skipped"])
